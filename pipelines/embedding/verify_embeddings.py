"""Whether the output of ``crem embed`` is what its ledgers say, from what is stored alone."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crem.errors import ConfigError
from pipelines.corpus.work_plan import WORK
from pipelines.embedding.input_files import INPUT
from pipelines.embedding.lance_dataset import dataset_faults, withdraw_dataset
from pipelines.embedding.live_parts import (
    GENERATION,
    Growth,
    LivePart,
    every_gone,
    gone_failed,
    live_parts,
    live_parts_of,
    read_gone,
)
from pipelines.embedding.output import (
    DATASET,
    LEDGER,
    PART_FOLDERS,
    PROGRESS,
    EmbedManifest,
    EmbedPlan,
    ShardLedger,
    ledger_file,
    part_sizes,
    parts_of,
    read_ledger,
    read_ledgers,
)
from pipelines.tables import ray_tasks, schema, session
from pipelines.tables.manifest import PartFile
from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage
from pipelines.tables.vector_parts import checksum_of, part_footer, read_part

__all__ = [
    "EmbedVerification",
    "damaged_parts",
    "damaged_shards",
    "remove_output",
    "remove_shard",
    "remove_strangers",
    "repeated_ids",
    "repeated_in",
    "run_manifest",
    "stray_parts",
    "verify_embeddings",
]

log = logging.getLogger(__name__)

_HERE_IDS = 2_000_000
"""Ids that the driver compares; more are brought together by shuffles."""


@dataclass(frozen=True)
class EmbedVerification:
    """What was found."""

    shards: int
    parts: int
    rows: int
    embedded: int
    repeated_ids: int | None
    """Rows whose id an earlier row has; ``None`` where there are faults."""
    faults: tuple[str, ...]
    """A line each; empty where all is well."""
    gone: int = 0
    """Rows in parts that count no more."""


def verify_embeddings(place: str) -> EmbedVerification:
    """Read every part of an output and compare it with the ledgers and the manifest.

    Raises:
        ConfigError: there is no complete output of ``crem embed``, or a ledger is damaged.
    """
    folder = Folder.at(place)
    growth = Growth.read(folder)
    session.connect()
    with ray_tasks.remote_errors():
        if growth is None:
            return _verify_run(folder)
        runs = {g.folder: _verify_run(folder.child(g.folder) if g.folder else folder) for g in growth.generations}
        faults = [f"{name}/{fault}" if name else fault for name, run in runs.items() for fault in run.faults]
        faults += [] if faults else _growth_faults(folder, growth)
        repeated = None if faults else repeated_in(folder, live_parts(folder))
        if repeated is not None and repeated != growth.repeated_ids:
            faults.append(f"{repeated} ids are repeated, and {growth.FILE} says {growth.repeated_ids}")
    shards, parts = sum(run.shards for run in runs.values()), sum(run.parts for run in runs.values())
    return EmbedVerification(shards, parts, growth.rows, growth.embedded, repeated, tuple(faults), growth.gone)


def _growth_faults(folder: Folder, growth: Growth) -> list[str]:
    """Where an output that was grown contradicts its parts and itself."""
    parts = live_parts_of(folder, growth)
    generations = growth.generations
    gone = sum(int(ranges[:, 1].sum()) for ranges in read_gone(folder, growth).values())
    failed: Counter[str] = Counter()
    for reasons in ray_tasks.stream(partial(gone_failed, folder=folder), every_gone(folder, growth)):
        failed.update(reasons)
    counts = {
        "rows": (growth.rows, sum(part.rows for part in parts)),
        "embedded + failed": (growth.embedded + sum(growth.failed.values()), growth.rows),
        "gone": (growth.gone, gone),
        "rows of generations": (sum(g.rows - g.gone for g in generations), growth.rows),
        "failed of those gone": (sum(sum(g.gone_failed.values()) for g in generations), failed.total()),
    }
    wrong = {name: pair for name, pair in counts.items() if pair[0] != pair[1]}
    return [f"{growth.FILE} says {name} = {said}, and there are {found}" for name, (said, found) in wrong.items()]


def run_manifest(folder: Folder) -> EmbedManifest | None:
    """The manifest of a run; of the first run of an output that was grown it stands apart."""
    return EmbedManifest.read(folder) or EmbedManifest.read(folder.child(INPUT))


def _verify_run(folder: Folder) -> EmbedVerification:
    manifest, plan = run_manifest(folder), EmbedPlan.read(folder)
    if manifest is None or plan is None:
        raise ConfigError(f"{folder.uri} holds no complete output of crem embed; run crem embed into it")
    with ray_tasks.remote_errors():
        ledgers = read_ledgers(folder)
        faults = _part_faults(folder, ledgers, plan)
        listed = {part.name for part in parts_of(ledgers)}
        faults += [f"{name} belongs to no shard" for name in stray_parts(folder, ledgers)]
        faults += [fault for ledger in ledgers for fault in _ledger_faults(ledger)]
        shards = {ledger.shard for ledger in ledgers}
        faults += [f"shard {n} is missing" for n in range(manifest.shards) if n not in shards]
        faults += [f"shard {n} is none of the {manifest.shards}" for n in sorted(shards) if n >= manifest.shards]
        faults += [
            f"shard {ledger.shard} is of model {ledger.fingerprint}"
            for ledger in ledgers
            if ledger.fingerprint != plan.fingerprint
        ]
        sums = {
            "rows_out": sum(ledger.rows for ledger in ledgers),
            "embedded": sum(ledger.embedded for ledger in ledgers),
            "errors": sum(sum(ledger.failed.values()) for ledger in ledgers),
        }
        faults += [
            f"{manifest.FILE} says {name} = {getattr(manifest, name)} and the shards have {value}"
            for name, value in sums.items()
            if getattr(manifest, name) != value
        ]
        if plan.output_format == "lance":
            faults += dataset_faults(folder, ledgers)
        repeated = None if faults else repeated_ids(folder, ledgers)
        if repeated is not None and repeated != manifest.repeated_ids:
            faults.append(f"{repeated} ids are repeated, and {manifest.FILE} says {manifest.repeated_ids}")
    return EmbedVerification(len(ledgers), len(listed), sums["rows_out"], sums["embedded"], repeated, tuple(faults))


def damaged_shards(target: Folder, ledgers: list[ShardLedger], plan: EmbedPlan, *, thoroughly: bool) -> set[int]:
    """The shards of which a part is missing or damaged; their ledgers are removed, so that they are embedded again.

    Args:
        thoroughly: compare the checksum of every part, by reading it; else only its size.
    """
    of_shard = {ledger.shard: ledger for ledger in ledgers}
    if thoroughly:
        faults = dict(_faults_by_part(target, ledgers, plan))
        for ledger in ledgers:
            faults |= {part.name: fault for part in ledger.parts for fault in _ledger_faults(ledger)}
    else:
        sizes = part_sizes(target)
        faults = {
            part.name: f"{part.name} has {sizes.get(part.name, 'no')} bytes and was written with {part.bytes}"
            for part in parts_of(ledgers)
            if sizes.get(part.name) != part.bytes
        }
    bad = {ledger.shard: faults[part.name] for ledger in ledgers for part in ledger.parts if part.name in faults}
    for shard, fault in sorted(bad.items()):
        log.warning("%s: %s; shard %d is embedded again", target.uri, fault, shard)
        remove_shard(target, of_shard[shard])
    return set(bad)


def damaged_parts(folder: Folder, parts: list[PartFile]) -> list[str]:
    """What is wrong with some parts, by reading them."""
    found = ray_tasks.stream(partial(_fault, folder=folder, plan=None), parts)
    return [fault[1] for fault in found if fault is not None]


def remove_shard(target: Folder, ledger: ShardLedger) -> None:
    """Remove a shard, so that it is embedded again."""
    target.remove(ledger_file(ledger.shard))
    in_threads(target.remove, [part.name for part in ledger.parts])


def remove_strangers(target: Folder, plan: EmbedPlan) -> None:
    """Remove ledgers that are damaged or of another plan, and the parts that no ledger lists: their shards are missing
    then, and are embedded again."""
    kept: list[ShardLedger] = []
    for name in target.child(LEDGER).files():
        number = name.removeprefix("shard-").removesuffix(".json")
        ledger = read_ledger(target, int(number)) if number.isdecimal() else None
        of_plan = ledger is not None and (ledger.fingerprint, ledger.identity) == (plan.fingerprint, plan.identity)
        if ledger is not None and of_plan and ledger_file(ledger.shard) == f"{LEDGER}/{name}":
            kept.append(ledger)
            continue
        log.warning("%s/%s/%s is damaged or of another plan; it is removed", target.uri, LEDGER, name)
        target.remove(LEDGER, name)
    for name in stray_parts(target, kept):
        log.warning("%s/%s belongs to no shard; it is removed", target.uri, name)
        target.remove(name)


def stray_parts(target: Folder, ledgers: list[ShardLedger]) -> list[str]:
    """Files among the parts that no ledger lists: of an attempt that did not get its shard, or from elsewhere."""
    listed = {part.name for part in parts_of(ledgers)}
    return [name for name in part_sizes(target) if name not in listed]


def remove_output(target: Folder) -> None:
    """Remove what an earlier embedding run left."""
    withdraw_dataset(target)
    for name in (Growth.FILE, EmbedManifest.FILE, INPUT, LEDGER, WORK, PROGRESS, EmbedPlan.FILE):
        target.remove(name)
    in_threads(target.remove, [*part_sizes(target), *target.files(".parquet")])  # the latter of older versions of crem
    for name in (*PART_FOLDERS.values(), DATASET):
        target.remove(name)
    for folder in target.folders():
        if folder.startswith(GENERATION):
            target.remove(folder)


def repeated_ids(folder: Folder, ledgers: list[ShardLedger]) -> int:
    """Rows whose id an earlier row has."""
    return repeated_in(folder, [LivePart(part) for part in parts_of(ledgers)])


def repeated_in(folder: Folder, parts: list[LivePart]) -> int:
    """The same of the rows that count of some parts."""
    rows = sum(part.rows for part in parts)
    if rows <= _HERE_IDS:
        found = ray_tasks.stream(partial(_ids, folder=folder), parts, together=4)
        return _repeats(np.concatenate([np.empty(0, np.int64), *found]))
    rounds = ray_tasks.shuffle_rounds(rows)
    return sum(_repeated_in_round(folder, parts, number, rounds) for number in range(rounds))


def _repeated_in_round(folder: Folder, parts: list[LivePart], number: int, rounds: int) -> int:
    """Of the ids of one shuffle, which takes a share that fits the CPUs."""
    buckets = ray_tasks.shuffle_buckets()

    def entries(batch: dict[str, NDArray[Any]]) -> pa.Table:
        ids = np.concatenate([_ids(pickle.loads(name), folder=folder) for name in batch[ray_tasks.TASK]])
        ids = ids[ids % rounds == number]
        return pa.table({"id": ids, "bucket": ids // rounds % buckets})

    def repeats(bucket: pa.Table) -> pa.Table:
        return pa.table({"repeated": pa.array([_repeats(bucket["id"].to_numpy())], pa.int64())})

    counted = (
        ray_tasks.task_dataset(parts, together=4)
        .map_batches(entries, batch_size=1)
        .groupby("bucket", num_partitions=buckets)
        .map_groups(repeats, batch_format="pyarrow")
    )
    return int(sum(row["repeated"] for row in counted.iter_rows()))


def _repeats(ids: NDArray[np.int64]) -> int:
    return len(ids) - len(np.unique(ids))


def _ids(part: LivePart, *, folder: Folder) -> NDArray[np.int64]:
    """In a worker: the ids of a part, as far as rows have one; of other types than whole numbers a hash of each."""

    def read() -> pa.ChunkedArray:
        return part.keep(read_part(folder, part.file.name, ["id"]))["id"].drop_null()

    ids = require_storage(f"reading {folder.uri}/{part.file.name}", read)
    if pa.types.is_integer(ids.type):
        return np.asarray(ids.combine_chunks().cast(pa.uint64() if ids.type == pa.uint64() else pa.int64())).view(
            np.int64
        )
    values = [schema.content_id(repr(value).encode(errors="surrogatepass")) for value in ids.to_pylist()]
    return np.array(values, np.int64)


def _ledger_faults(ledger: ShardLedger) -> list[str]:
    """What in a ledger contradicts itself."""
    failed, parts = sum(ledger.failed.values()), sum(part.rows for part in ledger.parts)
    faults = []
    if ledger.rows != ledger.embedded + failed:
        faults.append(f"shard {ledger.shard}: {ledger.rows} rows are not {ledger.embedded} embedded + {failed} failed")
    if ledger.rows != parts:
        faults.append(f"shard {ledger.shard} has {ledger.rows} rows, and its parts have {parts}")
    described = [(f"{PART_FOLDERS['lance']}/{f['files'][0]['path']}", f["physical_rows"]) for f in ledger.fragments]
    if ledger.fragments and described != [(part.name, part.rows) for part in ledger.parts]:
        faults.append(f"shard {ledger.shard} lists other fragments than parts")
    return faults


def _part_faults(folder: Folder, ledgers: list[ShardLedger], plan: EmbedPlan) -> list[str]:
    return [fault for _, fault in sorted(_faults_by_part(folder, ledgers, plan))]


def _faults_by_part(folder: Folder, ledgers: list[ShardLedger], plan: EmbedPlan | None = None) -> list[tuple[str, str]]:
    check = partial(_fault, folder=folder, plan=plan)
    found = ray_tasks.stream(check, parts_of(ledgers))
    return [fault for fault in found if fault is not None]


def _fault(part: PartFile, *, folder: Folder, plan: EmbedPlan | None) -> tuple[str, str] | None:
    """In a worker: what is wrong with a part, if anything is."""
    try:
        found, size = require_storage(f"reading {folder.uri}/{part.name}", partial(checksum_of, folder, part.name))
    except FileNotFoundError:
        return part.name, f"{part.name} is missing"
    if found != part.checksum:
        return part.name, f"{part.name} has other bytes than were written ({size}, and {part.bytes} were)"
    footer = part_footer(folder, part.name)
    stamp = footer.stamp
    if plan is not None and (stamp is None or stamp.fingerprint != plan.fingerprint):
        return part.name, f"{part.name} is of model {stamp and stamp.fingerprint}, and the output of {plan.fingerprint}"
    if plan is not None and stamp is not None:
        for name, value in stamp.types().items():
            if value != plan.settings.get(name):
                return part.name, f"{part.name} has {name}={value}, and the output {name}={plan.settings.get(name)}"
    if footer.rows != part.rows:
        return part.name, f"{part.name} has {footer.rows} rows, and its ledger says {part.rows}"
    return None
