"""``embed.output_format=lance``: the parts of an output as the fragments of one Lance dataset, ``rows.lance``.

A part is a data file of the dataset. The commit of a shard (``shard_commit``) writes its files, which no version of the
dataset has yet, and its ledger lists them with what Lance says of each. When all shards have a ledger,
``commit_dataset`` makes one version of their fragments, in the order of the input. So a file of an attempt that did not
get its shard never comes into the dataset, and a commit that is done twice gives the same rows.

The files are written with pylance's ``LanceFragment.create``. lance-ray wraps it in a write of a Ray Dataset, whose
fragments are known to the driver alone until all are written: after a kill they would be lost, and their rows embedded
again.

While a run is under way the dataset has no version: other readers find none, and none that is half.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

import lance
import pyarrow as pa
from lance.fragment import LanceFragment
from pydantic import JsonValue

from pipelines.embedding.output import DATASET, PART_FOLDERS, ShardLedger
from pipelines.tables.hashing_sink import HashingSink
from pipelines.tables.lance_store import lance_failures, store_options
from pipelines.tables.manifest import PartFile
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = ["commit_dataset", "dataset_faults", "withdraw_dataset", "write_fragment"]

_FORMAT = "2.2"
"""Of the files. All of a dataset need the same: with pylance's own choice a newer one could not continue a run."""
_PIECE_BYTES = 8 * 2**20


def write_fragment(
    target: Folder, work: Folder, name: str, tables: Iterator[pa.Table]
) -> tuple[PartFile, dict[str, JsonValue]]:
    """Write a part; what it is, and what Lance says of it.

    The file is made on a local disk and copied, so that its checksum is of the bytes that Lance made.

    Args:
        work: a folder of the job; the file is made in it if it is on a local disk.
        tables: its rows, at least one.
    """
    first = next(tables)
    batches = chain.from_iterable(table.to_batches() for table in chain([first], tables))
    with tempfile.TemporaryDirectory(dir=work.path() if work.is_local else None) as place:
        reader = pa.RecordBatchReader.from_batches(first.schema, batches)
        with lance_failures(place):
            made = LanceFragment.create(place, reader, schema=first.schema, data_storage_version=_FORMAT)
        described = made.to_json()
        (file,) = described["files"]

        def write(opened: IO[bytes]) -> PartFile:
            sink = HashingSink(opened)
            with Path(place, "data", file["path"]).open("rb") as data:
                shutil.copyfileobj(data, sink, _PIECE_BYTES)
            return sink.part("embeddings", name, made.physical_rows)

        part = target.write_stream(write, name)
    file["path"] = name.removeprefix(f"{PART_FOLDERS['lance']}/")
    return part, described


def commit_dataset(target: Folder, ledgers: list[ShardLedger], schema: pa.Schema) -> None:
    """Make the parts of all shards the newest version of the dataset."""
    uri = f"{target.uri}/{DATASET}"
    texts = [json.dumps(fragment) for ledger in ledgers for fragment in ledger.fragments]
    operation = lance.LanceOperation.Overwrite(schema, [lance.FragmentMetadata.from_json(text) for text in texts])

    def commit() -> None:
        with lance_failures(uri):
            lance.LanceDataset.commit(uri, operation, storage_options=store_options(uri))

    require_storage(f"writing {uri}", commit)


def withdraw_dataset(target: Folder) -> None:
    """Remove the versions of the dataset, and what others have built on them; the files of the parts stay."""
    dataset = target.child(DATASET)
    for folder in dataset.folders():
        if f"{DATASET}/{folder}" not in PART_FOLDERS.values():
            dataset.remove(folder)


def dataset_faults(folder: Folder, ledgers: list[ShardLedger]) -> list[str]:
    """Where the newest version of the dataset is not what the ledgers list; the files themselves are not read."""
    uri = f"{folder.uri}/{DATASET}"

    def read() -> tuple[list[Any], bool]:
        with lance_failures(uri):
            dataset = lance.dataset(uri, storage_options=store_options(uri))
            fragments = [fragment.metadata for fragment in dataset.get_fragments()]
            return [fragment.to_json()["files"] for fragment in fragments], any(f.deletion_file for f in fragments)

    try:
        found, deleted = require_storage(f"reading {uri}", read)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        return [f"{DATASET} is not a dataset that can be read: {error}"]
    wanted = [fragment["files"] for ledger in ledgers for fragment in ledger.fragments]
    faults = [f"{DATASET} has rows that were deleted by another program"] if deleted else []
    names, listed = _paths(found), _paths(wanted)
    if missing := sorted(listed - names):
        faults.append(f"{DATASET} lacks {len(missing)} parts, {missing[0]} among them")
    if foreign := sorted(names - listed):
        faults.append(f"{DATASET} has {len(foreign)} files that belong to no shard, {foreign[0]} among them")
    if not faults and found != wanted:
        faults.append(f"{DATASET} has the parts in another order, or twice")
    return faults


def _paths(fragments: Iterable[Any]) -> set[str]:
    return {file["path"] for files in fragments for file in files}
