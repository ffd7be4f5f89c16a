"""The inverted file over an index's vectors, in segments that tasks build apart from each other.

A segment covers up to ``index.segment_rows`` vectors and trains its own cells on a sample of them, so that neither the
training nor the memory of a task grows with the dataset. Rows that came after the last segment are compared exactly
until there are ``index.exact_below`` of them; then they become a segment.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from crem.config import IndexConfig
from crem.forecast.index_needs import cells_of
from pipelines.search.index_dataset import VECTOR_INDEX, open_dataset
from pipelines.tables.storage import Folder

__all__ = ["index_columns", "index_vectors"]

log = logging.getLogger(__name__)

_FEWEST_ROWS = 256
"""Fewer train no quantiser."""
_PQ_DIMENSIONS = 4
"""Dimensions of a byte of a product quantiser."""


@dataclass(frozen=True)
class _Segment:
    """What a task builds."""

    version: int
    fragments: tuple[int, ...]
    cells: int
    quantiser: str
    sub_vectors: int
    """Bytes of a vector's code, of a product quantiser."""


def index_vectors(
    dataset: Any,
    target: Folder,
    config: IndexConfig,
    each: Callable[[Callable[[_Segment], bytes], Iterable[_Segment]], Iterable[bytes]],
) -> str:
    """Bring the inverted file up to the rows of the newest version; returns its kind, ``exact`` where there is none.

    Args:
        each: runs a task for every segment.
    """
    counts = {fragment.fragment_id: fragment.count_rows() for fragment in dataset.get_fragments()}
    rows = sum(counts.values())
    present = [index for index in dataset.list_indices() if index["name"] == VECTOR_INDEX]
    dim = dataset.schema.field("embedding").type.list_size
    quantiser = config.quantiser if dim % 8 == 0 else "IVF_PQ"  # RaBitQ packs bits into bytes
    exact = rows < max(config.exact_below, _FEWEST_ROWS)
    if present and (exact or any(index["type"] != quantiser for index in present)):
        dataset.drop_index(VECTOR_INDEX)
        present, dataset = [], open_dataset(target)
    if exact:
        return "exact"
    covered = {number for index in present for number in index["fragment_ids"]}
    waiting = {number: count for number, count in counts.items() if number not in covered}
    if present and sum(waiting.values()) < config.exact_below:
        if waiting:
            log.info("%d new vectors are compared exactly until there are more", sum(waiting.values()))
        return quantiser
    segments = [
        _Segment(dataset.version, tuple(group), cells_of(count, config), quantiser, _sub_vectors(dim))
        for group, count in _groups(waiting, config.segment_rows)
    ]
    log.info("building %s in %d segments", quantiser, len(segments))
    built = [pickle.loads(segment) for segment in each(partial(_build_segment, target=target), segments)]
    dataset.commit_existing_index_segments(VECTOR_INDEX, "embedding", built)
    return quantiser


def index_columns(dataset: Any, config: IndexConfig) -> None:
    """Bring the indexes of words and of values up to the rows of the newest version."""
    present = {index["name"] for index in dataset.list_indices()}
    wanted = {f"{name}_idx": (name, "BTREE") for name in config.filters}
    if config.full_text:
        wanted["text_words"] = ("text", "INVERTED")
    for name in present - set(wanted) - {VECTOR_INDEX}:
        dataset.drop_index(name)
    for name in sorted(set(wanted) & present):
        dataset.optimize.optimize_indices(index_names=[name])
    for name in sorted(set(wanted) - present):
        column, kind = wanted[name]
        dataset.create_scalar_index(column, kind, name=name)


def _build_segment(segment: _Segment, *, target: Folder) -> bytes:
    """In a worker: write the index files of some fragments."""
    dataset = open_dataset(target, segment.version)
    options = {"num_bits": 1} if segment.quantiser == "IVF_RQ" else {"num_sub_vectors": segment.sub_vectors}
    built = dataset.create_index_uncommitted(
        "embedding",
        segment.quantiser,
        name=VECTOR_INDEX,
        metric="dot",
        replace=True,  # beside the segments that are there: without it a name that is taken is refused
        num_partitions=segment.cells,
        fragment_ids=list(segment.fragments),
        **options,
    )
    return pickle.dumps(built)


def _sub_vectors(dim: int) -> int:
    return next(dim // width for width in (_PQ_DIMENSIONS, 2, 1) if dim % width == 0)


def _groups(counts: dict[int, int], most: int) -> Iterable[tuple[list[int], int]]:
    """Fragments in groups of up to ``most`` rows, and the rows of each."""
    group: list[int] = []
    rows = 0
    for number, count in sorted(counts.items()):
        if group and rows + count > most:
            yield group, rows
            group, rows = [], 0
        group.append(number)
        rows += count
    if group:
        yield group, rows
