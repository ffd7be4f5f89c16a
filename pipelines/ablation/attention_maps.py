"""Figure 4 for one model: where its chorus tokens look in test images, with coverage and overlap over many of them.

The numbers and what they mean are in ``crem.model.maps``; here are the images: queries of the test rows that are one
image and nothing else, each once, in an even spread that is the same for every model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crem.data.items import Item
from pipelines.tables.prepared import PreparedRows

if TYPE_CHECKING:
    import crem
    from crem.model.maps import ImageMaps

__all__ = ["measure_maps", "test_images"]

_SHOWN = 5
"""Images whose maps are kept to be drawn."""
_BATCH = 16


def test_images(rows: PreparedRows, most: int) -> list[int]:
    """Ids of at most ``most`` distinct images that stand alone as a query, an even spread."""
    alone: dict[int, None] = {}
    for side in rows.table.column("query").to_pylist():
        if side is not None and len(side["images"] or ()) == 1 and not side["text"]:
            alone.setdefault(side["images"][0])
    ids = sorted(alone)
    return [ids[i] for i in np.linspace(0, len(ids) - 1, min(most, len(ids))).astype(int)]


def measure_maps(model: crem.Crem, rows: PreparedRows, most: int) -> dict[str, Any]:
    """Coverage, overlap and image share, means over the test images, and the maps of a few.

    Returns:
        ``images`` (their number), ``coverage``, ``overlap`` (None for one chorus token) and ``image_share`` of the
        mean of all layers; the same three for every layer alone, ``by_layer``; and ``shown``: for each of a few
        images its ``image`` id, its own numbers and ``maps`` [K][height][width].
    """
    from crem.model.maps import chorus_attention, image_maps

    ids = test_images(rows, most)
    shown_at = set(np.linspace(0, len(ids) - 1, min(_SHOWN, len(ids))).astype(int).tolist())
    each: list[dict[str, Any]] = []
    by_layer: dict[int, list[dict[str, Any]]] = {}
    shown: list[dict[str, Any]] = []
    for start in range(0, len(ids), _BATCH):
        some = ids[start : start + _BATCH]
        sequences = [
            model.collator.prepare(Item(images=(rows.image(i),)), chorus_tokens=model.chorus_tokens or None)
            for i in some
        ]
        batch = model.collator.pad(sequences).to(model.device)
        attention_BLHKT = chorus_attention(model.model, batch)
        for layer in range(attention_BLHKT.shape[1]):
            alone = image_maps(model.model, batch, attention_BLHKT, layers=[layer])
            by_layer.setdefault(layer, []).extend(map(_figures, alone))
        made = image_maps(model.model, batch, attention_BLHKT)
        for number, (image, sequence, maps) in enumerate(zip(some, sequences, made, strict=True), start):
            figures = _figures(maps)
            each.append(figures)
            if number in shown_at:
                _, height, width = sequence.grids[0]
                side = model.collator.processor.merge_size
                grid = maps.maps_Kn.cpu().view(-1, height // side, width // side)
                shown.append({"image": image, **figures, "maps": np.round(grid.numpy().astype(float), 5).tolist()})
    layers = [_means(by_layer[layer]) for layer in sorted(by_layer)]
    return {"images": len(ids), **_means(each), "by_layer": layers, "shown": shown}


def _figures(maps: ImageMaps) -> dict[str, float | None]:
    from crem.model.maps import coverage, overlap

    return {"coverage": coverage(maps.maps_Kn), "overlap": overlap(maps.maps_Kn), "image_share": maps.share}


def _means(each: list[dict[str, Any]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in ("coverage", "overlap", "image_share"):
        values = [figures[name] for figures in each]
        means[name] = None if not values or None in values else float(np.mean(values))
    return means
