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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crem.config import IndexConfig, RunConfig
from crem.errors import CheckpointError, ConfigError
from pipelines import session
from pipelines.storage import Folder

__all__ = ["Hit", "Index", "build", "search"]

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


@dataclass(frozen=True)
class Hit:
    """One result, best first; ``score`` is the cosine."""

    id: int
    score: float
    uri: str | None
    text: str | None


def build(embeddings: str, out: str, config: RunConfig) -> dict[str, Any]:
    """Index the output of ``crem embed``.

    Returns:
        ``fingerprint``, ``dim``, ``count``, ``skipped`` (rows with an error), ``kind`` and ``model``.

    Raises:
        ConfigError: no embeddings there, an unfinished run, vectors of more than one model, or no vector at all.
    """
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


class Index:
    """An index opened for search. Remote ones are copied to a temporary folder first."""

    def __init__(self, place: str):
        """Raises ``ConfigError`` where there is no complete index."""
        folder = Folder.at(place)
        summary = folder.read_json(SUMMARY)
        if not isinstance(summary, dict) or summary.get("kind") != KIND:
            raise ConfigError(f"{place!r} is not an index (no {SUMMARY}); run crem index into it first")
        self.summary: dict[str, Any] = summary
        self._scratch = None if folder.is_local else tempfile.TemporaryDirectory(prefix="crem-index-")
        if self._scratch is not None:
            for name in (VECTORS, ITEMS):
                folder.fs.get_file(folder.path(name), str(Path(self._scratch.name) / name))
        root = Path(self._scratch.name if self._scratch else folder.uri)
        try:
            self._vectors = faiss.read_index(str(root / VECTORS))
            self._items = pq.ParquetFile(root / ITEMS)
        except (RuntimeError, OSError, pa.ArrowException) as error:
            raise ConfigError(f"{place!r} is damaged: {error}; run crem index again") from error
        if isinstance(self._vectors, faiss.IndexIVF):
            self._vectors.nprobe = summary["probes"]
        groups = (self._items.metadata.row_group(i).num_rows for i in range(self._items.num_row_groups))
        self._starts = np.cumsum([0, *groups])

    @property
    def fingerprint(self) -> str:
        return str(self.summary["fingerprint"])

    def search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """The ``k`` best hits of each query vector [N, dim], fewer if the index holds fewer."""
        if k < 1:
            raise ConfigError(f"k={k} asks for no result; give 1 or more")
        scores, positions = self._vectors.search(
            np.ascontiguousarray(vectors, np.float32), min(k, self.summary["count"])
        )
        rows = self._rows(positions)
        return [
            [Hit(score=float(s), **rows[int(p)]) for s, p in zip(of_scores, of_query, strict=True) if p >= 0]
            for of_scores, of_query in zip(scores, positions, strict=True)
        ]

    def _rows(self, positions: np.ndarray) -> dict[int, dict[str, Any]]:
        """Item rows by position, reading each row group at most once."""
        wanted = np.unique(positions[positions >= 0])
        groups = np.searchsorted(self._starts, wanted, side="right") - 1
        found: dict[int, dict[str, Any]] = {}
        for group in np.unique(groups):
            of_group = wanted[groups == group]
            taken = self._items.read_row_group(int(group)).take(pa.array(of_group - self._starts[group]))
            found.update(zip(of_group.tolist(), taken.to_pylist(), strict=True))
        return found


def search(index: str, model: str, query: Any, k: int) -> list[Hit]:
    """The ``k`` items of ``index`` nearest to ``query``, embedded by ``model``.

    Args:
        index: folder or URI of an index.
        model: checkpoint folder or URI; a loaded ``crem.Crem`` is taken as it is.
        query: a ``crem.Item``, or its shorthands.

    Raises:
        ConfigError: no index there.
        CheckpointError: the index was made by another model.
        ItemError: the query cannot be embedded.
    """
    import crem

    opened = Index(index)
    count = opened.summary.get("chorus_tokens")
    loaded = crem.load(model, chorus_tokens=count) if isinstance(model, str | Path) else model
    if loaded.fingerprint != opened.fingerprint:
        raise CheckpointError(
            f"the index {index} was made by model {opened.fingerprint} ({opened.summary['model']}), and this model is "
            f"{loaded.fingerprint}; search with that model, or embed and index again with this one"
        )
    return opened.search(loaded.embed([query]), k)[0]
