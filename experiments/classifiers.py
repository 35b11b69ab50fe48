"""Train the two shipped classifiers: python -m experiments.classifiers --data SOURCE [--noisy] [--help].

Without --noisy the one that judges samples (chapter 8), with it the one that guides a sampler (chapter 7): it knows
noisy images at every timestep. Writes ddpm_tutorial/weights/classifier or noisy_classifier.
"""

import sys

import torch
from tqdm.auto import tqdm

from ddpm_tutorial.command.arguments import Parser
from ddpm_tutorial.data import ImageData, load_fashion_mnist, seeded_generator, to_model_range
from ddpm_tutorial.diffusion import GaussianDiffusion
from ddpm_tutorial.files import written_aside
from ddpm_tutorial.metrics import Classifier, NoisyClassifier, label_agreement, look, train_classifier
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.settings import TEXT, whole

CARD = """# {title}

A small convolutional network, {parameters:,} parameters, trained on Fashion-MNIST's {images:,} training images for
{epochs} epochs by

    python -m experiments.classifiers --data SOURCE --epochs {epochs}{flag}

Accuracy on the {tests:,} test images: {accuracy}. MIT licence, as the package.
"""


@torch.no_grad()
def noisy_accuracy(model: NoisyClassifier, diffusion: GaussianDiffusion, test: ImageData, t: int) -> float:
    """The share of test images, noised to t, of which the classifier names the class."""
    x_0 = to_model_range(test.images)
    x_t = diffusion.q_sample(x_0, t, torch.randn(x_0.shape, generator=seeded_generator(0, t)))
    logits = torch.cat([model(batch, torch.full((len(batch),), t)) for batch in x_t.split(500)])
    return label_agreement(logits, test.labels)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m experiments.classifiers", description="Train a classifier that the package ships.")
    parser.add_argument(
        "--data", type=TEXT, required=True, metavar="SOURCE", help="'hub', 'sample', or a folder of IDX files"
    )
    parser.add_argument("--epochs", type=whole(), default=15, metavar="N", help="(default: 15)")
    parser.add_argument("--noisy", action="store_true", help="the one that guides, of noisy images")
    args = parser.parse_args(argv)
    try:
        train, test = (load_fashion_mnist(split, args.data) for split in ("train", "test"))
    except (ValueError, OSError) as error:
        parser.error(f"{error}")
    torch.manual_seed(0)
    if args.noisy:
        model, diffusion = NoisyClassifier(), NoisePredictor.from_pretrained().diffusion
        title = "The classifier of noisy images that guides a sampler (chapter 7)"
    else:
        model, diffusion = Classifier(), None
        title = "The classifier that looks at samples (chapter 8)"
    steps = train_classifier(model, train.images, train.labels, args.epochs, diffusion=diffusion)
    for _ in tqdm(steps, total=args.epochs * (len(train.images) // 128), mininterval=1):
        pass
    if args.noisy:
        shares = {t: noisy_accuracy(model, diffusion, test, t) for t in (1, 100, 200, 400, 600, 800, 1000)}
        accuracy = ", ".join(f"{share:.1%} at t = {t}" for t, share in shares.items())
    else:
        accuracy = f"{label_agreement(look(test.images, model).logits, test.labels):.2%}"
    model.shipped.mkdir(exist_ok=True)
    model.save_pretrained(model.shipped)
    with written_aside(model.shipped / "README.md") as aside:
        card = {"title": title, "images": len(train.images), "tests": len(test.images), "epochs": args.epochs}
        parameters = sum(p.numel() for p in model.parameters())
        flag = " --noisy" * args.noisy
        aside.write_text(CARD.format(**card, parameters=parameters, flag=flag, accuracy=accuracy), encoding="utf-8")
    print(f"accuracy on test images: {accuracy}\nwrote {model.shipped}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
