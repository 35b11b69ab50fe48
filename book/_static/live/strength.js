/* Chapter 9: from one image to another; the strength says how much of the first is given up. */

import { classifier_free, generator, sample_ddim } from "./samplers.js";
import { CLASS_NAMES, SIZE, button, choice, explain, follow, job, new_seed, picture, pictures, real_images, row,
  slider } from "./ui.js";

export default async function strength() {
  const images = await real_images();
  const garment = choice("Real image", CLASS_NAMES, { value: 7, change: () => see() });
  const label = choice("To become", [...CLASS_NAMES, "no label"], { value: 9, change: () => again() });
  const settle = () => see();
  const share = slider("Strength", { min: 0.1, max: 1, step: 0.1, value: 0.6, format: (v) => v.toFixed(1), settle });
  const [real, start, now] = [
    picture("real", "The real image", true),
    picture("not drawn yet", "The real image with noise", true),
    picture("not drawn yet", "What the sampler makes of it", true),
  ];
  let noise;

  const start_at = () => Math.round(share.value * 1000);
  const { press, bar, status, again } = job("Draw", async (signal, { model, diffusion, null_label }) => {
    const guided = classifier_free(model, [label.value], null_label, label.value === null_label ? 1 : 2);
    const x_start = diffusion.q_sample(images[garment.value], start_at(), noise); // (9.15)
    start.show(x_start);
    start.caption.innerHTML = `<i>x<sub>t</sub></i>, <i>t</i> = ${start_at()}`;
    const steps = sample_ddim(guided, diffusion, x_start, { num_inference_steps: 20, start: start_at() });
    await follow(steps, signal, ({ t, x_t }) => {
      now.show(x_t);
      now.caption.innerHTML = `<i>t</i> = ${t}`;
    });
    return `Drawn with strength ${share.value.toFixed(1)}.`;
  });

  function see() {
    real.show(images[garment.value]);
    again();
  }
  function renew() {
    noise = generator(noise ? new_seed() : 9)(SIZE);
    see();
  }
  renew();
  return [
    row(garment.label, label.label),
    row(share.label),
    row(press, button("Another noise", renew), bar),
    pictures(real.figure, start.figure, now.figure),
    status,
    explain(`Noise up to <i>t</i><sub>0</sub> = strength · 1000 (9.15), then DDIM (6.11) from there down, with the label and
      <i>s</i> = 2 (7.1). A small strength changes details; at 1 nothing is left of the real image.`),
  ];
}
