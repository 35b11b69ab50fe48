/* Points from a mixture of Gaussians in the plane, whose exact score is known: ddpm_tutorial/toy.py's GaussianMixture, with
   equal weights and one standard deviation. Points are Float32Arrays x, y, x, y, … */

export class GaussianMixture {
  constructor(means, std) {
    [this.means, this.std] = [means, std];
  }

  /** `count` points of the data; `randn(n)` draws normal numbers. */
  sample(count, randn) {
    const noise = randn(2 * count);
    return noise.map((z, i) => this.means[(i >> 1) % this.means.length][i % 2] + this.std * z);
  }

  /** ∇ log q(x_t): each component's −(x_t − mean)/variance, weighted by p(component | x_t). */
  score(diffusion, x_t, t) {
    const [signal, variance] = [diffusion.signal(t), diffusion.alphas_cumprod[t] * this.std ** 2 + diffusion.sigma(t) ** 2];
    const scores = new Float32Array(x_t.length);
    for (let i = 0; i < x_t.length; i += 2) {
      const offsets = this.means.map(([x, y]) => [x_t[i] - signal * x, x_t[i + 1] - signal * y]);
      const squares = offsets.map(([x, y]) => x * x + y * y);
      const weights = squares.map((square) => Math.exp((Math.min(...squares) - square) / (2 * variance)));
      const sum = weights.reduce((a, b) => a + b);
      offsets.forEach(([x, y], k) => {
        scores[i] -= ((weights[k] / sum) * x) / variance;
        scores[i + 1] -= ((weights[k] / sum) * y) / variance;
      });
    }
    return scores;
  }

  /** The best possible noise predictor, E[ε | x_t] = −√(1 − ᾱ_t) ∇ log q(x_t). */
  noise_model(diffusion) {
    return (x_t, t) => this.score(diffusion, x_t, t).map((value) => -diffusion.sigma(t) * value); // (3.7), (3.9)
  }
}
