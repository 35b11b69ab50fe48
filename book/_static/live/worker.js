/* A network, in a thread of its own: { id, x_t, t, labels } in, { id, noise } or { id, error } out; labels are numbers, or
   captions, rows of as many numbers each. Before that, one { loaded, total } after another while its files come (bytes), then
   { ready }: on which processor it runs. */

const built = (name) => new URL(`built/${name}`, import.meta.url).href;
let total = 0;
let loaded = 0;

async function fetched(name, bytes) {
  const response = await fetch(built(name));
  if (!response.ok) throw new Error(`${name} is not there (${response.status})`);
  const all = new Uint8Array(bytes);
  let at = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return all;
    all.set(value, at);
    at += value.length;
    postMessage({ loaded: (loaded += value.length), total });
  }
}

/** Whether there is a real graphics card, and a WebAssembly that can wait for it (JSPI). */
async function has_gpu() {
  const adapter = "Suspending" in WebAssembly && (await navigator.gpu?.requestAdapter().catch(() => null));
  return Boolean(adapter) && !adapter.info.isFallbackAdapter;
}

let ort;
let session;
let image_shape; // (C, H, W)

async function start(about) {
  const gpu = await has_gpu();
  const binary = `ort-wasm-simd-threaded${gpu ? ".jspi" : ""}.wasm`;
  image_shape = about.image_shape;
  [loaded, total] = [0, about.bytes[binary] + about.bytes[about.file]];
  ort = await import(built(`ort.${gpu ? "jspi" : "wasm"}.min.mjs`));
  ort.env.wasm.numThreads = 1; // more would need headers that static hosting does not send
  ort.env.wasm.wasmPaths = built("");
  const [runtime, model] = await Promise.all([binary, about.file].map((name) => fetched(name, about.bytes[name])));
  ort.env.wasm.wasmBinary = runtime;
  const open = (processor) =>
    ort.InferenceSession.create(model, { executionProviders: [processor], logSeverityLevel: 3 });
  if (gpu) {
    try {
      session = await open("webgpu");
      await check(about.probe);
      const began = performance.now();
      await check(about.probe);
      if (performance.now() - began < 100) return "graphics card";
    } catch {
      // then the processor does it
    }
  }
  session = await open("wasm");
  await check(about.probe);
  return "processor";
}

/** A processor whose answer is not PyTorch's is not used. The probe is a picture of sines and the noise in it. */
async function check({ t, labels, noise }) {
  const length = image_shape.reduce((a, b) => a * b);
  const x_t = Float32Array.from({ length }, (_, i) => Math.sin(i));
  const answer = await evaluate(x_t, t, labels);
  if (noise.some((value, i) => !(Math.abs(value - answer[i]) < 0.02))) throw new Error("it computes something else");
}

async function evaluate(x_t, t, labels) {
  const [count, words] = [labels.length, labels[0].length]; // undefined where they are no captions
  const inputs = {
    x_t: new ort.Tensor("float32", x_t, [count, ...image_shape]),
    t: new ort.Tensor("int32", new Int32Array(count).fill(t), [count]),
    labels: new ort.Tensor("int32", Int32Array.from(labels.flat()), words ? [count, words] : [count]),
  };
  const { noise } = await session.run(inputs);
  return noise.data;
}

let queue = Promise.resolve(); // one evaluation at a time
onmessage = ({ data }) => {
  queue = queue.then(async () => {
    try {
      if (data.about) return postMessage({ ready: await start(data.about) });
      const noise = await evaluate(data.x_t, data.t, data.labels);
      postMessage({ id: data.id, noise });
    } catch (error) {
      postMessage({ id: data.id, error: String(error.message ?? error) });
    }
  });
};
