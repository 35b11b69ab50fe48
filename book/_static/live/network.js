/* The shipped networks as noise models of the page. Each is loaded once, at the first call of network() that asks for it. */

import { Diffusion } from "./samplers.js";

const here = (name) => new URL(name, import.meta.url);
const loading = {}; // by name

/** { model(x_t, t, labels), diffusion, class_names, null_label, processor } of the network "model", for garments, or "emoji",
    for captions; `progress(share)` hears how much of it has come. */
export function network(name = "model", progress = () => {}) {
  const mine = (loading[name] ??= { listeners: new Set() });
  mine.listeners.add(progress);
  mine.result ??= start(name, mine.listeners).catch((error) => {
    delete loading[name]; // the next press tries again
    throw error;
  });
  return mine.result;
}

/** What tools/live.py wrote beside the network: image shape, names of the classes, β_1 … β_T, sizes of the files, a known
    answer. */
async function about(name) {
  const response = await fetch(here(`built/${name}.json`));
  if (!response.ok) throw new Error("this copy of the book was built without the network");
  return response.json();
}

async function start(name, listeners) {
  const told = await about(name);
  const worker = new Worker(here("worker.js"), { type: "module" });
  const waiting = new Map();
  const ready = new Promise((resolve, reject) => {
    worker.onerror = (event) => reject(new Error(event.message || "the worker did not start"));
    worker.onmessage = ({ data }) => {
      if (data.total) listeners.forEach((progress) => progress(data.loaded / data.total));
      else if (data.ready) resolve(data.ready);
      else if (data.id === undefined) reject(new Error(data.error));
      else {
        const { resolve, reject } = waiting.get(data.id);
        waiting.delete(data.id);
        data.error ? reject(new Error(data.error)) : resolve(data.noise);
      }
    };
  });
  worker.postMessage({ about: { ...told, file: `${name}.onnx` } });
  let last = 0;
  const processor = await ready.catch((error) => {
    worker.terminate();
    throw error;
  });
  return {
    processor,
    class_names: told.class_names,
    null_label: told.class_names.length,
    diffusion: new Diffusion(told.betas),
    model: (x_t, t, labels) =>
      new Promise((resolve, reject) => {
        waiting.set(++last, { resolve, reject });
        worker.postMessage({ id: last, x_t, t, labels });
      }),
  };
}
