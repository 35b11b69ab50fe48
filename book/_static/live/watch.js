/* DDIM at work: x_t and the guess of x_0 side by side, and a slider to look back at its steps. */

import { sample_ddim } from "./samplers.js";
import { follow, picture, pictures, row, slider } from "./ui.js";

export const STEPS = 25;

/** `thing` is what comes of the noise x_T, `size` the pictures' { channels, side }. begin(x_T) shows the noise; run(x_T, model,
    diffusion, signal) draws from it. */
export function watch(thing, size) {
  const now = picture("", `The image on its way from noise to ${thing}`, true, size);
  const guess = picture("the guess of <i>x</i><sub>0</sub>", "The picture that the network sees in it", true, size);
  const back = slider("Look back, step", { min: 0, max: STEPS, value: 0, move: (i) => see(frames[i]) });
  let frames;

  function see({ t, x_t, pred_x0 }) {
    now.show(x_t);
    guess.show(pred_x0);
    now.caption.innerHTML = `<i>x<sub>t</sub></i>, <i>t</i> = ${t}`;
  }

  function reset(x_T) {
    frames = [{ t: 1000, x_t: x_T, pred_x0: new Float32Array(x_T.length) }];
    [back.input.max, back.value, back.input.disabled] = [STEPS, 0, true];
    return frames;
  }

  async function run(x_T, model, diffusion, signal) {
    const drawn = reset(x_T);
    try {
      await follow(kept(sample_ddim(model, diffusion, x_T, { num_inference_steps: STEPS }), drawn), signal, (step) => {
        see(step);
        back.value = drawn.length - 1;
      });
    } finally {
      if (frames === drawn) {
        back.input.max = drawn.length - 1; // one can look back at a drawing that was stopped, too
        back.input.disabled = false;
      }
    }
  }
  return { shown: pictures(now.figure, guess.figure), back: row(back.label), begin: (x_T) => see(reset(x_T)[0]), run };
}

/** The same steps, each put at the end of `list`. */
async function* kept(steps, list) {
  for await (const step of steps) {
    list.push(step);
    yield step;
  }
}
