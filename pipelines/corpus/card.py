"""``card.html`` of prepared tables: what they hold, as one page that people read before they train on them.

The numbers are those of the manifest and the statistics that preparing left; of the tables themselves only the first
part of the rows is read, and the images of the rows that are shown. The same tables have the same page wherever they
are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from pipelines.corpus.shown_items import Part, Piece, pieces_of, size_text
from pipelines.corpus.table_statistics import Counts, TableStatistics
from pipelines.duplicates.decision_tables import read_clusters
from pipelines.reports.charts import BLUE, INK, axes, svg
from pipelines.reports.pages import data_url, render
from pipelines.tables import schema
from pipelines.tables.image_index import ImageIndex
from pipelines.tables.image_parts import image_places
from pipelines.tables.manifest import FILTER_STAGES, PrepareManifest, table_parts
from pipelines.tables.storage import Folder

__all__ = ["CARD", "write_card"]

CARD = "card.html"
_STAGES = ("read", "parse", "decode", "text", "ids", *FILTER_STAGES)
"""In the order in which a row passes them."""
_SAMPLES = 12
_SAMPLED_ROWS, _SAMPLED_IMAGE_PARTS = 4096, 4
"""The samples are taken from these rows, and from the images of these parts."""
_TEXT = 400
"""Characters of a text that a sample shows."""
_CLUSTERS = 30
_HISTOGRAMS = {
    "image_width": "width of images, pixels",
    "image_height": "height of images, pixels",
    "image_bytes": "size of images, bytes",
    "query_images": "images of a query",
    "query_chars": "query text, characters",
    "target_chars": "target text, characters",
    "question_chars": "question, characters",
    "answer_chars": "answer, characters",
}


@dataclass(frozen=True)
class _Stage:
    """What one stage left out."""

    name: str
    rows_in: int
    rejected: int
    filtered: int
    reasons: str

    @property
    def rows_out(self) -> int:
        return self.rows_in - self.rejected - self.filtered


def write_card(prepared: Folder, manifest: PrepareManifest, statistics: TableStatistics, *, chosen: Folder) -> None:
    """Write the page beside the tables.

    Args:
        chosen: what ``pipelines.duplicates`` wrote; may not exist.
    """
    clusters = read_clusters(chosen, _CLUSTERS)
    prepared.write_bytes(_page(prepared, manifest, statistics, clusters).encode(), CARD)


def _page(prepared: Folder, manifest: PrepareManifest, statistics: TableStatistics, clusters: pa.Table) -> str:
    chosen: dict[str, Any] = {name: value for name, value in manifest.config.items() if isinstance(value, dict)}
    return render(
        "card.html.j2",
        name=manifest.source_uri.rstrip("/").rpartition("/")[2],
        m=manifest,
        s=statistics,
        image_size=size_text(statistics.image_bytes),
        max_pixels=chosen.get("prepare", {}).get("encode_max_pixels", 0),
        stages=_stages(manifest),
        notes=[
            f"{rows:,} rows are of split {split!r}, which no job reads"
            for split, rows in manifest.unread_splits.items()
        ],
        samples=list(_samples(prepared)),
        by_split_task=_largest(statistics.by_split_task),
        by_source=_largest(statistics.by_source),
        histograms=_histograms(statistics),
        clusters=_clusters(clusters),
        mapping=list(_mapping(manifest)),
        settings=[
            (f"{section}.{key}", json.dumps(value, ensure_ascii=False))
            for section, values in chosen.items()
            for key, value in values.items()
        ],
    )


def _stages(manifest: PrepareManifest) -> list[_Stage]:
    """The stages that left something out, in the order in which rows pass them."""
    found, rows = [], manifest.rows_in
    names = [*_STAGES, *(name for name in manifest.by_stage if name not in _STAGES)]
    for name in names:
        reasons = manifest.by_stage.get(name, {})
        if reasons:
            count = sum(reasons.values())
            filtered = count if name in FILTER_STAGES else 0
            text = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items(), key=lambda item: -item[1]))
            found.append(_Stage(name, rows, count - filtered, filtered, text))
            rows = found[-1].rows_out
    return found


def _samples(prepared: Folder) -> Iterator[dict[str, object]]:
    """Rows spread over the beginning of the tables, those whose images stand there too."""
    names = table_parts(prepared, "rows")
    if not names:
        return
    rows = prepared.child("rows")
    with rows.open(names[0]) as file:
        batch = next(pq.ParquetFile(file).iter_batches(_SAMPLED_ROWS), None)
    if batch is None:
        return
    images = prepared.child("images")
    parts = table_parts(prepared, "images")[:_SAMPLED_IMAGE_PARTS]
    index = ImageIndex.of(images, parts, [image_places(images, name) for name in parts])
    known = set(index.ids.tolist())
    candidates = [row for row in batch.to_pylist() if known.issuperset(_named(row))]
    shown = candidates[:: max(1, len(candidates) // _SAMPLES)][:_SAMPLES]
    ids = sorted({image for row in shown for image in _named(row)})
    data = index.fetch(pa.array(ids, pa.int64()).to_numpy()) if ids else {}
    for row in shown:
        yield {"key": row["key"], "parts": list(_parts(row, data))}


def _named(row: schema.ArrowRow) -> list[int]:
    """Images of the query and the target."""
    return [image for side in (row["query"], row["target"]) if side for image in side["images"] or ()]


def _parts(row: schema.ArrowRow, images: dict[int, bytes]) -> Iterator[Part]:
    for name in ("query", "target"):
        side = row[name]
        if side is not None:
            shown = [data_url(images[image]) for image in side["images"] or ()]
            yield Part(name, tuple(pieces_of(side["text"], shown, side["image_at"] or (), limit=_TEXT)))
    for name in ("question", "answer"):
        if row[name] is not None:
            yield Part(name, (Piece(row[name][:_TEXT]),))


def _largest(counts: Counts) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _histograms(statistics: TableStatistics) -> Markup | str:
    drawn = [
        (title, statistics.histograms[name]) for name, title in _HISTOGRAMS.items() if name in statistics.histograms
    ]
    if not drawn:
        return ""
    columns = min(4, len(drawn))
    figure, panels = axes(columns, 2.9 * columns, rows=-(-len(drawn) // columns), height=2.0)
    for panel, (title, counts) in zip(panels, drawn, strict=False):
        panel.bar(range(len(counts)), list(counts.values()), color=BLUE)
        panel.set_xticks(range(len(counts)), [_short(int(bound)) for bound in counts], fontsize=6, rotation=60)
        panel.set_title(title, fontsize=9, color=INK, loc="left")
    for panel in panels[len(drawn) :]:
        panel.set_visible(False)
    figure.subplots_adjust(hspace=0.8, wspace=0.35)
    return svg(figure)


def _clusters(clusters: pa.Table) -> list[dict[str, object]]:
    return [
        {
            "kind": f"{found['kind']}: {found['reason'].replace('_', ' ')}",
            "size": found["size"],
            "examples": ", ".join((found["names"] or [str(i) for i in found["ids"]])[:6]),
        }
        for found in clusters.to_pylist()
    ]


def _mapping(manifest: PrepareManifest) -> Iterator[dict[str, object]]:
    """Every column once for each format."""
    seen = set()
    for layout in manifest.layouts:
        columns: Sequence[dict[str, object]] = layout["columns"]  # type: ignore[assignment]
        for column in columns:
            key = (layout["format"], column["name"])
            if key not in seen:
                seen.add(key)
                yield {**column, "format": layout["format"]}


def _short(number: int) -> str:
    for unit in ("", "k", "M"):
        if number < 1024:
            return f"{number}{unit}"
        number //= 1024
    return f"{number}G"
