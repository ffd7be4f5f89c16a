"""``crem index`` and ``crem search``: a FAISS index over embeddings, and the items behind its positions.

Vectors are of unit length, so the inner product is the cosine. Below ``index.exact_below`` vectors the index is exact;
above it is an inverted file with scalar-quantised vectors (IVF,SQ8: recall@10 0.980 at 200,000 x 256). An index belongs
to one model: embeddings of several fingerprints are refused, and so is a query by another model.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crem.config import IndexConfig, RunConfig
from crem.errors import ConfigError
from pipelines.tables.storage import Folder

__all__ = ["build"]

log = logging.getLogger(__name__)

KIND = "index"
SUMMARY = "index.json"
VECTORS = "vectors.faiss"
ITEMS = "items.parquet"

_ITEMS = pa.schema([("id", pa.int64()), ("uri", pa.string()), ("text", pa.string())])
_ITEM_GROUP = 4096
"""Rows per group of the item table; a hit reads one group."""
_TRAIN_PER_CELL = 64
"""Vectors per cell that train the inverted file (FAISS asks for 39 to 256)."""


def build(embeddings: str, out: str, config: RunConfig) -> dict[str, Any]:
    """Index the output of ``crem embed``.

    Returns:
        ``fingerprint``, ``dim``, ``count``, ``skipped`` (rows with an error), ``kind`` and ``model``.

    Raises:
        ConfigError: no embeddings there, an unfinished run, vectors of more than one model, or no vector at all.
    """
    from pipelines.tables import session  # not at the top: crem search needs no Ray

    source = Folder.at(embeddings)
    names, stamp, rows = _survey(source)
    target = Folder.at(out)
    target.claim(KIND)
    if session.on_cluster():  # the job needs no Ray, but an index that only this node sees would be lost with it
        session.connect()
        session.require_shared(target)
    target.remove(SUMMARY)
    with tempfile.TemporaryDirectory(prefix="crem-index-") as scratch:
        summary = _build(source, names, stamp, rows, Path(scratch), config.index)
        for name in (VECTORS, ITEMS):
            with open(Path(scratch) / name, "rb") as file, target.open(name, mode="wb") as sink:
                shutil.copyfileobj(file, sink, 2**22)
    target.write_json(summary, SUMMARY)
    log.info(
        "indexed %d vectors (%s), skipped %d rows with an error", summary["count"], summary["index"], summary["skipped"]
    )
    return summary


def _survey(source: Folder) -> tuple[list[str], dict[str, Any], int]:
    """(files, stamp of their model, rows); every file must carry the same stamp."""
    names = source.files(".parquet")
    if not names:
        raise ConfigError(f"{source.uri} holds no Parquet files of embeddings; run crem embed into it first")
    if source.exists("plan.json") and not source.exists("manifest.json"):
        raise ConfigError(f"{source.uri} is an embedding run that was not finished; run crem embed into it again")
    stamps: dict[str, tuple[str, dict[str, Any]]] = {}
    rows = 0
    for name in names:
        try:
            with source.open(name) as file:
                parquet = pq.ParquetFile(file)
                raw = (parquet.schema_arrow.metadata or {}).get(b"crem")
                rows += parquet.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(source, name, error) from error
        if raw is None:
            raise ConfigError(f"{source.uri}/{name} carries no model fingerprint; it was not written by crem embed")
        stamp = json.loads(raw)
        stamps.setdefault(stamp["fingerprint"], (name, stamp))
    if len(stamps) > 1:
        both = " and ".join(f"{fingerprint} ({name})" for fingerprint, (name, _) in sorted(stamps.items())[:3])
        raise ConfigError(f"{source.uri} mixes embeddings of the models {both}; index them apart")
    written = (source.read_json("manifest.json") or {}).get("rows_out", rows)
    if rows != written:
        raise ConfigError(
            f"{source.uri} has {rows} rows and its manifest.json says {written}: parts are missing, or were added; run "
            "crem embed into it again, or remove what is not its own"
        )
    return names, next(iter(stamps.values()))[1], rows


def _unreadable(source: Folder, name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{source.uri}/{name} cannot be read ({error}); if the file is damaged, run crem embed into that folder again: "
        "it replaces what is damaged"
    )


def _build(
    source: Folder, names: list[str], stamp: dict[str, Any], rows: int, scratch: Path, config: IndexConfig
) -> dict[str, Any]:
    dim = int(stamp["dim"])
    index, label = _empty_index(source, names, dim, rows, config)
    count = 0
    with pq.ParquetWriter(scratch / ITEMS, _ITEMS, compression="zstd") as items:
        for table in _good(source, names):
            index.add(_matrix(table, dim))
            items.write_table(table.select(_ITEMS.names).cast(_ITEMS), row_group_size=_ITEM_GROUP)
            count += table.num_rows
    if not count:
        raise ConfigError(f"none of the {rows} rows of {source.uri} has an embedding; its column error says why")
    faiss.write_index(index, str(scratch / VECTORS))
    return {
        "kind": KIND,
        "fingerprint": stamp["fingerprint"],
        "model": stamp["model"],
        "chorus_tokens": stamp.get("chorus_tokens"),
        "dim": dim,
        "count": count,
        "skipped": rows - count,
        "index": label,
        "probes": config.probes,
    }


def _empty_index(source: Folder, names: list[str], dim: int, rows: int, config: IndexConfig) -> tuple[faiss.Index, str]:
    """An index ready to be added to, and what it is: exact, or an inverted file trained on a sample of the vectors."""
    if rows < config.exact_below:
        return faiss.IndexFlatIP(dim), "Flat"
    cells = max(1, min(65_536, round(4 * math.sqrt(rows))))
    label = f"IVF{cells},{'Flat' if config.bits == 32 else f'SQ{config.bits}'}"
    wanted = cells * _TRAIN_PER_CELL
    keep = min(1.0, wanted / rows)
    rng = np.random.default_rng(0)
    sample = np.concatenate([m[rng.random(len(m)) < keep] for m in (_matrix(t, dim) for t in _good(source, names))])
    if len(sample) < cells:
        return faiss.IndexFlatIP(dim), "Flat"  # nearly all rows were errors
    index = faiss.index_factory(dim, label, faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    return index, label


def _good(source: Folder, names: list[str]) -> Iterator[pa.Table]:
    """The rows that have an embedding, file by file."""
    for name in names:
        try:
            with source.open(name) as file:
                table = pq.ParquetFile(file, page_checksum_verification=True).read(
                    columns=["id", "embedding", "uri", "text"]
                )
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(source, name, error) from error
        table = table.filter(table["embedding"].is_valid())
        if table.num_rows:
            yield table


def _matrix(table: pa.Table, dim: int) -> np.ndarray:
    """[N, dim] float32."""
    column = table["embedding"].combine_chunks()
    return np.ascontiguousarray(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim), dtype=np.float32)
