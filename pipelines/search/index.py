"""``crem index``: a FAISS index over embeddings, and a table of the items at its positions.

Vectors have unit length, so the inner product is the cosine. Below ``index.exact_below`` vectors the index is exact;
from there on it is an inverted file with scalar-quantised vectors (IVF,SQ8: recall@10 0.980 at 200,000 x 256). An index
belongs to one model: embeddings of several fingerprints are refused.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crem.config import IndexConfig, RunConfig
from crem.errors import ConfigError
from pipelines.embedding.live_parts import Growth
from pipelines.embedding.output import EmbedManifest, EmbedPlan, parts_of, read_ledgers
from pipelines.tables.json_file import JsonFile
from pipelines.tables.part_reads import in_threads
from pipelines.tables.schema import EmbeddingStamp
from pipelines.tables.storage import Folder, JobKind
from pipelines.tables.vector_parts import part_footer, read_part
from pipelines.tables.vector_types import unit_vectors

__all__ = ["ITEMS", "VECTORS", "IndexSummary", "build", "survey"]

log = logging.getLogger(__name__)

VECTORS = "vectors.faiss"
ITEMS = "items.parquet"
"""One row per vector, in their order."""

_ITEMS = ("id", "uri", "text")
_ITEM_GROUP = 4096
"""Rows per group of the item table; a hit reads one group."""
_TRAIN_PER_CELL = 64
"""Vectors per cell that train the inverted file (FAISS asks for 39 to 256)."""


class IndexSummary(JsonFile):
    """What an index holds; written last, its presence means complete."""

    FILE: ClassVar[str] = "index.json"

    kind: Literal[JobKind.INDEX] = JobKind.INDEX
    fingerprint: str
    model: str
    """Folder, URI or name of the checkpoint that made the vectors."""
    chorus_tokens: int | None = None
    """Of ``EmbeddingStamp``."""
    dim: int
    count: int
    """Vectors."""
    skipped: int
    """Rows with an error in place of an embedding."""
    index: str
    """FAISS's description of the index."""
    probes: int
    """Cells of an inverted file that a query visits."""


def build(embeddings: str, out: str, config: RunConfig) -> IndexSummary:
    """Index the output of ``crem embed``.

    Raises:
        ConfigError: there are no embeddings, their run did not finish, parts are missing or damaged, several models
            made them, or all rows are errors; or a node of the cluster does not see a local ``out``.
    """
    from pipelines.tables import session, shared_folders  # not at the top: crem search needs no Ray

    source = Folder.at(embeddings)
    names, stamp, rows = survey(source)
    target = Folder.at(out)
    target.claim(JobKind.INDEX)
    if session.on_cluster():  # an index that only this node sees would be lost with the node
        session.connect()
        shared_folders.require_shared(target)
    target.remove(IndexSummary.FILE)
    with tempfile.TemporaryDirectory(prefix="crem-index-") as scratch:
        summary = _build(source, names, stamp, rows, Path(scratch), config.index)
        for name in (VECTORS, ITEMS):
            with open(Path(scratch) / name, "rb") as file, target.open(name, mode="wb") as sink:
                shutil.copyfileobj(file, sink, 2**22)
    summary.write(target)
    log.info("indexed %d vectors (%s), skipped %d rows with an error", summary.count, summary.index, summary.skipped)
    return summary


def survey(source: Folder) -> tuple[list[str], EmbeddingStamp, int]:
    """Of the output of ``crem embed``: its files, the stamp of their model, and rows.

    Raises:
        ConfigError: there are no embeddings, their run did not finish, parts are missing or damaged, or several models
            made them.
    """
    manifest = EmbedManifest.read(source)
    if Growth.read(source) is not None:
        raise ConfigError(
            f"{source.uri} was grown, and this job reads outputs of a single run; embed it anew with --fresh"
        )
    names = source.files(".parquet")
    if manifest is not None and manifest.shards:  # what is not listed is somebody's
        names = [part.name for part in parts_of(read_ledgers(source))]
    if not names and not source.exists(EmbedPlan.FILE):
        raise ConfigError(f"{source.uri} holds no Parquet files of embeddings; run crem embed into it first")
    if manifest is None and source.exists(EmbedPlan.FILE):
        state = (
            f"whose {EmbedManifest.FILE} is damaged" if source.exists(EmbedManifest.FILE) else "that was not finished"
        )
        raise ConfigError(f"{source.uri} is an embedding run {state}; run crem embed into it again")
    stamps: dict[str, tuple[str, EmbeddingStamp]] = {}
    rows = 0
    for name, (stamp, count) in zip(names, in_threads(partial(_footer, source), names), strict=True):
        rows += count
        if stamp is None:
            raise ConfigError(f"{source.uri}/{name} carries no model fingerprint; it was not written by crem embed")
        stamps.setdefault(stamp.fingerprint, (name, stamp))
    if len(stamps) > 1:
        both = " and ".join(f"{fingerprint} ({name})" for fingerprint, (name, _) in sorted(stamps.items())[:3])
        raise ConfigError(f"{source.uri} mixes embeddings of the models {both}; index them apart")
    if manifest is not None and rows != manifest.rows_out:
        raise ConfigError(
            f"{source.uri} has {rows} rows and its {manifest.FILE} says {manifest.rows_out}: parts are missing or "
            "were added; run crem embed into it again, or remove what is not its own"
        )
    return names, next(iter(stamps.values()))[1], rows


def _footer(source: Folder, name: str) -> tuple[EmbeddingStamp | None, int]:
    """Stamp and rows of a file."""
    try:
        footer = part_footer(source, name)
        return footer.stamp, footer.rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(source, name, error) from error


def _unreadable(source: Folder, name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{source.uri}/{name} cannot be read ({error}); if the file is missing or damaged, run crem embed into that "
        "folder again with --repair"
    )


def _build(
    source: Folder, names: list[str], stamp: EmbeddingStamp, rows: int, scratch: Path, config: IndexConfig
) -> IndexSummary:
    """Write ``VECTORS`` and ``ITEMS`` into the local folder ``scratch``."""
    index, label = _empty_index(source, names, stamp.dim, rows, config)
    count = 0
    first = part_footer(source, names[0]).schema
    of_items = pa.schema([first.field(name) for name in _ITEMS])  # ids are of any type
    with pq.ParquetWriter(scratch / ITEMS, of_items, compression="zstd") as items:
        for table in _embedded_rows(source, names):
            index.add(unit_vectors(table))
            items.write_table(table.select(_ITEMS).cast(of_items), row_group_size=_ITEM_GROUP)
            count += table.num_rows
    if not count:
        raise ConfigError(f"none of the {rows} rows of {source.uri} has an embedding; its column error says why")
    faiss.write_index(index, str(scratch / VECTORS))
    return IndexSummary(
        fingerprint=stamp.fingerprint,
        model=stamp.model,
        chorus_tokens=stamp.chorus_tokens,
        dim=stamp.dim,
        count=count,
        skipped=rows - count,
        index=label,
        probes=config.probes,
    )


def _empty_index(source: Folder, names: list[str], dim: int, rows: int, config: IndexConfig) -> tuple[faiss.Index, str]:
    """An empty index, and its description: exact, or an inverted file trained on a sample of the vectors."""
    if rows < config.exact_below:
        return faiss.IndexFlatIP(dim), "Flat"
    cells = max(1, min(65_536, round(4 * math.sqrt(rows))))
    label = f"IVF{cells},{'Flat' if config.bits == 32 else f'SQ{config.bits}'}"
    wanted = cells * _TRAIN_PER_CELL
    keep = min(1.0, wanted / rows)
    rng = np.random.default_rng(0)
    sample = np.concatenate(
        [m[rng.random(len(m)) < keep] for m in (unit_vectors(t) for t in _embedded_rows(source, names))]
    )
    if len(sample) < cells:
        return faiss.IndexFlatIP(dim), "Flat"  # nearly all rows are errors
    index = faiss.index_factory(dim, label, faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    return index, label


def _embedded_rows(source: Folder, names: list[str]) -> Iterator[pa.Table]:
    """The rows that have an embedding, file by file."""
    for name in names:
        try:
            table = read_part(source, name, ["id", "embedding", "uri", "text"])
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(source, name, error) from error
        table = table.filter(table["embedding"].is_valid())
        if table.num_rows:
            yield table
