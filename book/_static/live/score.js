/* Chapter 3: the exact score field of a mixture in the plane, a point in it, and the path that leads it to the data. */

import { GaussianMixture } from "./mixture.js";
import { Diffusion, SCHEDULES, generator, sample_ddim } from "./samplers.js";
import { button, colors, el, explain, on_theme, pause, row, slider, still } from "./ui.js";

const LIMIT = 2.6; // the plane shown is [−LIMIT, LIMIT]²
const NEAR = 0.35; // so close to the point a finger drags it; elsewhere it scrolls the page
const SIGNED = { min: -LIMIT, max: LIMIT, step: 0.05, format: (value) => value.toFixed(2) };

export default function score() {
  const diffusion = new Diffusion(SCHEDULES.linear(1000));
  const mixture = new GaussianMixture([[-1.5, -1], [1.5, -1], [0, 1.6]], 0.2);
  const model = mixture.noise_model(diffusion);
  const data = mixture.sample(450, generator(3));
  const noise = generator(5)(data.length);
  const ticks = Array.from({ length: 15 }, (_, i) => (i / 7 - 1) * LIMIT);
  const grid = Float32Array.from(ticks.flatMap((y) => ticks.flatMap((x) => [x, y])));

  const canvas = el("canvas", {
    class: "live-plane", role: "img",
    "aria-label": "The score field as arrows, draws of x_t, and the point with its path. The sliders move the point.",
  });
  const status = el("p", { class: "live-status", role: "status" });
  const time = slider("t =", { min: 1, max: 1000, value: 600, move: moved });
  const x = slider("x =", { ...SIGNED, value: 0.9, move: moved });
  const y = slider("y =", { ...SIGNED, value: 0.3, move: moved });
  const press = button("Walk", () => (walking ? stop("Stopped.") : walk()));
  let [path, walking] = [[], null];

  /** The point and every place on its way to t = 0: DDIM with η = 0 (6.8) and the exact noise. */
  async function find_path() {
    const begin = Float32Array.of(x.value, y.value);
    const options = { num_inference_steps: 100, start: time.value, clip_denoised: false };
    const found = [{ t: time.value, x_t: begin }];
    for await (const step of sample_ddim(model, diffusion, begin, options)) found.push(step);
    return found;
  }

  async function moved() {
    if (walking) stop("");
    path = await find_path();
    see();
    const [sx, sy] = mixture.score(diffusion, path[0].x_t, path[0].t);
    status.textContent = `∇ log q(x_t) = (${sx.toFixed(2)}, ${sy.toFixed(2)})`;
  }

  async function walk() {
    const mine = (walking = {});
    press.textContent = "Stop";
    status.textContent = "Walking …";
    path = await find_path();
    for (const { t, x_t } of still.matches ? path.slice(-1) : path) {
      if (walking !== mine) return;
      [time.value, x.value, y.value] = [Math.max(1, t), ...x_t];
      see();
      await pause(40);
    }
    stop(`At t = 0 it is at (${[...path.at(-1).x_t].map((value) => value.toFixed(2)).join(", ")}).`);
  }

  function stop(said) {
    walking = null;
    press.textContent = "Walk";
    status.textContent = said;
  }

  // ---------------------------------------------------------------------------------------- the picture
  function see() {
    const [size, scale, page, t] = [canvas.clientWidth || 300, devicePixelRatio, colors(), time.value];
    canvas.width = canvas.height = size * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const at = (px, py) => [((px + LIMIT) / (2 * LIMIT)) * size, ((LIMIT - py) / (2 * LIMIT)) * size];
    const points = (xy) => Array.from({ length: xy.length / 2 }, (_, i) => [xy[2 * i], xy[2 * i + 1]]);
    const disc = (px, py, radius) => (pen.beginPath(), pen.arc(...at(px, py), radius, 0, 7), pen.fill());
    const line = (through) => (pen.beginPath(), through.forEach((p) => pen.lineTo(...at(...p))), pen.stroke());

    pen.fillStyle = page.muted;
    pen.globalAlpha = 0.45;
    for (const p of points(diffusion.q_sample(data, t, noise))) disc(...p, 1.5);
    pen.globalAlpha = 1;
    [pen.strokeStyle, pen.lineWidth] = [page.primary, 1.3];
    const eps = points(model(grid, t));
    points(grid).forEach(([px, py], i) => {
      const length = Math.hypot(...eps[i]) || 1;
      const [dx, dy] = eps[i].map((value) => (-value / length) * Math.min(length, 3) * 0.11); // −ε, as the score points
      const [ex, ey] = [px + dx, py + dy];
      line([[px, py], [ex, ey]]);
      const [bx, by] = [ex - 0.35 * dx, ey - 0.35 * dy];
      line([[bx - 0.2 * dy, by + 0.2 * dx], [ex, ey], [bx + 0.2 * dy, by - 0.2 * dx]]);
    });
    [pen.strokeStyle, pen.fillStyle, pen.lineWidth] = [page.accent, page.accent, 3];
    line(path.map(({ x_t }) => x_t));
    disc(x.value, y.value, 7);
  }

  // ---------------------------------------------------------------------------------------- the reader's hand
  function place(event) {
    const { left, top, width } = canvas.getBoundingClientRect();
    return [((event.clientX - left) / width) * 2 * LIMIT - LIMIT, LIMIT - ((event.clientY - top) / width) * 2 * LIMIT];
  }
  const near = (event) => Math.hypot(place(event)[0] - x.value, place(event)[1] - y.value) < NEAR;
  const put = (event) => {
    [x.value, y.value] = place(event);
    moved();
  };
  canvas.addEventListener("touchstart", (event) => near(event.touches[0]) && event.preventDefault(), { passive: false });
  canvas.addEventListener("pointerdown", (event) => near(event) && canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => canvas.hasPointerCapture(event.pointerId) && put(event));
  canvas.addEventListener("click", put);

  on_theme(see);
  requestAnimationFrame(moved);
  return [
    canvas,
    row(x.label, y.label),
    row(time.label, press),
    status,
    explain(`The data are three clusters. The dots are draws of <i>x<sub>t</sub></i> (3.1), the arrows −E[ε | <i>x<sub>t</sub></i>]:
      they point as the score does (3.9), here exact. Drag the point, or move it with the sliders. The line is the path on
      which DDIM (6.8) leads it to the data, and Walk follows it, while the field changes with <i>t</i>.`),
  ];
}
