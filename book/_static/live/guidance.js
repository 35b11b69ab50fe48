/* Chapter 7: every class from the same noise, with the guidance scale under the reader's hand. */

import { classifier_free, concat, generator, sample_dpmpp_2m } from "./samplers.js";
import { CLASS_NAMES, SIZE, button, el, explain, follow, job, new_seed, picture, row, slider } from "./ui.js";

export default function guidance() {
  const scale = slider("s =", { min: 0, max: 8, step: 0.5, value: 2, format: (v) => v.toFixed(1), settle: () => again() });
  const tiles = CLASS_NAMES.map((name) => picture(name, `Drawn with the label ${name}`));
  const labels = CLASS_NAMES.map((_, k) => k);
  let noise;

  const { press, bar, status, again } = job("Draw", async (signal, { model, diffusion, null_label }) => {
    const guided = classifier_free(model, labels, null_label, scale.value);
    const x_T = concat(...labels.map(() => noise));
    const steps = sample_dpmpp_2m(guided, diffusion, x_T, { num_inference_steps: 12 });
    await follow(steps, signal, ({ x_t }) => tiles.forEach((tile, k) => tile.show(x_t, k)));
    return `Drawn with s = ${scale.value.toFixed(1)}.`;
  });

  function renew() {
    noise = generator(noise ? new_seed() : 5)(SIZE);
    tiles.forEach((tile) => tile.show(noise));
    again();
  }
  renew();
  return [
    row(press, button("Another noise", renew), bar),
    row(scale.label),
    el("div", { class: "live-grid" }, ...tiles.map((tile) => tile.figure)),
    status,
    explain(`Ten labels, one noise. In each of 12 steps (6.22) the network is asked with the label and without, and the
      guided noise (7.1) goes <i>s</i> times the way from the second answer to the first: <i>s</i> = 0 ignores the label,
      <i>s</i> = 1 is the network with its label, more overdoes it.`),
  ];
}
