/* Chapter 1: one real image at time t under each schedule, with ᾱ_t and the signal-to-noise ratio. No network. */

import { Diffusion, SCHEDULES, generator } from "./samplers.js";
import { CLASS_NAMES, SIZE, button, choice, colors, el, explain, new_seed, on_theme, picture, pictures, real_images, row,
  slider } from "./ui.js";

const T = 1000;
const COLORS = ["#1f77b4", "#e07b1a", "#2ca02c", "#d62728"];
const DASHES = [[], [8, 4], [2, 3], [9, 3, 2, 3]];
const swatch = (i) => `<svg width="26" height="8" aria-hidden="true"><path d="M0 4h26" stroke="${COLORS[i]}" stroke-width="3"
  stroke-dasharray="${DASHES[i].join(" ")}"/></svg>`;

export default async function schedule() {
  const images = await real_images();
  const names = Object.keys(SCHEDULES);
  const diffusions = names.map((name) => new Diffusion(SCHEDULES[name](T)));
  let noise = generator(4)(SIZE);

  const tiles = names.map((name) => picture("", `The image with the noise of the ${name} schedule`, true));
  const plots = [
    { says: "ᾱ<sub>t</sub>", of: (d, t) => d.alphas_cumprod[t], low: 0, high: 1, ticks: [0, 0.5, 1] },
    { says: "log<sub>10</sub> SNR", of: (d, t) => Math.log10(d.snr(t)), low: -5, high: 4.5, ticks: [-4, 0, 4] },
  ];
  for (const plot of plots) {
    const alt = `${plot.says.replace(/<.*?>/g, "")} of each schedule against t, with a mark at this t`;
    plot.canvas = el("canvas", { class: "live-plot", role: "img", "aria-label": alt });
  }

  const garment = choice("Image", CLASS_NAMES, { value: 9, change: () => see() });
  const time = slider("t =", { min: 0, max: T, value: 300, move: () => see() });
  const renew = button("Another noise", () => ((noise = generator(new_seed())(SIZE)), see()));

  function see() {
    diffusions.forEach((diffusion, i) => {
      const t = time.value;
      tiles[i].show(diffusion.q_sample(images[garment.value], t, noise));
      const snr = t ? diffusion.snr(t) : Infinity;
      tiles[i].caption.innerHTML = `${swatch(i)} <b>${names[i]}</b><br>ᾱ<sub>t</sub> = ${diffusion.alphas_cumprod[t].toFixed(4)}<br>
        SNR = ${Number.isFinite(snr) ? snr.toPrecision(3) : "∞"}`;
    });
    plots.forEach((plot) => draw_curves(plot, diffusions, time.value));
  }

  on_theme(see);
  requestAnimationFrame(see); // the plots know their width when they are on the page
  return [
    row(garment.label, renew),
    row(time.label),
    pictures(...tiles.map((tile) => tile.figure)),
    pictures(
      ...plots.map(({ canvas, says }) => el("figure", { class: "live-wide" }, canvas, el("figcaption", { html: says }))),
    ),
    explain(`One jump (1.5) for each schedule, always with the same noise:
      <i>x<sub>t</sub></i> = √ᾱ<sub>t</sub> <i>x</i><sub>0</sub> + √(1 − ᾱ<sub>t</sub>) ε. The signal-to-noise ratio is
      ᾱ<sub>t</sub> / (1 − ᾱ<sub>t</sub>).`),
  ];

  function draw_curves({ canvas, of, low, high, ticks }, all, t) {
    const [width, height, left, below] = [canvas.clientWidth || 300, 190, 30, 22];
    const scale = devicePixelRatio;
    [canvas.width, canvas.height] = [width * scale, height * scale];
    canvas.style.height = `${height}px`;
    const [pen, page] = [canvas.getContext("2d"), colors()];
    pen.scale(scale, scale);
    pen.font = "12px sans-serif";
    const x = (at) => left + (at / T) * (width - left - 8);
    const y = (value) => 8 + ((high - Math.min(high, Math.max(low, value))) / (high - low)) * (height - below - 8);
    [pen.strokeStyle, pen.fillStyle, pen.textAlign] = [page.border, page.text, "right"];
    for (const tick of ticks) {
      pen.fillText(tick, left - 5, y(tick) + 4);
      line([[x(0), y(tick)], [x(T), y(tick)]]);
    }
    pen.textAlign = "center";
    for (const at of [0, 500]) pen.fillText(`t = ${at}`, Math.max(x(at), 24), height - 6);
    pen.fillText("1000", width - 20, height - 6);
    pen.lineWidth = 2;
    all.forEach((diffusion, i) => {
      pen.strokeStyle = COLORS[i];
      pen.setLineDash(DASHES[i]);
      line(Array.from({ length: 101 }, (_, k) => Math.max(1, 10 * k)).map((at) => [x(at), y(of(diffusion, at))]));
      pen.setLineDash([]);
      pen.fillStyle = COLORS[i];
      pen.beginPath();
      pen.arc(x(t), y(t ? of(diffusion, t) : high), 4, 0, 7);
      pen.fill();
    });
    pen.strokeStyle = page.text;
    pen.lineWidth = 1;
    line([[x(t), 8], [x(t), height - below]]);

    function line(points) {
      pen.beginPath();
      points.forEach(([px, py]) => pen.lineTo(px, py));
      pen.stroke();
    }
  }
}
