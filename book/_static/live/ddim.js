/* Chapter 6: one noise, drawn with different numbers of steps and different η. */

import { generator, sample_ddim } from "./samplers.js";
import { CLASS_NAMES, SIZE, button, choice, explain, follow, job, new_seed, picture, pictures, row, slider } from "./ui.js";

const COUNTS = [1, 2, 3, 5, 10, 20, 50, 100];
const KEPT = 6; // pictures of earlier settings

export default function ddim() {
  const garment = choice("Garment", CLASS_NAMES, { value: 8, change: () => renew() });
  const settle = () => again();
  const steps = slider("Steps", { min: 0, max: COUNTS.length - 1, value: 5, format: (i) => COUNTS[i], settle });
  const eta = slider("η =", { min: 0, max: 1, step: 0.1, value: 0, format: (v) => v.toFixed(1), settle });
  const start = picture("<i>x<sub>T</sub></i>", "The noise that all of these begin with", true);
  const now = picture("not drawn yet", "What the sampler makes of it", true);
  const earlier = pictures();
  let x_T;

  const { press, bar, status, again } = job("Draw", async (signal, { for_labels, diffusion }) => {
    const [count, share] = [COUNTS[steps.value], eta.value];
    const options = { num_inference_steps: count, eta: share, randn: generator(new_seed()) };
    const said = `${count} step${count > 1 ? "s" : ""}, η = ${share.toFixed(1)}`;
    const walk = sample_ddim(for_labels([garment.value]), diffusion, x_T, options);
    const { x_t } = await follow(walk, signal, (step) => {
      now.show(step.x_t);
      now.caption.innerHTML = `<i>t</i> = ${step.t}`;
    });
    now.caption.textContent = said;
    const kept = picture(said, `Drawn with ${said}`);
    kept.show(x_t);
    earlier.prepend(kept.figure);
    while (earlier.children.length > KEPT) earlier.lastChild.remove();
    return `Drawn with ${said}.`;
  });

  function renew() {
    x_T = generator(x_T ? new_seed() : 9)(SIZE);
    start.show(x_T);
    earlier.replaceChildren();
    again();
  }
  renew();
  return [
    row(garment.label, press, button("Another noise", renew), bar),
    row(steps.label, eta.label),
    pictures(start.figure, now.figure),
    status,
    earlier,
    explain(`DDIM on as many of the 1,000 timesteps as you choose (6.11). With η = 0 the noise <i>x<sub>T</sub></i> decides
      everything: more steps draw the same garment more finely. With η above 0 fresh noise comes in at each step, and every
      press draws another one.`),
  ];
}
