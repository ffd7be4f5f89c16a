"""``crem index``: the vectors of ``crem embed``, their keys and columns as a Lance dataset that can be searched.

1. *Compare*: the parts of the embeddings with those of the index, by name and checksum. If they are the same, nothing
   is done.
2. *Write* (``index_rows``): a task for each new part; rows of parts that are gone or changed are deleted. One commit.
3. *Index*: small fragments are joined, vectors above ``index.exact_below`` get an inverted file (``vector_index``).
4. *Publish*: recall is measured, ``index.json`` names the new version, and old versions are removed.

Searches read the version before until step 4. Vectors have unit length, so the inner product is the cosine. An index
belongs to one model: embeddings of several are refused, and those of another replace it.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from lance.optimize import Compaction

from crem.config import IndexConfig, RunConfig
from crem.errors import ConfigError
from pipelines.search.embedded_parts import EmbeddedPart, EmbeddedParts, survey
from pipelines.search.index_dataset import (
    VECTOR_INDEX,
    WORK,
    IndexedPart,
    IndexSummary,
    open_dataset,
    read_indexed_parts,
    remove_indexed_parts,
    write_indexed_parts,
)
from pipelines.search.index_rows import WrittenPart, dataset_schema, replace_all_rows, replace_rows, write_parts
from pipelines.search.recall import measure_recall
from pipelines.search.vector_index import index_columns, index_vectors
from pipelines.tables import ray_tasks, session, shared_folders
from pipelines.tables.lease import Lease
from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder, JobKind

__all__ = ["build"]

log = logging.getLogger(__name__)

_HERE_BYTES = 512 * 2**20
"""Embeddings up to so many bytes are indexed in this process, if it is not on a cluster: Ray takes seconds to start."""
_FRAGMENT_BYTES = 64 * 2**20
"""Fragments with fewer bytes of vectors are joined."""
_S = TypeVar("_S")
_T = TypeVar("_T")


def build(embeddings: str, out: str, config: RunConfig, *, fresh: bool = False) -> IndexSummary:
    """Index the output of ``crem embed``, or bring an index of it up to date.

    Args:
        fresh: do not use what the index holds; searches read it until the new one is complete.

    Raises:
        ConfigError: there are no embeddings, their run did not finish, parts are missing or damaged, several models
            made them, or all rows are errors; another job writes ``out``; or a node of the cluster does not see a local
            ``out``.
    """
    source, target = Folder.at(embeddings), Folder.at(out)
    embedded = survey(source)
    target.claim(JobKind.INDEX)
    remote = session.on_cluster() or sum(part.bytes for part in embedded.parts) > _HERE_BYTES
    if remote:
        session.connect()
        shared_folders.require_shared(target)
    with Lease.take(target, JobKind.INDEX) as lease, ray_tasks.remote_errors():
        each = ray_tasks.stream if remote else in_threads
        return _Build(embedded, target, config.index, lease, each).run(fresh=fresh)


@dataclass(frozen=True)
class _Build:
    """A build that holds the lease of its output."""

    embedded: EmbeddedParts
    target: Folder
    config: IndexConfig
    lease: Lease
    each: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

    def run(self, *, fresh: bool) -> IndexSummary:
        began, schema = time.monotonic(), dataset_schema(self.embedded)
        self._check_columns(schema)
        summary = None if fresh else IndexSummary.read(self.target)
        base = None if summary is None else self._base(summary, schema)
        kept = [] if base is None or summary is None else read_indexed_parts(self.target, summary.version)
        new, gone, kept = self._differences(kept)
        settings = self.config.model_dump(mode="json")
        if base is not None and summary is not None and not new and not gone and summary.settings == settings:
            log.info(
                "%s holds the %d vectors of these embeddings already; nothing to do", self.target.uri, summary.count
            )
            return summary.model_copy(update={"added": 0, "removed": 0, "build_s": 0.0})
        written = self._write(schema, new, kept)
        self.lease.check()
        if base is None:
            replace_all_rows(self.target, schema, written)
        elif new or gone:
            replace_rows(base, self.target, [part.number for part in gone], written)
        parts = sorted([*kept, *(part.part for part in written)], key=lambda part: part.number)
        kind = self._index()
        summary = self._summary(kind, parts, settings, time.monotonic() - began).model_copy(
            update={
                "added": sum(part.part.indexed for part in written),
                "removed": sum(part.indexed for part in gone),
            }
        )
        self._publish(summary, parts)
        return summary

    def _check_columns(self, schema: Any) -> None:
        if missing := [name for name in self.config.filters if name not in schema.names]:
            raise ConfigError(
                f"index.filters names {missing[0]!r}, and the embeddings have {', '.join(schema.names[:-1])}; embed "
                f"with 'embed.keep=[{missing[0]}]'"
            )

    def _base(self, summary: IndexSummary, schema: Any) -> Any | None:
        """The dataset to continue from, at the complete version; ``None`` where all is to be written anew."""
        if summary.fingerprint != self.embedded.stamp.fingerprint:
            log.info("%s was of model %s; all is indexed anew", self.target.uri, summary.fingerprint)
            return None
        dataset = open_dataset(self.target, summary.version)
        if dataset.schema != schema:
            log.info("%s has other columns than the embeddings; all is indexed anew", self.target.uri)
            return None
        if dataset.latest_version != summary.version:  # a build was interrupted after a commit
            dataset.restore()
            dataset = open_dataset(self.target)
        return dataset

    def _differences(
        self, indexed: list[IndexedPart]
    ) -> tuple[list[EmbeddedPart], list[IndexedPart], list[IndexedPart]]:
        """Parts to write, those to delete, and those that stay."""
        wanted = {(part.name, part.checksum) for part in self.embedded.parts}
        present = {(part.part.name, part.part.checksum) for part in indexed}
        new = [part for part in self.embedded.parts if (part.name, part.checksum) not in present]
        gone = [part for part in indexed if (part.part.name, part.part.checksum) not in wanted]
        return new, gone, [part for part in indexed if (part.part.name, part.part.checksum) in wanted]

    def _write(self, schema: Any, new: list[EmbeddedPart], kept: list[IndexedPart]) -> list[WrittenPart]:
        first = max((part.number for part in kept), default=-1) + 1
        log.info("indexing %d of %d parts", len(new), len(self.embedded.parts))
        written = write_parts(self.embedded.folder, self.target, schema, list(enumerate(new, first)), self.each)
        if not sum(part.indexed for part in [*kept, *(part.part for part in written)]):
            raise ConfigError(
                f"none of the {self.embedded.rows} rows of {self.embedded.folder.uri} has an embedding; its column "
                "error says why"
            )
        return written

    def _index(self) -> str:
        """Join small fragments and index the newest version."""
        rows = max(1, _FRAGMENT_BYTES // (4 * self.embedded.stamp.dim))
        plan = Compaction.plan(open_dataset(self.target), {"target_rows_per_fragment": rows})
        if plan.num_tasks():
            rewrites = list(self.each(partial(_rewrite, target=self.target), plan.tasks))
            Compaction.commit(open_dataset(self.target), rewrites)
        kind = index_vectors(open_dataset(self.target), self.target, self.config, self.each)
        index_columns(open_dataset(self.target), self.config)
        return kind

    def _summary(self, kind: str, parts: list[IndexedPart], settings: dict[str, Any], seconds: float) -> IndexSummary:
        dataset, stamp, count = open_dataset(self.target), self.embedded.stamp, sum(part.indexed for part in parts)
        found = dataset.count_rows()
        if found != count:
            raise RuntimeError(f"{count} vectors went into {self.target.uri}, and {found} are there")
        recall = 1.0 if kind == "exact" else None
        if recall is None and self.config.recall_sample:
            probing = {"nprobes": self.config.probes, "refine_factor": self.config.refine}
            recall = measure_recall(dataset, self.target, self.config.recall_sample, self.each, **probing)
        stored = sum(file.file_size_bytes or 0 for f in dataset.get_fragments() for file in f.metadata.files)
        indexed = sum(i.total_size_bytes or 0 for i in dataset.describe_indices() if i.name == VECTOR_INDEX)
        return IndexSummary(
            version=dataset.version,
            fingerprint=stamp.fingerprint,
            model=stamp.model,
            chorus_tokens=stamp.chorus_tokens,
            dim=stamp.dim,
            vector=stamp.vector,
            count=count,
            skipped=self.embedded.rows - count,
            parts=len(parts),
            index=kind,
            probes=self.config.probes,
            refine=self.config.refine,
            recall_at_10=recall,
            full_text=self.config.full_text,
            source=self.embedded.source,
            build_s=round(seconds, 2),
            bytes_per_vector=round(stored / count, 1),
            index_bytes_per_vector=round(indexed / count, 1),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            settings=settings,
        )

    def _publish(self, summary: IndexSummary, parts: list[IndexedPart]) -> None:
        """Make the newest version the index, and remove versions that no search reads."""
        write_indexed_parts(self.target, summary.version, parts)
        dataset = open_dataset(self.target)
        dataset.tags.create(f"complete-{summary.version:06d}", summary.version)
        self.lease.check()
        summary.write(self.target)
        log.info(
            "indexed %d vectors (%s), skipped %d rows with an error", summary.count, summary.index, summary.skipped
        )
        tags = sorted(dataset.tags.list().items(), key=lambda tag: tag[1]["version"])
        for name, _ in tags[: -self.config.keep_versions]:
            dataset.tags.delete(name)
        kept = [tag["version"] for _, tag in tags[-self.config.keep_versions :]]
        dataset.cleanup_old_versions(older_than=timedelta(0), error_if_tagged_old_versions=False)
        remove_indexed_parts(self.target, kept)
        self.target.remove(WORK)


def _rewrite(task: Any, *, target: Folder) -> Any:
    """In a worker: join some fragments."""
    return task.execute(open_dataset(target))
