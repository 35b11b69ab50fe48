"""How good are samples? A small classifier looks at them, and torchmetrics compares what it sees (chapter 8).

``Classifier`` plays the part that Inception-v3 plays for photographs: its features and its class probabilities are
what the Fréchet distance, the kernel distance, the Inception Score, precision and recall are computed from.
``NoisyClassifier`` is the one that classifier guidance asks (chapter 7).
"""

import contextlib
import statistics
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import ImageData, batch_indices, seeded_generator, to_model_range
from .diffusion import GaussianDiffusion, check_counts
from .files import SHIPPED_WEIGHTS, Pretrained
from .unet import Downsample, ResidualBlock, group_norm, sinusoidal_embedding

REAL_SUBSETS = 10  # random subsets of the test set for the real floor


def _layout(device: torch.device) -> torch.memory_format:
    """Channels-last where convolutions are faster so, as in training; it is unsafe on Apple's MPS."""
    return torch.channels_last if device.type in ("cuda", "cpu") else torch.contiguous_format


class Classifier(nn.Module, Pretrained):
    """Images (B, in_channels, H, W) in [−1, 1] → logits (B, num_classes). ``features`` gives what the last layer sees,
    (B, num_features): the mean over positions of the last convolution's output. Made for 28×28.
    """

    shipped = SHIPPED_WEIGHTS / "classifier"

    def __init__(self, in_channels: int = 1, num_classes: int = 10, num_features: int = 96):
        super().__init__()
        check_counts(in_channels=in_channels, num_classes=num_classes, num_features=num_features)
        self.config = {"in_channels": in_channels, "num_classes": num_classes, "num_features": num_features}
        self.in_channels, self.num_classes, self.num_features = in_channels, num_classes, num_features

        def conv(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *conv(in_channels, 32), nn.MaxPool2d(2),
            *conv(32, 64), nn.MaxPool2d(2),
            *conv(64, num_features), *conv(num_features, num_features),
        )  # fmt: skip
        self.head = nn.Linear(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(x), 0.2, self.training))

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, num_features) and logits (N, num_classes) of uint8 images (N, C, H, W)."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be uint8 (N, {self.in_channels}, H, W), got {tuple(images.shape)}")
        device = self.head.weight.device
        features = self.features(to_model_range(images).to(device, memory_format=_layout(device)))
        return features, self.head(features)


class NoisyClassifier(nn.Module, Pretrained):
    """log p(label | x_t) up to a constant, at every t: x_t (B, in_channels, S, S), t (B,) → logits (B, num_classes).

    The way down of the U-Net (chapter 4), as in Dhariwal, Nichol, 2021, section 4. Then one linear layer over all
    positions, not over their mean: garments lie in one place. S, the ``image_size``, must be divisible by 4.
    """

    shipped = SHIPPED_WEIGHTS / "noisy_classifier"

    def __init__(self, in_channels: int = 1, num_classes: int = 10, channels: int = 32, image_size: int = 28):
        super().__init__()
        check_counts(in_channels=in_channels, num_classes=num_classes, channels=channels, image_size=image_size)
        if image_size % 4 or channels % 2:
            wanted = "image_size must be a multiple of 4 and channels of 2"
            raise ValueError(f"{wanted}, got {image_size} and {channels}")
        self.config = {
            "in_channels": in_channels, "num_classes": num_classes, "channels": channels, "image_size": image_size
        }  # fmt: skip
        self.channels, emb_channels = channels, 4 * channels
        self.image_shape = (in_channels, image_size, image_size)
        self.time_mlp = nn.Sequential(
            nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.conv_in = nn.Conv2d(4 * in_channels, channels, 3, padding=1)
        self.fine = ResidualBlock(channels, channels, emb_channels)
        self.downsample = Downsample(channels, 2 * channels)
        self.coarse = ResidualBlock(2 * channels, 2 * channels, emb_channels)
        self.norm_out = group_norm(2 * channels)
        self.head = nn.Linear(2 * channels * (image_size // 4) ** 2, num_classes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        if x_t.shape[1:] != self.image_shape or t.shape != x_t.shape[:1]:
            wanted = f"(B, {', '.join(map(str, self.image_shape))}) and t (B,)"
            raise ValueError(f"x_t must be {wanted}, got {tuple(x_t.shape)} and {tuple(t.shape)}")
        emb = self.time_mlp(sinusoidal_embedding(t, self.channels))
        x = F.pixel_unshuffle(x_t, 2)  # (B, 4·in_channels, H/2, W/2)
        x = self.downsample(self.fine(self.conv_in(x), emb))
        x = self.coarse(x, emb)
        return self.head(F.silu(self.norm_out(x)).flatten(1))


class InceptionV3:
    """The judge of papers: Inception-v3 as torch-fidelity ports it, 2,048 features and the 1,008 classes of ImageNet.

    Needs the package torch-fidelity, and the network once for the weights. Scales images to 299×299; grey ones become
    three equal channels. ValueError where torch-fidelity is not installed.
    """

    num_features = 2048

    def __init__(self, device: torch.device | str = "cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise ValueError("Inception-v3 needs another package: pip install torch-fidelity") from error
        self.device = device
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device)

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 2048) and logits (N, 1008) of uint8 images (N, 1 or 3, H, W)."""
        return self.network(images.expand(-1, 3, -1, -1).contiguous().to(self.device))


def train_classifier(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_epochs: int = 8,
    batch_size: int = 128,
    diffusion: GaussianDiffusion | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Train on uint8 ``images`` (N, C, H, W) and ``labels`` (N,), half of the images mirrored. Yields (step, loss).

    With a ``diffusion`` the ``model(x_t, t)`` is a noise-aware one (chapter 7): each image gets the noise of a random
    t. AdamW, the learning rate in one cycle. The model is in evaluation mode at the end. Flips are right here, where a
    mirrored shoe is still a shoe, though they would be wrong for the generative model.
    """
    device = next(model.parameters()).device
    num_steps = num_epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=num_steps)
    generator, batches = seeded_generator(0, 1), batch_indices(len(images), batch_size, seed=0)
    model.train().to(memory_format=_layout(device))
    for step in range(1, num_steps + 1):
        index = next(batches)
        x = to_model_range(images[index])
        flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flip, x.flip(-1), x)
        inputs = [x]
        if diffusion is not None:
            t = torch.randint(1, diffusion.num_timesteps + 1, x.shape[:1], generator=generator)
            inputs = [diffusion.q_sample(x, t, torch.randn(x.shape, generator=generator)), t]
        logits = model(*(part.to(device) for part in inputs))
        loss = F.cross_entropy(logits, labels[index].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield step, loss.detach()
    model.eval()


class Seen(NamedTuple):
    """What a classifier sees in N images: ``features`` (N, D) and ``logits`` (N, K), on the CPU."""

    features: Tensor
    logits: Tensor


@torch.no_grad()
def look(images: Tensor, judge: Classifier | InceptionV3 | None = None, batch_size: int = 500) -> Seen:
    """Features and logits of uint8 images (N, C, H, W), by the shipped classifier unless another judge is given."""
    judge = Classifier.from_pretrained() if judge is None else judge
    if getattr(judge, "training", False):  # dropout and batch statistics would see other things
        raise ValueError("the judge is in training mode: call its eval() first")
    parts = [[seen.cpu() for seen in judge.judge(batch)] for batch in images.split(batch_size)]
    return Seen(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Given(nn.Identity):
    """Hands torchmetrics the features as they are, so that each image goes through the classifier once."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features (N, D) and (M, D), each with more than D rows:
    ‖μ − m‖² + tr(C + S − 2 (CS)^½) (Heusel et al., 2017, arXiv:1706.08500, eq. 6). Biased upwards by about 1/N.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import, so only where it is used

    _check_features(real, generated, least=real.shape[-1] + 1)
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.update(real.cpu().double(), real=True)  # Apple's GPUs have no float64
    metric.update(generated.cpu().double(), real=False)
    return metric.compute().item()


def kernel_distance(real: Tensor, generated: Tensor, num_subsets: int = 20, seed: int = 0) -> tuple[float, float]:
    """Kernel distance (KID: squared MMD, cubic kernel; Bińkowski et al., 2018, arXiv:1801.01401): its mean and standard
    deviation over random subsets of up to 1,000 features of (N, D), (M, D). Unbiased for independent images, whatever
    their number; sets with as many of each class are not independent, and come out a little too small.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    _check_features(real, generated, least=2)
    size = min(1000, len(real), len(generated))
    with _seeded_and_quiet(seed):
        metric = KernelInceptionDistance(feature=_Given(real.shape[1]), subsets=num_subsets, subset_size=size)
        metric.update(real.cpu(), real=True)
        metric.update(generated.cpu(), real=False)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def inception_score(logits: Tensor) -> float:
    """exp E KL(p(y | x) ‖ p(y)) of logits (N, K) (Salimans et al., 2016, arXiv:1606.03498): from 1 (every image says
    the same) to K (each image certain, the classes equally frequent). One split: all images together."""
    from torchmetrics.image.inception import InceptionScore

    with _seeded_and_quiet(0):  # it shuffles, which matters for several splits only
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=1)
        metric.update(logits.cpu().double())
        return metric.compute()[0].item()


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision: the share of generated features (M, D) that fall inside the real ones' region; recall: the share of
    real features (N, D) inside the generated ones'. A set's region is the union of balls around its points, each
    reaching to its k-th nearest neighbour in the set (Kynkäänniemi et al., 2019, arXiv:1904.06991, eqs. 1, 2).
    Use N = M: a ball shrinks as its set grows.
    """
    _check_features(real, generated, least=k + 1)

    def inside(points: Tensor, centres: Tensor) -> float:
        radii = _reach(centres, k)
        within = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(1000)]
        return torch.cat(within).cpu().double().mean().item()

    return inside(generated, real), inside(real, generated)


def density_coverage(real: Tensor, generated: Tensor, k: int = 5) -> tuple[float, float]:
    """Balls around the real features (N, D) only, so that no stray sample has one (Naeem et al., 2020,
    arXiv:2002.09797, eqs. 4, 6). Density: how many balls a generated feature (M, D) lies in, over k, so that it may
    exceed 1; coverage: the share of balls that hold a generated feature. Of one law and N = M, 1 and nearly 1 − 1/2ᵏ.
    """
    _check_features(real, generated, least=k + 1)
    radii = _reach(real, k)
    inside = torch.cat([torch.cdist(part, real) <= radii for part in generated.split(1000)])  # (M, N)
    return inside.sum().item() / (k * len(generated)), inside.any(0).cpu().double().mean().item()


def _reach(points: Tensor, k: int) -> Tensor:
    """The distance of each of the points (N, D) to its k-th nearest neighbour among the others, (N,)."""
    return torch.cat([torch.cdist(part, points).kthvalue(k + 1).values for part in points.split(1000)])


def label_agreement(logits: Tensor, labels: Tensor) -> float:
    """The share of images that the classifier gives the label they were made for. logits (N, K), labels (N,)."""
    return (logits.argmax(1).cpu() == labels.cpu()).double().mean().item()


def sample_figures(seen: Seen, labels: Tensor | None, reference: Seen, seed: int = 0) -> dict[str, float]:
    """Every figure of N images made for ``labels`` (N,), beside ``reference`` images (training images, at least N).

    Distances are to all of the reference; precision, recall, density and coverage to N of them, chosen at random: give
    each set its own ``seed``, and a spread over sets has the reference's share in it. Without labels, or for a judge
    with other classes, there is no label agreement.
    """
    count = len(seen.features)
    if len(reference.features) < count:
        raise ValueError(f"{count} images need as many for reference, got {len(reference.features)}")
    chosen = torch.randperm(len(reference.features), generator=seeded_generator(seed))[:count]
    precision, recall = precision_recall(reference.features[chosen], seen.features)
    density, coverage = density_coverage(reference.features[chosen], seen.features)
    figures = {
        "frechet_distance": frechet_distance(reference.features, seen.features),
        "kernel_distance": kernel_distance(reference.features, seen.features, seed=seed)[0],
        "inception_score": inception_score(seen.logits),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }
    return figures if labels is None else figures | {"label_agreement": label_agreement(seen.logits, labels)}


def balanced_subset(labels: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Indices (count,) of a random subset with as many of each label (N,) as there are, within one; uneven classes
    alone would add distance."""
    order = torch.randperm(len(labels), generator=generator)
    # the first of its class, the second, …
    rank = F.one_hot(labels[order]).cumsum(0).gather(1, labels[order][:, None])[:, 0]
    return order[rank.argsort(stable=True)[:count]]


def spread(sets: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation of each figure over several sets; the deviation of one set is None."""
    table = {name: [figures[name] for figures in sets] for name in sets[0]}
    return {
        name: {"mean": statistics.mean(v), "deviation": statistics.stdev(v) if len(v) > 1 else None}
        for name, v in table.items()
    }


def of_subsets(figures: Callable[[Tensor, int], dict], labels: Tensor, count: int, seed: int) -> dict:
    """The ``spread`` of ``figures(indices, seed)`` over random subsets of ``count`` images with these labels, classes
    alike, each with another seed: the figures of real images, which those of as many samples stand beside. One subset,
    where it takes all images."""
    subsets = range(REAL_SUBSETS if count < len(labels) else 1)
    return spread([figures(balanced_subset(labels, count, seeded_generator(seed, i)), seed + i) for i in subsets])


def real_figures(test: ImageData, reference: Seen, count: int, seed: int = 0, judge: Classifier | None = None) -> dict:
    """``of_subsets`` of what a judge (default: the shipped one) sees in real test images; each image is seen once."""
    held_out = look(test.images, judge)

    def figures(chosen: Tensor, seed: int) -> dict[str, float]:
        return sample_figures(Seen(*(seen[chosen] for seen in held_out)), test.labels[chosen], reference, seed)

    return of_subsets(figures, test.labels, count, seed)


def accuracy_trained_on(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> float:
    """A new classifier learns from these uint8 images (N, C, H, W) and labels (N,); its accuracy on the test images.
    Missing kinds of images cost accuracy, and so do wrong ones (Ravuri, Vinyals, 2019, arXiv:1905.10887)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(in_channels=images.shape[1])
        deque(train_classifier(model, images, labels, batch_size=min(128, len(images))), maxlen=0)
    return label_agreement(look(test_images, model).logits, test_labels)


def nearest_neighbours(queries: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the uint8 ``queries`` (Q, C, H, W) its nearest among ``images`` (N, C, H, W) in pixels: root mean
    square differences in grey levels (Q,), and indices (Q,)."""
    if queries.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"queries and images must have one shape, got {tuple(queries.shape[1:])} and {tuple(images.shape[1:])}"
        )
    flat, found = queries.flatten(1).float(), []
    for part in images.split(10_000):
        found.append(torch.cdist(flat, part.flatten(1).float()).min(1))
    distances = torch.stack([part.values for part in found])  # (parts, Q)
    which = distances.argmin(0)
    indices = torch.stack([part.indices + 10_000 * i for i, part in enumerate(found)]).gather(0, which[None])[0]
    apart = flat - images[indices].flatten(1).float()  # cdist goes by products, and does not give a copy exactly 0
    return apart.square().mean(1).sqrt(), indices


def nearest_figures(images: Tensor, training_images: Tensor, seed: int = 0) -> dict[str, float]:
    """How near 1,000 of the uint8 ``images`` (N, C, H, W), chosen at random, come to their nearest training images, in
    grey levels: the median, and the distance that 1 percent stay below, which shows a model that copies now and then.
    """
    chosen = torch.randperm(len(images), generator=seeded_generator(seed))[:1000]
    distances, _ = nearest_neighbours(images[chosen], training_images)
    return {"nearest_1_percent": distances.quantile(0.01).item(), "nearest_median": distances.median().item()}


def _check_features(real: Tensor, generated: Tensor, least: int) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {tuple(real.shape)} and {tuple(generated.shape)}")
    if min(len(real), len(generated)) < least:
        raise ValueError(f"at least {least} images are needed on each side, got {len(real)} and {len(generated)}")
    if not (real.isfinite().all() and generated.isfinite().all()):
        raise ValueError("features must be finite numbers")


@contextlib.contextmanager
def _seeded_and_quiet(seed: int):
    """torchmetrics draws from the global generator: lend it one that is seeded, then give it back. It also warns that
    it keeps all features, and of a deviation over one split: both are meant."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        yield
