/* Chapter 6: between two noises lies a row of garments. */

import { concat, generator, sample_dpmpp_2m, slerp as between } from "./samplers.js";
import { CLASS_NAMES, SIZE, button, choice, explain, follow, job, new_seed, picture, pictures, row, slider } from "./ui.js";

export default function slerp() {
  const garment = choice("Garment", CLASS_NAMES, { value: 3, change: () => again() });
  const settle = () => again();
  const weight = slider("ψ =", { min: 0, max: 1, step: 0.05, value: 0.5, format: (v) => v.toFixed(2), settle });
  const [a, middle, b] = [
    picture("noise <i>a</i>", "Drawn from noise a", true),
    picture("between", "Drawn from the noise between a and b", true),
    picture("noise <i>b</i>", "Drawn from noise b", true),
  ];
  const shown = [a, middle, b];
  let noises;

  const { press, bar, status, again } = job("Draw", async (signal, { for_labels, diffusion }) => {
    const x_T = concat(noises[0], between(...noises, weight.value), noises[1]);
    const options = { num_inference_steps: 12 };
    const steps = sample_dpmpp_2m(for_labels(Array(3).fill(garment.value)), diffusion, x_T, options);
    await follow(steps, signal, ({ x_t }) => shown.forEach((tile, i) => tile.show(x_t, i)));
    return `Drawn with ψ = ${weight.value.toFixed(2)}.`;
  });

  function renew() {
    noises = [0, 1].map((i) => generator(noises ? new_seed() : 13 + i)(SIZE));
    a.show(noises[0]);
    middle.show(between(...noises, weight.value));
    b.show(noises[1]);
    again();
  }
  renew();
  return [
    row(garment.label, press, button("Other noises", renew), bar),
    row(weight.label),
    pictures(...shown.map((tile) => tile.figure)),
    status,
    explain(`The middle picture begins with the noise slerp(<i>a</i>, <i>b</i>; <i>ψ</i>) (6.23), which is as loud as
      <i>a</i> and <i>b</i> are. DPM-Solver++(2M) draws all three in 12 steps (6.22).`),
  ];
}
