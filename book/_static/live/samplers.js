/* The samplers of the book in the browser: ddpm_tutorial/sampling.py, guidance.py and editing.py, line by line, under the
   same names. tests/test_live.py compares each of them with PyTorch, step by step, from the same noise.

   Images are Float32Arrays, one image after the other; t is an integer, the paper's: 1 … T. A noise model is a function
   model(x_t, t), or for the network model(x_t, t, labels), that gives the predicted noise or a promise of it. `randn(n)`
   draws n numbers from N(0, 1). */

// ------------------------------------------------------------------------------------------ numbers and noise
/** a·x + b·y, element by element. */
export function mix(a, x, b, y) {
  return Float32Array.from(x, (value, i) => a * value + b * y[i]);
}

function clamp(x) {
  return x.map((value) => Math.min(1, Math.max(-1, value)));
}

export function concat(...parts) {
  const all = new Float32Array(parts.reduce((length, part) => length + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

/** A source of standard normal numbers that starts at `seed`: mulberry32, then Box and Muller's transform. */
export function generator(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return (((bits ^ (bits >>> 14)) >>> 0) + 0.5) / 2 ** 32; // in (0, 1)
  };
  return (n) =>
    Float32Array.from({ length: n }, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}

// ------------------------------------------------------------------------------------------ schedules (section 1.4)
const ramp = (T, from, to) => Array.from({ length: T }, (_, i) => from + ((to - from) * i) / (T - 1));

/** β_1 … β_T of each schedule; the first three ends are DDPM's, times 1000/T. */
export const SCHEDULES = {
  linear: (T) => ramp(T, 0.1 / T, 20 / T),
  cosine: (T) => {
    const f = (t) => Math.cos((((t / T + 0.008) / 1.008) * Math.PI) / 2) ** 2;
    return Array.from({ length: T }, (_, i) => Math.min(0.999, 1 - f(i + 1) / f(i)));
  },
  quadratic: (T) => ramp(T, Math.sqrt(0.1 / T), Math.sqrt(20 / T)).map((root) => root ** 2),
  sigmoid: (T) => ramp(T, -6, 6).map((u) => 0.1 / T + (20 / T - 0.1 / T) / (1 + Math.exp(-u))),
};

/** The tables of β_1 … β_T, with entry 0 for clean data, and the formulas that need no network. */
export class Diffusion {
  constructor(betas) {
    this.num_timesteps = betas.length;
    this.betas = [0, ...betas];
    this.alphas_cumprod = [1]; // ᾱ_t = α_1 … α_t (1.4)
    for (const beta of betas) this.alphas_cumprod.push(this.alphas_cumprod.at(-1) * (1 - beta));
  }

  signal(t) {
    return Math.sqrt(this.alphas_cumprod[t]);
  }

  sigma(t) {
    return Math.sqrt(1 - this.alphas_cumprod[t]);
  }

  snr(t) {
    return this.alphas_cumprod[t] / (1 - this.alphas_cumprod[t]);
  }

  q_sample(x_0, t, noise) {
    return mix(this.signal(t), x_0, this.sigma(t), noise); // (1.5)
  }

  predict_x0(x_t, t, noise) {
    return mix(1 / this.signal(t), x_t, -this.sigma(t) / this.signal(t), noise); // (3.2)
  }

  predict_noise(x_t, t, x_0) {
    return mix(1 / this.sigma(t), x_t, -this.signal(t) / this.sigma(t), x_0); // (3.2)
  }

  /** Mean and variance of q(x_{t−1} | x_t, x_0). */
  q_posterior(x_0, x_t, t) {
    const [alpha_bar_t, previous] = [this.alphas_cumprod[t], this.alphas_cumprod[t - 1]];
    const of_x0 = (Math.sqrt(previous) * this.betas[t]) / (1 - alpha_bar_t);
    const of_xt = (Math.sqrt(1 - this.betas[t]) * (1 - previous)) / (1 - alpha_bar_t);
    return [mix(of_x0, x_0, of_xt, x_t), (this.betas[t] * (1 - previous)) / (1 - alpha_bar_t)]; // (3.3)
  }
}

// ------------------------------------------------------------------------------------------ samplers (chapters 5 and 6)
/* Each is a generator of { t, x_t, pred_x0 }: it has arrived at t with x_t, and saw pred_x0 where the step began. */

export async function* sample_ddpm(model, diffusion, x_T, { start = diffusion.num_timesteps, clip_denoised = true, randn }) {
  let x_t = x_T;
  for (let t = start; t > 0; t--) {
    const pred_x0 = await predict_x0(model, diffusion, x_t, t, clip_denoised);
    const [mean, variance] = diffusion.q_posterior(pred_x0, x_t, t);
    x_t = t === 1 ? mean : mix(1, mean, Math.sqrt(variance), randn(mean.length)); // the last step adds no noise
    yield { t: t - 1, x_t, pred_x0 };
  }
}

export async function* sample_ddim(model, diffusion, x_T, options) {
  const { num_inference_steps = 50, eta = 0, clip_denoised = true, start, randn } = options;
  let x_t = x_T;
  for (const [t, t_next] of steps_down(diffusion, num_inference_steps, start)) {
    const pred_x0 = await predict_x0(model, diffusion, x_t, t, clip_denoised); // (6.8), left
    const noise = diffusion.predict_noise(x_t, t, pred_x0);
    const [alpha_bar_t, alpha_bar_next] = [diffusion.alphas_cumprod[t], diffusion.alphas_cumprod[t_next]];
    const variance = ((1 - alpha_bar_next) / (1 - alpha_bar_t)) * (1 - alpha_bar_t / alpha_bar_next);
    const sigma = eta * Math.sqrt(variance); // (6.11), right
    x_t = mix(Math.sqrt(alpha_bar_next), pred_x0, Math.sqrt(Math.max(0, 1 - alpha_bar_next - sigma ** 2)), noise);
    if (eta > 0 && t_next > 0) x_t = mix(1, x_t, sigma, randn(x_t.length)); // (6.11), left
    yield { t: t_next, x_t, pred_x0 };
  }
}

export async function* sample_heun(model, diffusion, x_T, { num_inference_steps = 25, clip_denoised = true, start }) {
  let x_t = x_T;
  for (const [t, t_next] of steps_down(diffusion, num_inference_steps, start)) {
    const pred_x0 = await predict_x0(model, diffusion, x_t, t, clip_denoised);
    const noise = diffusion.predict_noise(x_t, t, pred_x0);
    let arrived = diffusion.q_sample(pred_x0, t_next, noise); // the DDIM step
    if (t_next > 0) {
      const there = await predict_x0(model, diffusion, arrived, t_next, clip_denoised);
      const mean_noise = mix(0.5, noise, 0.5, diffusion.predict_noise(arrived, t_next, there)); // (6.18)
      arrived = diffusion.q_sample(diffusion.predict_x0(x_t, t, mean_noise), t_next, mean_noise);
    }
    x_t = arrived;
    yield { t: t_next, x_t, pred_x0 };
  }
}

export async function* sample_dpmpp_2m(model, diffusion, x_T, { num_inference_steps = 20, clip_denoised = true, start }) {
  let [x_t, last_x0, last_h] = [x_T, null, null];
  for (const [t, t_next] of steps_down(diffusion, num_inference_steps, start)) {
    const pred_x0 = await predict_x0(model, diffusion, x_t, t, clip_denoised);
    const h = (Math.log(diffusion.snr(t_next)) - Math.log(diffusion.snr(t))) / 2; // in λ; infinite in the last step
    let aim = pred_x0;
    if (last_x0 && t_next > 0) aim = mix(1 + h / (2 * last_h), pred_x0, -h / (2 * last_h), last_x0); // (6.22)
    x_t = diffusion.q_sample(aim, t_next, diffusion.predict_noise(x_t, t, aim));
    [last_x0, last_h] = [pred_x0, h];
    yield { t: t_next, x_t, pred_x0 };
  }
}

/** `count` of the T timesteps, spread evenly from T down (section 6.4). */
export function ddim_timesteps(num_timesteps, count) {
  return Array.from({ length: count }, (_, i) => round(num_timesteps * (1 - i / count)));
}

function steps_down(diffusion, count, start) {
  let timesteps = ddim_timesteps(diffusion.num_timesteps, count);
  if (start) timesteps = [start, ...timesteps.filter((t) => t < start)]; // the same steps, from there on
  return timesteps.map((t, i) => [t, timesteps[i + 1] ?? 0]);
}

async function predict_x0(model, diffusion, x_t, t, clip_denoised) {
  const pred_x0 = diffusion.predict_x0(x_t, t, await model(x_t, t));
  return clip_denoised ? clamp(pred_x0) : pred_x0;
}

/** As Python rounds: a half goes to the even neighbour. */
function round(value) {
  const nearest = Math.round(value);
  return nearest - value === 0.5 && nearest % 2 ? nearest - 1 : nearest;
}

// ------------------------------------------------------------------------------------------ guidance (chapter 7)
/** `model` asked for one label an image, guided by the scale s; `null_label` stands for no label. */
export function classifier_free(model, labels, null_label, s = 1) {
  const none = labels.map(() => null_label);
  return async (x_t, t) => {
    if (s === 0 || s === 1) return model(x_t, t, s ? labels : none);
    const both = await model(concat(x_t, x_t), t, [...labels, ...none]);
    const [with_label, without] = [both.subarray(0, x_t.length), both.subarray(x_t.length)];
    return mix(1 - s, without, s, with_label); // (7.1)
  };
}

// ------------------------------------------------------------------------------------------ editing (chapter 9)
/** `model` with the answer given where `mask` is 1: the noise there is the one that `known` leaves in x_t. */
export function keep_known(model, diffusion, known, mask) {
  return async (x_t, t) => {
    const [given, noise] = [diffusion.predict_noise(x_t, t, known), await model(x_t, t)];
    return noise.map((value, i) => (mask[i] ? given[i] : value)); // (9.3)
  };
}

/** RePaint: each step of `sampler(x_T, start)` is taken `num_loops` times, with noise added again between. */
export async function* resample(sampler, diffusion, x_T, { num_loops, randn }) {
  let [x_t, t] = [x_T, diffusion.num_timesteps];
  while (t > 0) {
    let step = (await sampler(x_t, t).next()).value;
    yield step;
    for (let loop = 1; loop < num_loops; loop++) {
      const again = add_noise(diffusion, step.x_t, step.t, t, randn(x_t.length));
      step = (await sampler(again, t).next()).value;
      yield step;
    }
    [x_t, t] = [step.x_t, step.t];
  }
}

/** From the earlier time up to t in one jump. */
export function add_noise(diffusion, x, earlier, t, noise) {
  const kept = diffusion.alphas_cumprod[t] / diffusion.alphas_cumprod[earlier];
  return mix(Math.sqrt(kept), x, Math.sqrt(1 - kept), noise); // (9.12)
}

/** Spherical interpolation between the noises a and b (6.23). */
export function slerp(a, b, weight) {
  const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
  const omega = Math.acos(dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)));
  return mix(Math.sin((1 - weight) * omega) / Math.sin(omega), a, Math.sin(weight * omega) / Math.sin(omega), b);
}
