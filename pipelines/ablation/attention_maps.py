"""Figure 4 for one model: where its chorus tokens look in test images, with coverage and overlap over many of them.

The figures are defined in ``crem.model.maps``; the images are queries of the test rows that are one image and nothing
else, each once, in an even spread that is the same for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter

from crem.data.items import Item
from pipelines.tables.prepared import PreparedRows

if TYPE_CHECKING:
    import crem
    from crem.model.maps import ImageMaps

__all__ = ["AttentionMaps", "ImageExample", "MapFigures", "measure_maps", "test_images"]

_EXAMPLES = 5
"""Images whose maps are kept to be drawn."""
_BATCH = 16


@dataclass(frozen=True)
class MapFigures:
    """Shares between 0 and 1, of one image or as a mean over images; None where no image has the figure."""

    coverage: float | None
    overlap: float | None
    """None for one chorus token"""
    image_share: float | None


@dataclass(frozen=True)
class ImageExample(MapFigures):
    """One image with the map of every chorus token."""

    image: int
    """image id"""
    maps: list[list[list[float]]]
    """[K][height][width]"""


@dataclass(frozen=True)
class AttentionMaps(MapFigures):
    """Means over the test images, of the mean of all layers and heads."""

    max_images: int
    """the most that were to be measured"""
    images: int
    by_layer: list[MapFigures]
    """the same means for every layer alone"""
    examples: list[ImageExample]

    def to_json(self) -> dict[str, object]:
        tree = asdict(self)
        return {"asked": tree.pop("max_images"), "shown": tree.pop("examples"), **tree}

    @classmethod
    def from_json(cls, tree: dict[str, object]) -> AttentionMaps:
        return _ADAPTER.validate_python({**tree, "max_images": tree["asked"], "examples": tree["shown"]})


_ADAPTER = TypeAdapter(AttentionMaps)


def test_images(rows: PreparedRows, max_images: int) -> list[int]:
    """Ids of at most ``max_images`` distinct images that stand alone as a query, an even spread."""
    alone: dict[int, None] = {}
    for side in rows.table.column("query").to_pylist():
        if side is not None and len(side["images"] or ()) == 1 and not side["text"]:
            alone.setdefault(side["images"][0])
    ids = sorted(alone)
    return [ids[i] for i in np.linspace(0, len(ids) - 1, min(max_images, len(ids))).astype(int)]


def measure_maps(model: crem.Crem, rows: PreparedRows, max_images: int) -> AttentionMaps:
    """Coverage, overlap and image share over at most ``max_images`` test images, and the maps of a few."""
    from crem.model.maps import chorus_attention, image_maps

    ids = test_images(rows, max_images)
    drawn = set(np.linspace(0, len(ids) - 1, min(_EXAMPLES, len(ids))).astype(int).tolist())
    of_images: list[MapFigures] = []
    by_layer: dict[int, list[MapFigures]] = {}
    examples: list[ImageExample] = []
    for start in range(0, len(ids), _BATCH):
        chunk = ids[start : start + _BATCH]
        sequences = [
            model.collator.prepare(Item(images=(rows.image(i),)), chorus_tokens=model.chorus_tokens or None)
            for i in chunk
        ]
        batch = model.collator.pad(sequences).to(model.device)
        attention_BLHKT = chorus_attention(model.model, batch)
        for layer in range(attention_BLHKT.shape[1]):
            of_layer = image_maps(model.model, batch, attention_BLHKT, layers=[layer])
            by_layer.setdefault(layer, []).extend(map(_figures, of_layer))
        of_batch = image_maps(model.model, batch, attention_BLHKT)
        for number, (image, sequence, maps) in enumerate(zip(chunk, sequences, of_batch, strict=True), start):
            figures = _figures(maps)
            of_images.append(figures)
            if number in drawn:
                _, height, width = sequence.grids[0]
                side = model.collator.processor.merge_size
                grid = maps.maps_Kn.cpu().view(-1, height // side, width // side).numpy().astype(float)
                examples.append(ImageExample(**asdict(figures), image=image, maps=np.round(grid, 5).tolist()))
    return AttentionMaps(
        **asdict(_mean(of_images)),
        max_images=max_images,
        images=len(ids),
        by_layer=[_mean(by_layer[layer]) for layer in sorted(by_layer)],
        examples=examples,
    )


def _figures(maps: ImageMaps) -> MapFigures:
    from crem.model.maps import coverage, overlap

    return MapFigures(coverage(maps.maps_Kn), overlap(maps.maps_Kn), maps.share)


def _mean(figures: Sequence[MapFigures]) -> MapFigures:
    """The mean of each figure; None where an image lacks it."""

    def mean(values: list[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return float(np.mean(present)) if present and len(present) == len(values) else None

    return MapFigures(
        mean([f.coverage for f in figures]),
        mean([f.overlap for f in figures]),
        mean([f.image_share for f in figures]),
    )
