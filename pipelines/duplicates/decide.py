"""Which rows of a corpus to leave out: another language, an evaluation set's content, duplicates.

Three passes on Ray Data, each over parts of tables: the near images and texts (only if near duplicates or
contamination are asked for), the keys of the rows, and the rows of equal keys (``record_shuffle``). A corpus of few
rows is not shuffled but grouped in the driver. The decisions are a function of the tables and the settings: neither
the number of workers nor the order in which they finish changes them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import ray

from crem.config import PrepareConfig
from pipelines.duplicates.candidate_pairs import ALL_PAIRS
from pipelines.duplicates.decision_tables import (
    CLUSTERS,
    CLUSTERS_FOLDER,
    DUPLICATES,
    MOST_CLUSTERS,
    Decisions,
    write_table,
)
from pipelines.duplicates.duplicate_rows import EXAMPLES, group_rows, write_decisions
from pipelines.duplicates.evaluation_sets import read_evaluation_sets
from pipelines.duplicates.language import require_languages
from pipelines.duplicates.libraries import library
from pipelines.duplicates.near_items import NearItems, find_near_items
from pipelines.duplicates.parts import TablePart
from pipelines.duplicates.record_shuffle import Buckets, collected, shuffled
from pipelines.duplicates.row_filters import ROW_RECORD, Known, RowTask, key_rows
from pipelines.tables import ray_tasks
from pipelines.tables.manifest import read_manifest
from pipelines.tables.storage import Folder

__all__ = ["asked_for", "check_settings", "decide", "needs_libraries"]

log = logging.getLogger(__name__)

_NEAR = ("imagehash", "rensa", "scipy")
"""Libraries of near duplicates and of contamination."""
_ROWS_PER_BUCKET = 200_000
"""Rows that one task of a shuffle holds: some 40 MB."""
_IDS_PER_ROW = 2
_NEAR_RECORDS, _ROW_RECORDS = "near_records", "row_records"
"""Folders of what is shuffled; while they are there, an interrupted call does not read the corpus again."""
_ROWS_HERE = 2000
"""Rows that the driver keys itself, a few dozen files, in less time than Ray Data takes to start."""


def asked_for(config: PrepareConfig) -> bool:
    """Whether any setting asks for decisions."""
    duplicates = {config.exact_duplicates, config.near_duplicates} != {"off"}
    return duplicates or bool(config.contamination) or bool(config.languages)


def needs_libraries(config: PrepareConfig) -> list[str]:
    """The optional libraries that decide with these settings."""
    near = config.near_duplicates != "off" or bool(config.contamination)
    return [*(_NEAR if near else ()), *(["py3langid"] if config.languages else [])]


def check_settings(config: PrepareConfig) -> None:
    """Refuse what cannot be done, before a corpus is read.

    Raises:
        ConfigError: a library is missing, a language is unknown, or there are no prepared tables at a URI of
            ``prepare.contamination``.
    """
    if config.languages:
        require_languages(config.languages)
    if config.near_duplicates != "off" or config.contamination:
        setting = "prepare.near_duplicates" if config.near_duplicates != "off" else "prepare.contamination"
        for name in _NEAR:
            library(name, setting)
    for uri in config.contamination:
        read_manifest(Folder.at(uri))


def decide(rows: Sequence[TablePart], images: Sequence[TablePart], config: PrepareConfig, *, work: Folder) -> Decisions:
    """Decide on the rows of a corpus.

    Args:
        rows: parts of ``schema.ROWS`` in the order of the corpus. Of several rows of one id only the first counts.
        images: parts of ``schema.IMAGES``, in any order; an image may be in several.
        config: the settings of the job.
        work: a folder for the decisions and the clusters, empty or as an interrupted call for the same rows left it.

    Raises:
        ConfigError: as ``check_settings``. ResourceError: more near pairs than the driver holds.
    """
    if not rows:
        return Decisions(work, {}, {}, 0, 0)
    with ray_tasks.remote_errors():
        for name in (DUPLICATES, CLUSTERS_FOLDER):  # they are divided as the cluster is, which may be another now
            work.remove(name)
        evaluation = read_evaluation_sets(config.contamination, config)
        items = None
        if config.near_duplicates != "off" or evaluation:
            items = find_near_items(rows, images, evaluation, config, work.child(_NEAR_RECORDS))
            _write_image_clusters(items, work)
        counts = _decide_rows(rows, Known(items, evaluation), config, work)
        for name in (_NEAR_RECORDS, _ROW_RECORDS):
            work.remove(name)
    found = {name.partition(":")[2]: n for name, n in sorted(counts.items()) if name.startswith("found:")}
    left_out = {name.partition(":")[2]: n for name, n in sorted(counts.items()) if name.startswith("left_out:")}
    left_out |= {name: n for name, n in found.items() if _left_out_at_once(name, config)}
    unchecked = 0 if items is None else items.unchecked
    if unchecked:
        log.warning(
            "%d images or texts share their keys with more than %d others and were not compared with all of them",
            unchecked,
            ALL_PAIRS,
        )
    return Decisions(work, found, dict(sorted(left_out.items())), counts["clusters"], unchecked)


def _left_out_at_once(name: str, config: PrepareConfig) -> bool:
    stage = name.partition("/")[0]
    return stage == "language" or (stage == "contamination" and config.contaminated == "drop")


def _decide_rows(rows: Sequence[TablePart], known: Known, config: PrepareConfig, work: Folder) -> Counter[str]:
    """Write the decisions; counts by name."""
    tasks = [RowTask(number, part) for number, part in enumerate(rows)]
    total = sum(part.rows for part in rows)
    buckets = Buckets.of(total, _ROWS_PER_BUCKET, _IDS_PER_ROW)
    keyed = partial(key_rows, known=ray.put(known), config=config, work=work, buckets=buckets.count)
    grouped = partial(group_rows, config=config, work=work)
    counts: Counter[str] = Counter()
    for table in _written(tasks, total, keyed, grouped, buckets, work):
        for name, number in zip(table["reason"].to_pylist(), table["position"].to_pylist(), strict=True):
            counts[name] += number
    return Counter({name: number for name, number in counts.items() if number})


def _written(
    tasks: list[RowTask],
    total: int,
    keyed: Callable[[RowTask], Iterable[pa.Table]],
    grouped: Callable[[pa.Table], pa.Table],
    buckets: Buckets,
    work: Folder,
) -> Iterator[pa.Table]:
    """Counts of what ``write_decisions`` wrote."""
    if total <= _ROWS_PER_BUCKET:
        here = total <= _ROWS_HERE
        records = [table for task in tasks for table in keyed(task)] if here else [collected(tasks, keyed, ROW_RECORD)]
        together = pa.concat_tables(records)
        if not together.num_rows:  # no row is left, or none was usable
            return
        found = grouped(together)
        parts = found["part"].to_numpy()
        for part in np.unique(parts):
            yield write_decisions(found.filter(pa.array(parts == part)), work=work, shuffle=0)
        return
    for number, shuffle in enumerate(shuffled(tasks, keyed, ROW_RECORD, buckets, work.child(_ROW_RECORDS))):
        written = (
            shuffle.map_groups(grouped, batch_format="pyarrow")
            .groupby("part", num_partitions=min(len(tasks) + 1, buckets.count // buckets.shuffles))
            .map_groups(partial(write_decisions, work=work, shuffle=number), batch_format="pyarrow")
        )
        yield from written.iter_batches(batch_size=None, batch_format="pyarrow")


def _write_image_clusters(items: NearItems, work: Folder) -> None:
    """The largest clusters of images of the corpus."""
    member = np.isin(items.images.ids, items.corpus_images)
    ids, roots = items.images.ids[member], items.images.representatives[member]
    order = np.lexsort((ids, roots))
    ids, roots = ids[order], roots[order]
    starts = np.flatnonzero(np.r_[True, roots[1:] != roots[:-1]]) if len(roots) else np.empty(0, np.intp)
    sizes = np.diff(np.r_[starts, len(roots)])
    largest = np.argsort(-sizes, kind="stable")[:MOST_CLUSTERS]
    clusters = [
        {
            "kind": "images",
            "cluster": int(ids[starts[i]]),
            "size": int(sizes[i]),
            "reason": "near_duplicate",
            "left_out": 0,
            "ids": ids[starts[i] : starts[i] + min(EXAMPLES, sizes[i])].tolist(),
            "names": [],
        }
        for i in largest
        if sizes[i] > 1
    ]
    write_table(clusters, CLUSTERS, work, f"{CLUSTERS_FOLDER}/images.parquet")
