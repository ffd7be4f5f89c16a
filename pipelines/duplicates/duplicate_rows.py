"""Rows of equal keys: the first one stays, and the others are its duplicates.

Rows of evaluation splits come before all others and always stay: a row for training that repeats one of them is left
out, and a published evaluation set keeps its rows. Otherwise the order of the corpus decides.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from crem.config import PrepareConfig
from pipelines.duplicates.decision_tables import (
    CLUSTERS,
    CLUSTERS_FOLDER,
    DECISIONS,
    MOST_CLUSTERS,
    duplicates_file,
    write_table,
)
from pipelines.duplicates.row_filters import COUNT
from pipelines.tables.storage import Folder

__all__ = ["EXAMPLES", "FOUND", "group_rows", "write_decisions"]

EXAMPLES = 8
"""Rows of a cluster that are named."""

FOUND = pa.schema(
    [
        ("part", pa.int32()),  # -1: a count
        ("position", pa.int64()),  # of a count: the number of rows
        ("id", pa.int64()),
        ("reason", pa.string()),  # of a count: its name
        ("detail", pa.string()),
        ("cluster", pa.int64()),
    ]
)


def group_rows(records: pa.Table, *, config: PrepareConfig, work: Folder) -> pa.Table:
    """On a worker: the duplicates among the rows of one bucket, and counts; clusters are written to ``work``."""
    bucket = records["bucket"][0].as_py()
    counted = np.array([value == COUNT for value in records["near"].to_pylist()], np.bool_)
    counts: Counter[str] = Counter()
    for row in records.filter(pa.array(counted)).to_pylist():
        counts[f"found:{row['name']}"] += row["position"]
    rows = records.filter(pa.array(~counted)).sort_by(
        [(name, "ascending") for name in ("near", "train", "part", "position")]
    )
    found: list[dict[str, Any]] = []
    clusters: list[dict[str, Any]] = []
    for start, stop in _runs(rows["near"]):
        cluster, left_out = _cluster(rows.slice(start, stop - start).to_pylist(), config, counts)
        clusters += cluster
        found += left_out
    counts["clusters"] += len(clusters)
    largest = sorted(clusters, key=lambda cluster: (-cluster["size"], cluster["cluster"]))[:MOST_CLUSTERS]
    write_table(largest, CLUSTERS, work, f"{CLUSTERS_FOLDER}/rows-{bucket:06d}.parquet")
    found += [{"part": -1, "position": number, "reason": name, "id": 0} for name, number in sorted(counts.items())]
    return pa.Table.from_pylist(found, schema=FOUND)


def _runs(column: pa.ChunkedArray) -> list[tuple[int, int]]:
    """Starts and ends of runs of two and more equal values."""
    values = np.array(column.to_pylist(), dtype=object)
    if len(values) < 2:
        return []
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    stops = np.r_[starts[1:], len(values)]
    runs = stops - starts > 1
    return list(zip(starts[runs].tolist(), stops[runs].tolist(), strict=True))


def _cluster(
    rows: list[dict[str, Any]], config: PrepareConfig, counts: Counter[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row of ``CLUSTERS`` and rows of ``FOUND``; ``counts`` goes up."""
    # a repeated id is rejected as such, and a decision names a row by its id: only the first row of it counts
    rows = list({row["id"]: row for row in reversed(rows)}.values())[::-1]
    if len(rows) < 2:
        return [], []
    kept, *others = rows
    contents = {kept["exact"]}
    left_out = []
    for row in others:
        reason = "exact_duplicate" if row["exact"] in contents else "near_duplicate"
        contents.add(row["exact"])
        counts[f"found:duplicates/{reason}"] += 1
        if row["train"] and "drop" in (
            config.near_duplicates,
            config.exact_duplicates if reason == "exact_duplicate" else "",
        ):
            detail = f"{'same' if reason == 'exact_duplicate' else 'nearly the same'} as row {kept['name']!r}"
            place = {name: row[name] for name in ("part", "position", "id")}
            left_out.append({**place, "reason": reason, "detail": detail, "cluster": kept["id"]})
    cluster = {
        "kind": "rows",
        "cluster": kept["id"],
        "size": len(rows),
        "reason": "exact_duplicate" if len(contents) == 1 else "near_duplicate",
        "left_out": len(left_out),
        "ids": [row["id"] for row in rows[:EXAMPLES]],
        "names": [row["name"] for row in rows[:EXAMPLES]],
    }
    return [cluster], left_out


def write_decisions(found: pa.Table, *, work: Folder, shuffle: int) -> pa.Table:
    """On a worker: write the duplicates of one part that a shuffle found to ``work``; the counts."""
    part = found["part"][0].as_py()
    if part < 0:
        return found.select(["position", "reason"])
    rows = [
        {**row, "stage": "duplicates"}
        for row in found.sort_by("position").drop_columns(["part", "position"]).to_pylist()
    ]
    write_table(rows, DECISIONS, work, duplicates_file(part, shuffle))
    counts = Counter(f"left_out:duplicates/{row['reason']}" for row in rows)
    return pa.table(
        {"position": pa.array(list(counts.values()), pa.int64()), "reason": pa.array(list(counts), pa.string())}
    )
