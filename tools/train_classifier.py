"""Train the classifier that judges samples: python tools/train_classifier.py SOURCE [NUM_EPOCHS].

SOURCE is 'hub' or a folder of Fashion-MNIST's IDX files. Writes ddpm_tutorial/weights/classifier.
"""

import sys

import torch
from tqdm.auto import tqdm

from ddpm_tutorial.checkpoint import written_aside
from ddpm_tutorial.data import load_fashion_mnist
from ddpm_tutorial.metrics import SHIPPED_CLASSIFIER, Classifier, label_agreement, look, train_classifier

CARD = """# The classifier that looks at samples (chapter 8)

A small convolutional network, {parameters:,} parameters, trained on Fashion-MNIST's 60,000 training images for
{epochs} epochs by

    python tools/train_classifier.py SOURCE {epochs}

Accuracy on the 10,000 test images: {accuracy:.2%}. MIT licence, as the package.
"""


def main() -> int:
    if not 2 <= len(sys.argv) <= 3:
        print("usage: train_classifier.py SOURCE [NUM_EPOCHS]", file=sys.stderr)
        return 2
    source, epochs = sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else 15
    train, test = (load_fashion_mnist(split, source) for split in ("train", "test"))
    torch.manual_seed(0)
    model = Classifier()
    steps = train_classifier(model, train.images, train.labels, epochs)
    for _ in tqdm(steps, total=epochs * (len(train.images) // 128)):
        pass
    accuracy = label_agreement(look(test.images, model).logits, test.labels)
    SHIPPED_CLASSIFIER.mkdir(exist_ok=True)
    model.save_pretrained(SHIPPED_CLASSIFIER)
    with written_aside(SHIPPED_CLASSIFIER / "README.md") as aside:
        parameters = sum(p.numel() for p in model.parameters())
        aside.write_text(CARD.format(parameters=parameters, epochs=epochs, accuracy=accuracy))
    print(f"test accuracy {accuracy:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
