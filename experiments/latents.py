"""Diffusion on latents beside diffusion on pixels, for chapter 12: python -m experiments.latents --out FOLDER [--help].

Trains an autoencoder for a third of ``--seconds``, a U-Net on its latents for the rest, and the shipped U-Net on pixels
for as many seconds as both together; a second is one of training, without reading, compiling and starting. Each draws
as many images, and the shipped classifier judges them, and the autoencoder's reconstructions of the test images.

To ship them, copy FOLDER/autoencoder and FOLDER/diffusion into ``ddpm_tutorial/weights/latents``, and
FOLDER/latents.json into ``ddpm_tutorial/results``. Networks and rows that are there are not made again; all weights are
kept, and judged, in 16 bits.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_tutorial.checkpoint import TrainState
from ddpm_tutorial.command.arguments import Parser
from ddpm_tutorial.data import ImageData, load_fashion_mnist, seeded_generator, to_model_range, to_uint8
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.elbo import discretized_gaussian_log_likelihood
from ddpm_tutorial.files import written_aside
from ddpm_tutorial.guidance import classifier_free
from ddpm_tutorial.latents import KL_WEIGHT, Autoencoder, kl_to_standard, train_autoencoder
from ddpm_tutorial.metrics import Classifier, Seen, look, real_figures, sample_figures
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.sampling import sample_dpmpp_2m
from ddpm_tutorial.settings import SEED, TEXT, TrainConfig, number, one_of, whole
from ddpm_tutorial.training import processes, train
from ddpm_tutorial.unet import UNet

from .benchmark.measure import ENDLESS, pace, synchronise
from .benchmark.peers import operations, operations_of, parameters, shipped_config
from .common import Table, fingerprint, outcome, parsed_for_device

MODELS = ("latent", "pixel")
AUTOENCODER_SHARE = 1 / 3  # of the seconds
AUTOENCODER_LR = 2e-3
LATENT_UNET = {"in_channels": 4, "channel_mults": [1], "attention_levels": [0], "num_classes": 10}
NOTE = "training.json"  # beside a network's weights: it is complete
NUM_STEPS, BATCH_SIZE = 20, 250  # of DPM-Solver++(2M); images drawn together


# ------------------------------------------------------------------------------------------------- training
def steps_for(seconds: float, begin: Callable[[int], Iterator]) -> int:
    """How many steps of the loop ``begin(number of steps)`` these seconds allow. It runs the first few."""
    return max(2, int(seconds / pace(begin(ENDLESS), seconds / 20, processes().device)[1]))


def run_through(states: Iterator) -> tuple[Any, float]:
    """The last state of a loop, and its seconds, as if the first step had taken no longer than the others."""
    count, last = 1, next(states)
    synchronise(processes().device)
    began = time.perf_counter()
    for state in states:
        count, last = count + 1, state
    synchronise(processes().device)
    return last, (time.perf_counter() - began) * count / max(1, count - 1)


def told(folder: Path) -> dict:
    return json.loads((folder / NOTE).read_text(encoding="utf-8"))


def kept(network: Autoencoder | NoisePredictor, folder: Path, **note) -> Autoencoder | NoisePredictor:
    """The network as it is read again, its weights in 16 bits; beside them, how it was trained."""
    part = network.unet if isinstance(network, NoisePredictor) else network  # the schedule keeps its 64 bits
    part.half()
    network.save_pretrained(folder)
    with written_aside(folder / NOTE) as aside:
        aside.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    return type(network).from_pretrained(folder).to(processes().device)


def trained_autoencoder(
    folder: Path, images: Tensor, seconds: float, num_train_steps: int | None, options: dict
) -> Autoencoder:
    device = processes().device
    how = {"batch_size": options["batch_size"], "lr": AUTOENCODER_LR, "kl_weight": KL_WEIGHT, "seed": options["seed"]}

    def begin(steps: int) -> Iterator[Autoencoder]:
        torch.manual_seed(options["seed"])
        model = Autoencoder().to(device)
        loop = train_autoencoder(model, images, steps, **how)
        while True:
            with torch.autocast(device.type, torch.bfloat16):
                if next(loop, None) is None:
                    return
            yield model

    steps = num_train_steps or steps_for(seconds, begin)
    model, seconds = run_through(begin(steps))
    model.half().float().fit_scale(images)  # that of the weights that are kept
    config = {"num_train_steps": steps, "precision": "bf16"} | how
    return kept(model, folder, config=config, seconds=seconds, device=device.type)


def trained_diffusion(
    folder: Path, unet: dict, train_set: ImageData, autoencoder: Autoencoder | None, seconds: float,
    num_train_steps: int | None, options: dict,
) -> NoisePredictor:  # fmt: skip
    """On the images of the training set, or on their latents."""
    data = train_set.images if autoencoder is None else autoencoder.encode_images(train_set.images)

    def begin(steps: int) -> Iterator[TrainState]:
        torch.manual_seed(options["seed"])
        network, diffusion = UNet(**unet), GaussianDiffusion.from_schedule()
        model = NoisePredictor(network, diffusion, "v", data.shape[1:], train_set.class_names)
        return train(model, data, train_set.labels, config(steps))

    def config(steps: int) -> TrainConfig:
        return TrainConfig(steps, warmup_steps=min(TrainConfig().warmup_steps, steps // 10), **options)

    steps = num_train_steps or steps_for(seconds, begin)
    last, seconds = run_through(begin(steps))
    last.check()
    device = last.model.device
    return kept(last.ema.module, folder, config=asdict(config(steps)), seconds=seconds, device=device.type)


def networks(
    name: str, out: Path, train_set: ImageData, seconds: float, num_train_steps: int | None, channels: int,
    options: dict,
) -> tuple[NoisePredictor, Autoencoder | None]:  # fmt: skip
    """The diffusion and, of the latent model, its autoencoder: trained now, or read where they are."""

    def there_or(make: Callable, network: type, folder: Path, *arguments) -> Any:
        if (folder / NOTE).exists():
            return network.from_pretrained(folder).to(processes().device)
        return make(folder, *arguments, num_train_steps, options)

    share = AUTOENCODER_SHARE * seconds
    if name == "pixel":
        arguments = shipped_config(), train_set, None, seconds
        return there_or(trained_diffusion, NoisePredictor, out / "pixel", *arguments), None
    autoencoder = there_or(trained_autoencoder, Autoencoder, out / "autoencoder", train_set.images, share)
    arguments = LATENT_UNET | {"channels": channels}, train_set, autoencoder, seconds - share
    return there_or(trained_diffusion, NoisePredictor, out / "diffusion", *arguments), autoencoder


# -------------------------------------------------------------------------------------------------- judging
@torch.no_grad()
def draw(model: NoisePredictor, labels: Tensor, seed: int, autoencoder: Autoencoder | None = None) -> Tensor:
    """An image for each label, uint8 (N, 1, 28, 28); with an autoencoder, it decodes what the model draws."""
    images = []
    for i, batch in enumerate(labels.split(BATCH_SIZE)):
        noise_model = classifier_free(model, batch.to(model.device))
        *_, last = sample_dpmpp_2m(
            noise_model, model.diffusion, (len(batch), *model.image_shape), num_inference_steps=NUM_STEPS,
            clip_denoised=autoencoder is None, generator=seeded_generator(seed, i, device=model.device),
        )  # fmt: skip
        images.append(to_uint8(last.x_t if autoencoder is None else autoencoder.decode(last.x_t)))
    return torch.cat(images).cpu()


def judged(
    model: NoisePredictor, autoencoder: Autoencoder | None, num_images: int, seed: int, judge: Classifier,
    reference: Seen,
) -> dict:  # fmt: skip
    labels = torch.arange(num_images) % model.num_classes
    draw(model, labels[:BATCH_SIZE], seed, autoencoder)  # outside the clock
    synchronise(model.device)
    began = time.perf_counter()
    images = draw(model, labels, seed, autoencoder)
    seconds = (time.perf_counter() - began) / num_images
    return sample_figures(look(images, judge), labels, reference, seed) | {"seconds_an_image": seconds}


@torch.no_grad()
def reconstruction(autoencoder: Autoencoder, test: ImageData, judge: Classifier, reference: Seen, seed: int) -> dict:
    """What comes back of the test images from the mean of q(z | x): the error in grey levels, and what the judge sees.
    And the bound on −log p(x) in bits/dim, z drawn, with the one width of the decoder that is best for it."""
    back, pairs, nats = [], [], 0.0
    generator, device = seeded_generator(seed, device=processes().device), processes().device
    for part in test.images.split(500):
        x = to_model_range(part.to(device))
        back.append(to_uint8(autoencoder.decode(autoencoder.encode(x))).cpu())
        shape = (len(x), autoencoder.latent_channels, x.shape[2] // 4, x.shape[3] // 4)
        found, mean, log_variance = autoencoder(x, torch.randn(shape, generator=generator, device=device))
        pairs.append((x, found))
        nats += kl_to_standard(mean, log_variance).sum().item()
    images = torch.cat(back)
    error = (images.double() - test.images.double()).square().mean().sqrt().item()
    width, bits = best_width(pairs)
    figures = sample_figures(look(images, judge), test.labels, reference, seed)
    return {
        "rms_grey_levels": error, "kl_nats_an_image": nats / len(images), "decoder_deviation": width,
        "bits_per_dim": bits + nats / math.log(2) / test.images.numel(), **figures,
    }  # fmt: skip


def best_width(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The width of the decoder of section 2.6 that needs the fewest bits for each pixel of x, given what the decoder
    says, and these bits; to 10 percent. It lies above the error's root mean square: black and white pixels, where the
    error is small, cost nearly the same bits at every width."""
    count = sum(x.numel() for x, _ in pairs)
    error = math.sqrt(sum((x - found).square().sum().item() for x, found in pairs) / count)

    def bits(width: float) -> float:
        log_scale = torch.tensor(math.log(width), device=pairs[0][0].device)
        total = sum(discretized_gaussian_log_likelihood(*pair, log_scale).sum().item() for pair in pairs)
        return -total / count / math.log(2)

    fewest, width = min((bits(width), width) for width in (error * 1.1**k for k in range(-2, 9)))
    return width, fewest


def costs(out: Path, model: NoisePredictor, autoencoder: Autoencoder | None) -> dict:
    """Of training, and of one evaluation of one image; operations as ``benchmark`` counts them."""
    folders = [out / "pixel"] if autoencoder is None else [out / "autoencoder", out / "diffusion"]
    notes = {folder.name: told(folder) for folder in folders}
    unet = UNet(**model.unet.config)  # on the CPU
    figures = {
        "training_seconds": {name: note["seconds"] for name, note in notes.items()},
        "num_train_steps": {name: note["config"]["num_train_steps"] for name, note in notes.items()},
        "trained_on": {name: note["device"] for name, note in notes.items()},
        "weights": {folder.name: fingerprint(folder) for folder in folders},
        "parameters": parameters(unet), "operations": operations(unet, model.image_shape),
    }  # fmt: skip
    if autoencoder is None:
        return figures
    own, shape = Autoencoder(**autoencoder.config), (1, 28, 28)
    return figures | {
        "autoencoder_parameters": parameters(own),
        "encoder_operations": operations_of(lambda: own.encode(torch.zeros(1, *shape))),
        "decoder_operations": operations_of(lambda: own.decode(torch.zeros(1, *model.image_shape))),
    }


def run(
    out: Path, seconds: float, num_train_steps: int | None, models: list[str], batch_size: int, channels: int,
    num_images: int, seed: int, compile: bool, data: str | None = None,
) -> None:  # fmt: skip
    device = processes().device
    out.mkdir(parents=True, exist_ok=True)
    train_set, test = load_fashion_mnist("train", data), load_fashion_mnist("test", data)
    judge = Classifier.from_pretrained().to(device)
    if not judge.num_features < num_images <= len(test.images):
        least, most = judge.num_features + 1, len(test.images)
        raise ValueError(f"--num-images must lie in {least} … {most} for this data, got {num_images}")
    length = f"--num-train-steps {num_train_steps}" if num_train_steps else f"--seconds {seconds:g}"
    command = (f"python -m experiments.latents {length}{' --compile' * compile} --batch-size {batch_size} "
               f"--channels {channels} --num-images {num_images} --seed {seed} --out FOLDER --data SOURCE")  # fmt: skip
    precision = "bf16" if device.type == "cuda" else "no"
    options = {"batch_size": batch_size, "seed": seed, "precision": precision, "compile": compile}
    settings = {
        "seconds": None if num_train_steps else seconds, "num_train_steps": num_train_steps,
        **options, "channels": channels,
        "num_images": num_images, "sampler": "dpmpp-2m", "num_inference_steps": NUM_STEPS,
        "num_train_images": len(train_set.images), "device": device.type, "classifier": fingerprint(Classifier.shipped),
    }  # fmt: skip
    table = Table(out / "latents.json", command, settings, [{"model": name} for name in MODELS])
    table.write()  # from here on the folder's networks have these settings
    table.missing = [job for job in table.missing if job["model"] in models]
    trained = {
        job["model"]: networks(job["model"], out, train_set, seconds, num_train_steps, channels, options)
        for job in table.missing
    }  # all of them, before any is judged
    reference = look(train_set.images, judge)
    for name, count in (("real", num_images), ("real_test_set", len(test.images))):
        if name not in table:
            table[name] = real_figures(test, reference, count, seed, judge)

    def row(job: dict) -> dict:
        model, autoencoder = trained[job["model"]]
        figures = costs(out, model, autoencoder) | judged(model, autoencoder, num_images, seed, judge, reference)
        if autoencoder is not None:
            figures["reconstruction"] = reconstruction(autoencoder, test, judge, reference, seed)
        return figures

    table.fill(row)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.latents", description="Diffusion on latents beside pixels.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for weights and results")
    parser.add_argument("--data", type=TEXT, metavar="SOURCE", help="Fashion-MNIST: hub, sample or a folder")
    parser.add_argument("--seconds", type=number("above 0", lambda s: s > 0), default=60, metavar="S",
                        help="of training, for each model (default: 60)")  # fmt: skip
    parser.add_argument("--num-train-steps", type=whole(2), metavar="N", help="of each network, instead of seconds")
    parser.add_argument("--models", type=one_of(*MODELS), nargs="+", default=MODELS, metavar="NAME",
                        help="the rows: latent, pixel or both (default: both)")  # fmt: skip
    batch_size = 512 if torch.cuda.is_available() else TrainConfig().batch_size
    parser.add_argument("--batch-size", type=whole(), default=batch_size, metavar="N",
                        help=f"of every network (default: {batch_size} here)")  # fmt: skip
    parser.add_argument("--channels", type=whole(), default=64, metavar="N",
                        help="width of the U-Net on latents (default: 64)")  # fmt: skip
    parser.add_argument("--num-images", type=whole(), default=2000, metavar="N", help="samples a row (default: 2000)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of training and sampling (default: 0)")
    parser.add_argument("--compile", action="store_true", help="torch.compile both U-Nets: a minute before training")
    args = parsed_for_device(parser, argv)
    del args["device"]  # processes() has it
    return outcome(parser.prog, lambda: run(**args), args["out"])


if __name__ == "__main__":
    sys.exit(main())
