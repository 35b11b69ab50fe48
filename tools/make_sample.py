"""Write the sample of Fashion-MNIST that ships in the package: python tools/make_sample.py SOURCE.

SOURCE is "hub" or a folder of the IDX files. The sample is the first 500 training and the first 100 test images of
each class, in their original order, as PNG in Parquet with the columns that the hub's copy has.
"""

import io
import sys

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from ddpm_tutorial.data import SAMPLE_FOLDER, load_fashion_mnist


def png(image: torch.Tensor) -> dict:
    buffer = io.BytesIO()
    PILImage.fromarray(image.numpy()).save(buffer, "png", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


for split, per_class in (("train", 500), ("test", 100)):
    images, labels, class_names = load_fashion_mnist(split, sys.argv[1])
    first = torch.cat([(labels == c).nonzero().flatten()[:per_class] for c in range(10)]).sort().values
    features = Features({"image": Image(), "label": ClassLabel(names=list(class_names))})
    rows = {"image": [png(images[i, 0]) for i in first], "label": labels[first].tolist()}
    SAMPLE_FOLDER.mkdir(exist_ok=True)
    path = SAMPLE_FOLDER / f"{split}.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    print(f"{path.name}: {len(first)} images, {path.stat().st_size / 1e6:.2f} MB")
