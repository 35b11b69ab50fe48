/* The shipped network as a noise model of the page. It is loaded once, at the first call of network(). */

import { Diffusion } from "./samplers.js";

const here = (name) => new URL(name, import.meta.url);
let loading;

/** { model(x_t, t, labels), diffusion, null_label, processor }; `progress(share)` hears how much of it has come. */
export function network(progress = () => {}) {
  loading ??= { listeners: new Set() };
  loading.listeners.add(progress);
  loading.result ??= start(loading.listeners).catch((error) => {
    loading = undefined; // the next press tries again
    throw error;
  });
  return loading.result;
}

/** What tools/live.py wrote beside the network: names of the classes, β_1 … β_T, sizes of the files, a known answer. */
async function about() {
  const response = await fetch(here("built/model.json"));
  if (!response.ok) throw new Error("this copy of the book was built without the network");
  return response.json();
}

async function start(listeners) {
  const told = await about();
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
  worker.postMessage({ about: told });
  let last = 0;
  const processor = await ready.catch((error) => {
    worker.terminate();
    throw error;
  });
  return {
    processor,
    null_label: told.class_names.length,
    diffusion: new Diffusion(told.betas),
    model: (x_t, t, labels) =>
      new Promise((resolve, reject) => {
        waiting.set(++last, { resolve, reject });
        worker.postMessage({ id: last, x_t, t, labels });
      }),
  };
}
