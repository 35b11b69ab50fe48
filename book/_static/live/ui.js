/* The parts of the live figures: elements with labels, pictures, and jobs that can be stopped. */

import { network } from "./network.js";

export const SIDE = 28;
export const SIZE = SIDE * SIDE;
export const CLASS_NAMES = [
  "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
];

/** An element; attributes that are functions listen to events, `html` is set as it is. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "html") element.innerHTML = value;
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export const row = (...children) => el("div", { class: "live-row" }, ...children);
export const pictures = (...children) => el("div", { class: "live-pictures" }, ...children);

/** What a figure computes, with links to its equations and to the code. */
export function explain(html) {
  const code = `<a href="${new URL("samplers.js", import.meta.url)}">samplers.js</a>`;
  const linked = html.replace(/\((\d+)\.(\d+[a-z]?)\)/g, equation);
  return el("p", { class: "live-explain", html: `${linked} The code: ${code}.` });
}

/** "(2.13)" as a link to it: on this page, or on the chapter's page, which the list of chapters names. */
function equation(text, chapter, number) {
  const anchor = `eq-${chapter}-${number}`;
  const page = document.querySelector(`nav a[href*="${chapter.padStart(2, "0")}_"]`)?.getAttribute("href");
  const address = document.getElementById(anchor) ? "" : page;
  return address === undefined ? text : `<a href="${address}#${anchor}">${text}</a>`;
}

export function button(text, press) {
  return el("button", { type: "button", click: press }, text);
}

let controls = 0;

/** A labelled slider. `format(value)` is what it says of its value; `move` hears each movement, `settle` the last one. */
export function slider(text, { min, max, step = 1, value, format = String, move = () => {}, settle = () => {} }) {
  const id = `live-${++controls}`;
  const said = el("output", { for: id });
  const input = el("input", { type: "range", id, min, max, step, value });
  const say = () => {
    said.textContent = format(input.valueAsNumber);
    input.setAttribute("aria-valuetext", said.textContent);
  };
  input.addEventListener("input", () => (say(), move(input.valueAsNumber)));
  input.addEventListener("change", () => settle(input.valueAsNumber));
  say();
  const label = el("div", { class: "live-slider" }, el("div", {}, el("label", { for: id }, text), " ", said), input);
  return { label, get value() { return input.valueAsNumber; }, set value(to) { input.value = to; say(); }, input };
}

/** A labelled list to choose from; its value is the number of the choice. */
export function choice(text, names, { value = 0, change = () => {} } = {}) {
  const select = el("select", { change: () => change(select.selectedIndex) }, ...names.map((name) => el("option", {}, name)));
  select.selectedIndex = value;
  const label = el("label", {}, el("span", {}, text), select);
  return { label, get value() { return select.selectedIndex; }, set value(to) { select.selectedIndex = to; } };
}

/** A picture with its caption, grey at first; `alt` says what it shows, `channels` is 1 (grey) or 3. */
export function picture(caption, alt, big = false, { channels = 1, side = SIDE } = {}) {
  const canvas = el("canvas", { width: side, height: side, role: "img", "aria-label": alt, class: big ? "live-big" : "" });
  const text = el("figcaption", { html: caption });
  const see = (x, index = 0) => show(canvas, x, channels, index);
  const tile = { figure: el("figure", {}, canvas, text), canvas, caption: text, show: see };
  see(new Float32Array(channels * side * side));
  return tile;
}

/** Image number `index` of x, [−1, 1] as levels of grey or of red, green and blue. */
function show(canvas, x, channels, index) {
  const size = canvas.width * canvas.height;
  const pixels = new ImageData(canvas.width, canvas.height);
  for (let i = 0; i < 4 * size; i++) {
    const channel = index * channels + (channels === 3 ? i % 4 : 0);
    pixels.data[i] = i % 4 === 3 ? 255 : Math.round((x[channel * size + (i >> 2)] + 1) * 127.5); // clamped by its type
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** One real image of each class, from the test set: ten Float32Arrays in [−1, 1]. */
let real;
export function real_images() {
  real ??= (async () => {
    const image = new Image();
    image.src = new URL("built/images.png", import.meta.url);
    await image.decode();
    const canvas = el("canvas", { width: image.width, height: SIDE });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return CLASS_NAMES.map((_, k) => {
      const { data } = context.getImageData(k * SIDE, 0, SIDE, SIDE);
      return Float32Array.from({ length: SIZE }, (_, i) => data[4 * i] / 127.5 - 1);
    });
  })();
  return real;
}

/** Whether the reader wants no movement. */
export const still = matchMedia("(prefers-reduced-motion: reduce)");

export const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** Follow a sampler to its end and return its last step; `see` gets every step, or the last alone where a reader wants no
    movement. At most about 25 pictures a second, so that one can see them. */
export async function follow(steps, signal, see) {
  let last;
  for await (last of steps) {
    signal.throwIfAborted();
    if (still.matches) continue;
    see(last);
    await pause(40);
    signal.throwIfAborted();
  }
  see(last);
  return last;
}

const ready = new Set(); // the networks that are here

/** A button that begins `work(signal, net)` and, while it runs, stops it; beside it a bar for what is loading, and a line
    that screen readers announce. `work` returns what that line says at its end. `again()` begins anew, but only once
    the reader has pressed the button. `which` network it is: see network(). */
export function job(name, work, which = "model") {
  const status = el("p", { class: "live-status", role: "status" });
  const bar = el("progress", { max: 1, value: 0, "aria-label": "The network is loading", hidden: true });
  let current = null;
  let asked = false;

  const begin = async () => {
    current?.abort();
    const mine = (current = new AbortController());
    asked = true;
    press.textContent = "Stop";
    try {
      if (!ready.has(which)) status.textContent = "Loading the network, 6 to 7 MB, once …";
      bar.hidden = ready.has(which);
      const net = await network(which, (share) => (bar.value = share));
      ready.add(which);
      bar.hidden = true;
      mine.signal.throwIfAborted();
      status.textContent = "Drawing …";
      const count = { calls: 0, images: 0, ms: 0 };
      const said = await work(mine.signal, counted(net, count));
      status.textContent = `${said} ${cost(count)} on your ${net.processor}.`;
    } catch (error) {
      if (mine === current && !mine.signal.aborted) status.textContent = `It did not work: ${error.message}.`;
    }
    if (mine === current) {
      bar.hidden = true;
      current = null;
      press.textContent = name;
    }
  };
  const stop = () => {
    current?.abort();
    current = null;
    bar.hidden = true;
    press.textContent = name;
    status.textContent = "Stopped.";
  };
  const press = button(name, () => (current ? stop() : begin()));
  return { press, bar, status, begin, again: () => asked && begin() };
}

function counted(net, count) {
  const model = async (x_t, t, labels) => {
    const began = performance.now();
    const noise = await net.model(x_t, t, labels);
    count.calls += 1;
    count.images += labels.length;
    count.ms += performance.now() - began;
    return noise;
  };
  return { ...net, model, for_labels: (labels) => (x_t, t) => model(x_t, t, labels) };
}

function cost({ calls, images, ms }) {
  const each = images > calls ? ` of ${images / calls} images` : "";
  return `${calls} evaluations${each}, ${Math.round(ms / calls)} ms each,`;
}

/** Call `redraw` when the page changes between light and dark. */
export function on_theme(redraw) {
  new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

/** The colours of the page as it is now. */
export function colors() {
  const style = getComputedStyle(document.documentElement);
  const of = (name, otherwise) => style.getPropertyValue(`--pst-color-${name}`).trim() || otherwise;
  return {
    text: of("text-base", "#888"), muted: of("text-muted", "#888"), border: of("border", "#888"),
    primary: of("primary", "#0a7d91"), accent: of("warning", "#c77400"),
  };
}

/** A fresh seed, from the browser's own randomness. */
export function new_seed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}
