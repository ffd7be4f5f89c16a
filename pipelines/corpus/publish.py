"""A complete set of parts becomes the output: the manifest that names them is swapped in, then the old parts go.

Until the manifest is replaced, in one piece, the output is what it was before, and whole. Parts have the version in
their names, so those of two versions stand side by side without harm. A job that is killed after the swap leaves old
parts behind, which no reader sees; the next run removes them.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
from collections.abc import Iterable
from importlib import metadata

from pydantic import JsonValue

from crem.errors import ConfigError
from pipelines.corpus.table_statistics import TableStatistics
from pipelines.corpus.work_plan import WORK
from pipelines.tables.manifest import (
    FILTER_STAGES,
    TABLES,
    PartFile,
    PrepareManifest,
    read_part_files,
    write_part_files,
)
from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder

__all__ = [
    "clusters_file",
    "finished",
    "foreign_files",
    "made_with",
    "manifest_of",
    "publish",
    "remove_old",
    "remove_work",
]

log = logging.getLogger(__name__)

_OURS = re.compile(
    rf"(({'|'.join(TABLES)})/part-\d{{6}}(-[0-9a-f]+(\.\d+)?)?|(clusters|files|statistics)-[0-9a-f]+(\.\d+)?)"
    r"\.(parquet|json)(\.[0-9a-f]{32}\.partial)?"
)
"""Names that ``crem prepare`` gives, or gave before parts had versions."""


def made_with() -> dict[str, str]:
    """Versions of Python and of the packages that decide the stored bytes."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in ("crem", "ray", "pyarrow", "pillow")
    }


def manifest_of(
    statistics: TableStatistics,
    *,
    plan: str,
    version: str,
    records_in: int,
    rows_in: int,
    unknown_columns: dict[str, int],
    layouts: list[dict[str, object]],
    source_uri: str,
    config: dict[str, JsonValue],
    parts: Iterable[PartFile],
) -> PrepareManifest:
    """The manifest of committed parts."""
    by_reason: dict[str, int] = {}
    for reasons in statistics.left_out.values():
        for reason, count in reasons.items():
            by_reason[reason] = by_reason.get(reason, 0) + count
    left_out = {stage: sum(reasons.values()) for stage, reasons in statistics.left_out.items()}
    filtered = sum(count for stage, count in left_out.items() if stage in FILTER_STAGES)
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part.table}\0{part.checksum}\n".encode())
    return PrepareManifest(
        rows_in=rows_in,
        rows_out=statistics.rows,
        rejected=sum(left_out.values()) - filtered,
        filtered=filtered,
        images=statistics.images,
        images_shrunk=statistics.images_shrunk,
        images_truncated=statistics.images_truncated,
        largest_source_pixels=statistics.largest_source_pixels,
        by_reason=dict(sorted(by_reason.items())),
        by_stage=statistics.left_out,
        by_split_task=statistics.by_split_task,
        source_uri=source_uri,
        created_with=made_with(),
        config=config,
        records_in=records_in,
        unknown_columns=unknown_columns,
        layouts=layouts,
        plan=plan,
        version=version,
        files=f"files-{version}.parquet",
        statistics=f"statistics-{version}.json",
        tables_checksum=digest.hexdigest(),
    )


def clusters_file(version: str) -> str:
    """Name of the table of clusters of duplicates; not there where none were found."""
    return f"clusters-{version}.parquet"


def publish(target: Folder, manifest: PrepareManifest, statistics: TableStatistics, parts: Iterable[PartFile]) -> None:
    """Make the parts the output.

    Raises:
        ConfigError: a part that was written is not there.
    """
    wrong = _first_wrong(target, parts)
    if wrong is not None:  # written by a node that joined meanwhile
        part, size = wrong
        raise ConfigError(
            f"{target.uri}/{part.table}/{part.name} was written with {part.bytes} bytes and has "
            f"{'none' if size is None else size} here: not all nodes share the folder; run again with --out on a "
            "file system that all nodes share, or an s3:// URI"
        )
    write_part_files(target, manifest.files, parts)
    target.write_json(statistics.model_dump(mode="json"), manifest.statistics)
    manifest.write(target)


def _first_wrong(target: Folder, parts: Iterable[PartFile]) -> tuple[PartFile, int | None] | None:
    """The first part that is not stored with its size, and the size that is."""
    stored = {table: target.child(table).sizes() for table in TABLES}
    sizes = ((part, stored[part.table].get(part.name)) for part in parts)
    return next(((part, size) for part, size in sizes if size != part.bytes), None)


def finished(target: Folder, plan: str) -> PrepareManifest | None:
    """The manifest of the output, if it was made by this plan and all of its parts are there."""
    manifest = PrepareManifest.read(target)
    if manifest is None or manifest.plan != plan:
        return None
    try:
        wrong = _first_wrong(target, read_part_files(target, manifest))
    except ConfigError as error:
        log.warning("%s; preparing anew", error)
        return None
    if wrong is None:
        return manifest
    log.warning("%s/%s/%s is missing or damaged; preparing anew", target.uri, wrong[0].table, wrong[0].name)
    return None


def foreign_files(target: Folder, manifest: PrepareManifest) -> list[str]:
    """Files in the folders of the tables, and lists beside them, that do not belong to the output."""
    listed: dict[str, set[str]] = {table: set() for table in TABLES}
    for part in read_part_files(target, manifest):
        listed[part.table].add(part.name)
    found = [f"{table}/{name}" for table in TABLES for name in target.child(table).files() if name not in listed[table]]
    own = {manifest.files, manifest.statistics, clusters_file(manifest.version)}
    lists = ("clusters-", "files-", "statistics-")
    return found + [name for name in target.files() if name.startswith(lists) and name not in own]


def remove_old(target: Folder, manifest: PrepareManifest) -> None:
    """Remove what an earlier version, or an interrupted run, left; the job holds the lease.

    Files with other names than the job gives are somebody's: they are named and stay.
    """
    foreign = foreign_files(target, manifest)
    ours = [name for name in foreign if _OURS.fullmatch(name)]
    in_threads(lambda name: target.remove(*name.split("/")), ours)
    if others := sorted(set(foreign) - set(ours)):
        log.warning(
            "%s holds %d files that crem did not write (%s); no job reads them, and they stay",
            target.uri,
            len(others),
            ", ".join(others[:4]),
        )
    work = target.child(WORK)
    for version in work.folders():
        remove_work(work, version)
    for folder in (WORK, "_staging"):
        target.remove(folder)


def remove_work(work: Folder, version: str) -> None:
    """Remove a version's work, a folder of a group of pieces at a time: together they may have millions of files."""
    for name in work.child(version).folders():
        of_groups = work.child(version).child(name)
        in_threads(of_groups.remove, of_groups.folders())
    work.remove(version)
