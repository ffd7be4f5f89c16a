"""What is in prepared tables, counted part by part: numbers that can be added up, and histograms of them.

The card of a corpus is drawn from these; nothing reads the tables a second time for it. Names that users choose
(sources, tasks, splits) may be as many as the rows: beyond ``MOST_NAMES`` the rarest are counted together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipelines.tables.json_file import JsonFile

__all__ = ["MOST_NAMES", "Counts", "TableStatistics", "is_bounded", "split_tasks", "sum_by_split_task"]

MOST_NAMES = 1000
_OTHER = "(other)"
Counts = dict[str, int]


class TableStatistics(JsonFile):
    """Counts over parts of prepared tables.

    The keys of a histogram are lower bounds: ``"256"`` counts the values from 256 to 511, ``"0"`` the zeros.
    """

    FILE: ClassVar[str] = "statistics.json"

    rows: int = 0
    images: int = 0
    image_bytes: int = 0
    images_shrunk: int = 0
    images_truncated: int = 0
    largest_source_pixels: int = 0
    by_split_task: Counts = Field(default_factory=dict)
    """Rows by ``<split>/<task>``."""
    by_source: Counts = Field(default_factory=dict)
    with_target: int = 0
    with_question: int = 0
    with_negatives: int = 0
    left_out: dict[str, Counts] = Field(default_factory=dict)
    """Rows of the rejected table by stage and reason."""
    histograms: dict[str, Counts] = Field(default_factory=dict)
    """``query_chars``, ``target_chars``, ``question_chars``, ``answer_chars``, ``query_images``; ``image_width``,
    ``image_height``, ``image_bytes``."""

    @classmethod
    def of_rows(cls, rows: pa.Table) -> Self:
        """Of a table of ``schema.ROWS``."""
        texts = {name: _field(rows[name], "text") for name in ("query", "target")}
        texts |= {name: rows[name] for name in ("question", "answer")}
        lengths = {f"{name}_chars": pc.utf8_length(text.drop_null()) for name, text in texts.items()}
        lengths["query_images"] = pc.list_value_length(_field(rows["query"], "images"))
        negatives = pc.fill_null(pc.list_value_length(rows["negatives"]), 0)
        return cls(
            rows=rows.num_rows,
            by_split_task=sum_by_split_task({}, split_tasks(rows)),
            by_source=_sum_by_source({}, _values(rows["source"])),
            with_target=rows.num_rows - rows["target"].null_count,
            with_question=rows.num_rows - rows["question"].null_count,
            with_negatives=int(pc.sum(pc.greater(negatives, 0)).as_py() or 0),
            histograms={name: _histogram(values) for name, values in lengths.items() if len(values)},
        )

    @classmethod
    def of_images(cls, images: pa.Table) -> Self:
        """Of a table of ``schema.IMAGES``."""
        sizes = pc.binary_length(images["bytes"])
        values = {"image_width": images["width"], "image_height": images["height"], "image_bytes": sizes}
        return cls(
            images=images.num_rows,
            image_bytes=int(pc.sum(sizes).as_py() or 0),
            histograms={name: _histogram(column) for name, column in values.items() if len(column)},
        )

    @classmethod
    def of_rejected(cls, rejected: pa.Table) -> Self:
        """Of a table of ``schema.REJECTED``."""
        found: dict[str, Counts] = {}
        pairs = zip(rejected["stage"].to_pylist(), rejected["reason"].to_pylist(), strict=True)
        for (stage, reason), count in sorted(Counter(pairs).items()):
            found.setdefault(stage, {})[reason] = count
        return cls(left_out=found)

    def __add__(self, other: TableStatistics) -> TableStatistics:
        stages = sorted({*self.left_out, *other.left_out})
        kinds = sorted({*self.histograms, *other.histograms})
        images = ("images", "image_bytes", "images_shrunk", "images_truncated")
        numbers = ("rows", *images, "with_target", "with_question", "with_negatives")
        return TableStatistics(
            **{name: getattr(self, name) + getattr(other, name) for name in numbers},
            largest_source_pixels=max(self.largest_source_pixels, other.largest_source_pixels),
            by_split_task=sum_by_split_task(self.by_split_task, other.by_split_task),
            by_source=_sum_by_source(self.by_source, other.by_source),
            left_out={s: _sum(self.left_out.get(s, {}), other.left_out.get(s, {})) for s in stages},
            histograms={k: _by_number(_sum(self.histograms.get(k, {}), other.histograms.get(k, {}))) for k in kinds},
        )


def split_tasks(rows: pa.Table) -> Counts:
    """Rows by ``<split>/<task>``."""
    return _values(pc.binary_join_element_wise(rows["split"], rows["task"], "/"))


def sum_by_split_task(left: Counts, right: Counts) -> Counts:
    """The sum; rare tasks of a split are ``<split>/(other)`` where there are many, and so are splits."""
    counts = _bounded(_sum(left, right), lambda name: f"{name.partition('/')[0]}/{_OTHER}")
    return counts if len(counts) <= 2 * MOST_NAMES else _bounded(counts, lambda _: f"{_OTHER}/{_OTHER}")


def is_bounded(counts: Counts) -> bool:
    """Whether some names are counted together."""
    return any(name.endswith(_OTHER) for name in counts)


def _sum_by_source(left: Counts, right: Counts) -> Counts:
    return _bounded(_sum(left, right), lambda _: _OTHER)


def _bounded(counts: Counts, other: Callable[[str], str]) -> Counts:
    """The largest counts by name, and the others together."""
    if len(counts) <= MOST_NAMES:
        return counts
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    kept = Counter({name: counts[name] for name in ranked[:MOST_NAMES]})
    for name in ranked[MOST_NAMES:]:
        kept[other(name)] += counts[name]
    return dict(sorted(kept.items()))


def _field(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A field of a struct column; null where the struct is."""
    return pc.struct_field(column, name)


def _values(column: pa.ChunkedArray) -> Counts:
    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}


def _histogram(values: pa.ChunkedArray) -> Counts:
    numbers = pc.fill_null(values, 0).to_numpy().astype(np.float64)
    exponents, counts = np.unique(np.floor(np.log2(np.maximum(numbers, 0.5))).astype(int), return_counts=True)
    bounds = (0 if exponent < 0 else 2**exponent for exponent in exponents.tolist())
    return {str(bound): count for bound, count in zip(bounds, counts.tolist(), strict=True)}


def _sum(left: Counts, right: Counts) -> Counts:
    return dict(sorted((Counter(left) + Counter(right)).items()))


def _by_number(counts: Counts) -> Counts:
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))
