/* Front page: a garment drawn from noise, x_t and the guess of x_0 side by side. */

import { generator } from "./samplers.js";
import { CLASS_NAMES, SIZE, choice, explain, job, new_seed, row } from "./ui.js";
import { STEPS, watch } from "./watch.js";

export default function draw() {
  const garment = choice("Garment", CLASS_NAMES, { value: 9 });
  const view = watch("a garment");
  view.begin(generator(7)(SIZE));

  const { press, bar, status } = job("Draw", async (signal, { for_labels, diffusion }) => {
    await view.run(generator(new_seed())(SIZE), for_labels([garment.value]), diffusion, signal);
    return `Drawn: ${CLASS_NAMES[garment.value]}.`;
  });
  return [
    row(garment.label, press, bar),
    view.shown,
    status,
    view.back,
    explain(`The network of this book, in your browser. In each of ${STEPS} steps it says how much of the left image is
      noise; without that noise the right image is left (6.8), and a little of the way there is gone. It is loaded
      when you press the button, once.`),
  ];
}
