"""Vectors that earlier jobs made, found by the ids of their items: the output of ``crem embed`` or of ``crem index``.

A corpus is embedded once and mined from often. ``crem embed PREPARED`` keys a vector by the id of its image, and
``mine.keep_vectors`` by ``item_key``, which is that id where an item is nothing but an image. An index keeps its
vectors as they came, beside the codes that it searches.

The driver holds 8 bytes per vector; the vectors themselves go from storage into Ray's object store, those of items that
the rows have, and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from crem.errors import ConfigError
from pipelines.search.embedded_parts import EmbeddedPart, survey
from pipelines.search.index_dataset import IndexSummary, open_dataset
from pipelines.tables import ray_tasks
from pipelines.tables.schema import EmbeddingStamp
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage
from pipelines.tables.vector_parts import part_footer, read_part
from pipelines.tables.vector_types import unit_vectors

__all__ = ["GivenVectors", "VectorPiece", "ids_of_part", "open_vectors", "read_piece"]

_INDEX_PIECE = 32_768
"""Vectors of an index in one piece: 200 MB at 1,536 dimensions."""


@dataclass(frozen=True)
class VectorPiece:
    """What a worker reads at a time: some files of vectors, a part of an output, or a range of rows of an index."""

    folder: Folder
    files: tuple[str, ...]
    part: EmbeddedPart | None = None
    """Which rows of the only file count."""
    first: int = 0
    """Of the index, its first row; an index has no ``files``."""
    version: int | None = None
    """Of the index's dataset."""


@dataclass(frozen=True)
class GivenVectors:
    """Vectors of one model, in pieces."""

    stamp: EmbeddingStamp
    exact: bool
    """Whether none of them was rounded."""
    places: tuple[str, ...]
    """Where they are, as they were given."""
    pieces: tuple[VectorPiece, ...]
    ids: tuple[NDArray[np.int64], ...]
    """Of each piece, the ids of its vectors in their order."""

    def find(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The piece of each key, -1 where there is no vector of it, and the position in that piece.

        Of several vectors of one id the first is taken.
        """
        ids = np.concatenate([np.empty(0, np.int64), *self.ids])
        begins = np.cumsum([0, *map(len, self.ids)])
        order = np.argsort(ids, kind="stable")
        at = np.minimum(np.searchsorted(ids, keys, sorter=order), max(len(ids) - 1, 0))
        places = order[at] if len(ids) else np.zeros(len(keys), np.int64)
        there = ids[places] == keys if len(ids) else np.zeros(len(keys), np.bool_)
        pieces = np.searchsorted(begins, places, side="right") - 1
        return np.where(there, pieces, -1), places - begins[pieces]

    def load(self, wanted: dict[int, NDArray[np.int64]]) -> list[tuple[ray.ObjectRef, ray.ObjectRef]]:
        """Vectors [N, D] and whether each is one, of the positions in each piece, into Ray's object store."""
        read = ray.remote(num_cpus=0.5, num_returns=2)(read_piece)
        return [tuple(read.remote(self.pieces[number], positions)) for number, positions in wanted.items()]


def open_vectors(places: Sequence[str]) -> GivenVectors:
    """The vectors at some places, each a folder of ``crem embed`` or of ``crem index``; connect to Ray first.

    Raises:
        ConfigError: a place holds neither, its run did not finish, or the places are of several models.
    """
    stamps: list[EmbeddingStamp] = []
    pieces: list[VectorPiece] = []
    ids: list[NDArray[np.int64]] = []
    exact = True
    for place in places:
        folder = Folder.at(place)
        if (summary := IndexSummary.read(folder)) is not None:
            stamps.append(EmbeddingStamp(summary.fingerprint, summary.dim, summary.model, summary.chorus_tokens))
            exact &= summary.vector == "fp32"
            known = _indexed_ids(folder, summary.version)
            starts = range(0, len(known), _INDEX_PIECE)
            ids += [known[at : at + _INDEX_PIECE] for at in starts]
            pieces += [VectorPiece(folder, (), first=at, version=summary.version) for at in starts]
            continue
        embedded = survey(folder)
        stamps.append(embedded.stamp.of_vectors())
        exact &= embedded.stamp.vector == "fp32"
        pieces += [VectorPiece(folder, (part.name,), part) for part in embedded.parts]
        ids += ray_tasks.on_nodes(partial(_ids, folder), embedded.parts)
    first = stamps[0]
    for place, stamp in zip(places, stamps, strict=True):
        if (stamp.fingerprint, stamp.chorus_tokens) != (first.fingerprint, first.chorus_tokens):
            raise ConfigError(
                f"--vectors mixes models: {places[0]} is of {_described(first)}, and {place} of {_described(stamp)}; "
                "give vectors of one model"
            )
        if stamp.dim != first.dim:
            raise ConfigError(
                f"--vectors mixes vectors of {first.dim} dimensions ({places[0]}) and of {stamp.dim} ({place}); give "
                "some of one embed.dims"
            )
    return GivenVectors(first, exact, tuple(places), tuple(pieces), tuple(ids))


def read_piece(piece: VectorPiece, wanted: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """In a worker: vectors [N, D] at some positions of a piece, and whether each is one; zeros if not."""
    if not piece.files:
        dataset = open_dataset(piece.folder, piece.version)
        rows = dataset.take((wanted + piece.first).tolist(), columns=["embedding"])
        return unit_vectors(rows), np.ones(len(wanted), np.bool_)
    rows = pa.concat_tables([_columns(piece.folder, name, "embedding") for name in piece.files])
    taken = (rows if piece.part is None else piece.part.keep(rows)).take(wanted)
    return unit_vectors(taken), taken["embedding"].combine_chunks().is_valid().to_numpy(zero_copy_only=False)


def ids_of_part(folder: Folder, name: str) -> tuple[EmbeddingStamp | None, NDArray[np.int64]]:
    """The stamp and the ids of a file of vectors; no ids where it is damaged."""
    try:
        return part_footer(folder, name).stamp, read_part(folder, name)["id"].to_numpy()
    except (pa.ArrowException, OSError):
        return None, np.empty(0, np.int64)


def _indexed_ids(folder: Folder, version: int) -> NDArray[np.int64]:
    """Ids of all rows of an index, in their order."""
    ids: NDArray[np.int64] = open_dataset(folder, version).to_table(columns=["id"])["id"].to_numpy()
    return ids


def _ids(folder: Folder, part: EmbeddedPart) -> NDArray[np.int64]:
    """Of the rows of a part that count; here its bytes are compared, once for all reads of the run."""
    rows = part.keep(_columns(folder, part.name, "id", checksum=part.file_checksum))
    ids: NDArray[np.int64] = rows["id"].to_numpy()
    return ids


def _columns(folder: Folder, name: str, *columns: str, checksum: str | None = None) -> pa.Table:
    read = partial(read_part, folder, name, columns, checksum=checksum)
    try:
        return require_storage(f"reading {folder.uri}/{name}", read)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{folder.uri}/{name} cannot be read ({error}); run crem embed into that folder again: it replaces what is "
            "damaged"
        ) from error


def _described(stamp: EmbeddingStamp) -> str:
    tokens = "" if stamp.chorus_tokens is None else f" with {stamp.chorus_tokens} chorus tokens"
    return f"{stamp.fingerprint} ({stamp.model}){tokens}"
