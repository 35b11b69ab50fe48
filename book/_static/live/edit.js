/* Chapter 9: the reader paints over a real image, and the model completes it. */

import { generator, keep_known, resample, sample_ddim } from "./samplers.js";
import { CLASS_NAMES, SIDE, SIZE, button, choice, el, explain, follow, job, new_seed, picture, pictures, real_images, row,
  slider } from "./ui.js";

const STEPS = 25;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const MASKS = {
  "Lower half": (x, y) => y >= 14,
  "Right half": (x) => x >= 14,
  Centre: (x, y) => x >= 8 && x < 20 && y >= 8 && y < 20,
  Nothing: () => false,
};

export default async function edit() {
  const images = await real_images();
  const mask = new Uint8Array(SIZE); // 1 where the image is known
  let brush = [14, 20]; // the middle of the brush, 3 × 3 pixels

  const garment = choice("Image", CLASS_NAMES, { value: 9, change: () => see() });
  const loops = slider("Loops", { min: 1, max: 5, value: 3 });
  const given = picture("paint here", "The real image; what is painted over is missing", true);
  const done = picture("completed", "The image as the model completes it", true);

  const { press, bar, status } = job("Complete", async (signal, { for_labels, diffusion, null_label }) => {
    const [known, randn] = [images[garment.value], generator(new_seed())];
    const model = keep_known(for_labels([null_label]), diffusion, known, mask.slice());
    const sampler = (x_T, start) =>
      sample_ddim(model, diffusion, x_T, { num_inference_steps: STEPS, eta: 1, start, randn });
    const steps = resample(sampler, diffusion, randn(SIZE), { num_loops: loops.value, randn });
    await follow(steps, signal, ({ x_t }) => done.show(x_t));
    return `Completed: ${SIZE - mask.reduce((a, b) => a + b)} of ${SIZE} pixels.`;
  });

  function see() {
    given.show(images[garment.value]);
    const pen = given.canvas.getContext("2d");
    pen.fillStyle = "rgb(224 123 26)";
    mask.forEach((known, i) => known || pen.fillRect(i % SIDE, Math.floor(i / SIDE), 1, 1));
    if (document.activeElement !== given.canvas) return;
    pen.strokeStyle = "rgb(60 170 255)";
    pen.strokeRect(brush[0] - 1, brush[1] - 1, 2, 2);
  }

  function fill(missing) {
    mask.forEach((_, i) => (mask[i] = missing(i % SIDE, Math.floor(i / SIDE)) ? 0 : 1));
    see();
  }

  function paint() {
    const [left, top] = brush.map((value) => value - 1);
    for (let y = Math.max(0, top); y < Math.min(SIDE, top + 3); y++) {
      for (let x = Math.max(0, left); x < Math.min(SIDE, left + 3); x++) mask[y * SIDE + x] = 0;
    }
    see();
  }

  const { canvas } = given;
  canvas.classList.add("live-paint");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", "The image to paint on: arrow keys move the brush, the space bar paints");
  const point = (event) => {
    const { left, top, width } = canvas.getBoundingClientRect();
    brush = [event.clientX - left, event.clientY - top].map((value) => Math.floor((value / width) * SIDE));
    paint();
  };
  canvas.addEventListener("pointerdown", (event) => (canvas.setPointerCapture(event.pointerId), point(event)));
  canvas.addEventListener("pointermove", (event) => canvas.hasPointerCapture(event.pointerId) && point(event));
  canvas.addEventListener("focus", see);
  canvas.addEventListener("blur", see);
  canvas.addEventListener("keydown", (event) => {
    const move = ARROWS[event.key];
    if (move) brush = brush.map((value, i) => Math.min(SIDE - 1, Math.max(0, value + move[i])));
    else if (event.key !== " ") return;
    event.preventDefault();
    event.key === " " ? paint() : see();
  });

  fill(MASKS["Lower half"]);
  const presets = Object.entries(MASKS).map(([name, missing]) => button(name, () => fill(missing)));
  return [
    row(garment.label, press, bar),
    row(el("span", {}, "Missing:"), ...presets),
    pictures(given.figure, done.figure),
    status,
    row(loops.label),
    explain(`Paint over what the model shall draw anew, with a finger, the mouse, or the arrow keys and the space bar. The
      other pixels are put into each guess of <i>x</i><sub>0</sub> (9.3). Each of ${STEPS} steps is taken as often as you
      ask for loops, with noise added again between (9.12), so that the parts settle on one another. No label is given.`),
  ];
}
