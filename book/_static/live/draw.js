/* Front page: a garment drawn from noise, x_t and the guess of x_0 side by side. */

import { generator, sample_ddim } from "./samplers.js";
import { CLASS_NAMES, SIZE, choice, explain, follow, job, new_seed, picture, pictures, row, slider } from "./ui.js";

const STEPS = 25;

export default function draw() {
  const garment = choice("Garment", CLASS_NAMES, { value: 9 });
  const now = picture("<i>x<sub>t</sub></i>, <i>t</i> = 1000", "The image on its way from noise to a garment", true);
  const guess = picture("the guess of <i>x</i><sub>0</sub>", "The garment that the network sees in it", true);
  let frames = [{ t: 1000, x_t: generator(7)(SIZE), pred_x0: new Float32Array(SIZE) }];

  const see = ({ t, x_t, pred_x0 }) => {
    now.show(x_t);
    guess.show(pred_x0);
    now.caption.innerHTML = `<i>x<sub>t</sub></i>, <i>t</i> = ${t}`;
  };
  const back = slider("Look back, step", { min: 0, max: STEPS, value: 0, move: (i) => see(frames[i]) });
  back.input.disabled = true;
  see(frames[0]);

  const { press, bar, status } = job("Draw", async (signal, { for_labels, diffusion }) => {
    back.input.disabled = true;
    back.input.max = STEPS;
    const x_T = generator(new_seed())(SIZE);
    const drawn = [{ t: 1000, x_t: x_T, pred_x0: new Float32Array(SIZE) }];
    const model = for_labels([garment.value]);
    const steps = sample_ddim(model, diffusion, x_T, { num_inference_steps: STEPS });
    try {
      await follow(kept(steps, drawn), signal, (step) => {
        see(step);
        back.value = drawn.length - 1;
      });
    } finally {
      frames = drawn; // one can look back at a drawing that was stopped, too
      back.input.max = drawn.length - 1;
      back.input.disabled = false;
    }
    return `Drawn: ${CLASS_NAMES[garment.value]}.`;
  });
  return [
    row(garment.label, press, bar),
    pictures(now.figure, guess.figure),
    status,
    row(back.label),
    explain(`The network of this book, in your browser. In each of ${STEPS} steps it says how much of the left image is
      noise; without that noise the right image is left (6.8), and a little of the way there is gone. It is loaded
      when you press the button, once.`),
  ];
}

/** The same steps, each put at the end of `list`. */
async function* kept(steps, list) {
  for await (const step of steps) {
    list.push(step);
    yield step;
  }
}
