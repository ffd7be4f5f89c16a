"""Growing corpora: a run on a larger or changed input embeds what is new, and marks what is gone.

The unit is a file of the input, by name, size and version. Files that are new or changed are embedded by an ordinary
run into a folder of its own, ``generation-000001`` and so on, with plan, ledgers and staged windows: an interrupted
growth continues there. Rows of files that are gone or changed stay in their parts and are listed as ranges. Then
``growth.json`` is written, in one piece: until then readers (``live_parts``) see the state before. A row that changed
inside of a file has the whole file embedded anew, and a folder of images counts as one file.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crem.config import EmbedConfig
from crem.errors import ConfigError
from pipelines.corpus.work_plan import DraftPlan, draft_plan, identity_of
from pipelines.embedding.input_files import INPUT, PRESENT, Difference, compare, read_input_files, write_table
from pipelines.embedding.live_parts import (
    GENERATION,
    GONE,
    Generation,
    Growth,
    LivePart,
    generation_parts,
    gone_failed,
    live_parts_of,
    read_gone,
)
from pipelines.embedding.output import EmbedManifest, EmbedPlan, check_plan
from pipelines.embedding.verify_embeddings import damaged_parts, remove_output, repeated_in, run_manifest
from pipelines.sources.sources import SourceFiles
from pipelines.tables import ray_tasks
from pipelines.tables.manifest import PartFile
from pipelines.tables.storage import Folder

__all__ = ["Growing", "gone_ranges", "grow_output", "grown_already"]

log = logging.getLogger(__name__)

RunJob: TypeAlias = Callable[[Folder, EmbedPlan, SourceFiles, DraftPlan | None], EmbedManifest]
"""Embeds the files of a plan into a folder."""


def grow_output(
    output: Folder, plan: EmbedPlan, files: SourceFiles, run: RunJob, config: EmbedConfig, *, repair: bool
) -> EmbedManifest:
    """Bring an output up to date with its input; ``plan`` is that of the whole input.

    Raises:
        ConfigError: the output is of another model, other settings or another source, or is not complete.
    """
    check_plan(output, plan, grow=True)
    growing = Growing.of(output, files, thoroughly=repair)
    log.info("%s: %s", output.uri, growing.sentence)
    if growing.nothing:
        log.info("%s holds the vectors of this input already; nothing to do", output.uri)
        return _manifest_of(output, growing.before, plan, None)
    folder, made = output.child(growing.folder), None
    corpus = growing.corpus
    if len(corpus):
        identity = identity_of(corpus, config.rows_per_task)
        begun = EmbedPlan.read(folder)
        if begun is not None and begun.identity != identity:
            log.warning("%s was begun from another state of the input, and is begun anew", folder.uri)
            remove_output(folder)
        size = int(pc.sum(corpus.table["size"]).as_py())
        part = plan.model_copy(update={"identity": identity, "files": len(corpus), "bytes": size})
        made = run(folder, part, corpus, draft_plan(corpus, config.rows_per_task, None))
    return _manifest_of(output, growing.commit(plan.identity, made), plan, made)


def grown_already(output: Folder, plan: EmbedPlan, growth: Growth, *, repair: bool) -> EmbedManifest:
    """Of an output that was grown, in a run that does not grow it.

    Raises:
        ConfigError: the input is another by now, or damage is to be repaired.
    """
    check_plan(output, plan, grow=True)
    if growth.identity != plan.identity or repair:
        what = "damaged parts are embedded anew by --grow --repair" if repair else "new files are embedded by --grow"
        raise ConfigError(f"{output.uri} was grown before: {what}")
    log.info("%s holds the vectors of this input already; nothing to do", output.uri)
    return _manifest_of(output, growth, plan, None)


def _manifest_of(output: Folder, growth: Growth, plan: EmbedPlan, made: EmbedManifest | None) -> EmbedManifest:
    """Counts of the live rows, as a manifest to print; ``growth.json`` is what is stored."""
    last = growth.generations[-1].folder
    of_run = made or run_manifest(output.child(last) if last else output)
    assert of_run is not None, output.uri
    return of_run.model_copy(
        update={
            "identity": plan.identity,
            "rows_in": growth.rows,
            "rows_out": growth.rows,
            "embedded": growth.embedded,
            "errors": sum(growth.failed.values()),
            "failed": growth.failed,
            "resumed": growth.rows - (made.rows_out - made.resumed if made else 0),
            "items_per_s": made.items_per_s if made else 0.0,
            "repeated_ids": growth.repeated_ids,
            "gone": growth.gone,
        }
    )


@dataclass(frozen=True)
class Growing:
    """An output that is complete, and the input that it is to have."""

    output: Folder
    before: Growth
    difference: Difference
    files: SourceFiles
    given_up: bool = False
    """Whether a generation was damaged."""

    @classmethod
    def of(cls, output: Folder, files: SourceFiles, *, thoroughly: bool = False) -> Growing:
        """Compare the input with what the output has.

        A generation of which a part is damaged is given up: its files are embedded anew.

        Args:
            thoroughly: compare the checksum of every part, by reading it.

        Raises:
            ConfigError: the output is of a crem that kept no table of the files.
        """
        growth = Growth.read(output)
        if growth is not None:
            present = read_input_files(output, growth.present_file)
        else:
            manifest = EmbedManifest.read(output)
            assert manifest is not None, output.uri
            first = Generation(number=0, folder="", rows=manifest.rows_out, failed=manifest.failed)
            growth = Growth(
                identity=manifest.identity,
                fingerprint=manifest.fingerprint,
                generations=(first,),
                last=0,
                rows=manifest.rows_out,
                embedded=manifest.embedded,
                failed=manifest.failed,
                gone=0,
                repeated_ids=manifest.repeated_ids,
                gone_file="",
                present_file="",
            )
            present = read_input_files(output)
        if present is None:
            raise ConfigError(
                f"{output.uri} has no table of the files it was made from, so what is new is not known: it is damaged "
                "or of an older crem; give --fresh"
            )
        checked = growth.generations if thoroughly else ()
        bad = [run.number for run in checked if damaged_parts(output, generation_parts(output, run))]
        if bad:
            log.warning("%s: generations %s have damaged parts; their files are embedded anew", output.uri, bad)
            kept = tuple(generation for generation in growth.generations if generation.number not in bad)
            growth = growth.model_copy(update={"generations": kept})
            present = present.filter(pc.invert(pc.is_in(present["generation"], pa.array(bad))))
        return cls(output, growth, compare(present, files.table), files, given_up=bool(bad))

    @property
    def nothing(self) -> bool:
        """Whether the input is what the output has."""
        return not (len(self.difference.new) or len(self.difference.gone) or self.given_up)

    @property
    def number(self) -> int:
        return self.before.last + 1

    @property
    def folder(self) -> str:
        """Of the new generation."""
        return f"{GENERATION}{self.number:06d}"

    @property
    def corpus(self) -> SourceFiles:
        """The files to embed."""
        return replace(self.files, table=self.difference.new)

    @property
    def sentence(self) -> str:
        """What is to be done, for a person to read."""
        new, changed = len(self.difference.new), self.difference.changed
        return (
            f"{new - changed} files are new, {changed} changed, {len(self.difference.gone) - changed} gone, "
            f"{len(self.difference.kept)} as they were"
        )

    def commit(self, identity: str, made: EmbedManifest | None) -> Growth:
        """Make the generation a part of the output.

        Args:
            made: its manifest; ``None`` where nothing was to be embedded.
        """
        generations = {generation.number: generation for generation in self.before.generations}
        known = read_gone(self.output, self.before) if self.before.gone_file else {}
        parts = {part.name for run in generations.values() for part in generation_parts(self.output, run)}
        gone = {name: ranges for name, ranges in known.items() if name in parts}
        ranges: list[LivePart] = []
        for number, generation in generations.items():
            here = self.difference.gone.filter(pa.array(self.difference.gone["generation"].to_numpy() == number))
            found = list(_by_part(generation_parts(self.output, generation), here))
            failed: Counter[str] = Counter(generation.gone_failed)
            for reasons in ray_tasks.stream(partial(gone_failed, folder=self.output), found):
                failed.update(reasons)
            rows = int(here["rows"].to_numpy().sum())
            generations[number] = generation.model_copy(
                update={"gone": generation.gone + rows, "gone_failed": dict(sorted(failed.items()))}
            )
            ranges += found
        for part in ranges:
            both = np.concatenate([gone.get(part.file.name, part.gone[:0]), part.gone])
            gone[part.file.name] = both[np.argsort(both[:, 0])]
        tables = [self.difference.kept]
        if made is not None:
            generations[self.number] = Generation(
                number=self.number, folder=self.folder, rows=made.rows_out, failed=made.failed
            )
            added = read_input_files(self.output.child(self.folder), generation=self.number)
            assert added is not None, self.folder
            tables.append(added)
        names = {name: f"{INPUT}/{name}-{self.number:06d}.parquet" for name in ("gone", "present")}
        write_table(self.output, _gone_table(gone), names["gone"])
        write_table(self.output, pa.concat_tables(tables).cast(PRESENT), names["present"])
        growth = self._counted(identity, tuple(generations.values()), names)
        repeated = repeated_in(self.output, live_parts_of(self.output, growth))
        growth = growth.model_copy(update={"repeated_ids": repeated})
        if (first := EmbedManifest.read(self.output)) is not None:
            first.write(self.output.child(INPUT))
        growth.write(self.output)
        self.output.remove(EmbedManifest.FILE)  # whoever does not know of growth finds no complete output
        for name in (self.before.gone_file, self.before.present_file):
            if name:
                self.output.remove(name)
        return growth

    def _counted(self, identity: str, generations: tuple[Generation, ...], names: dict[str, str]) -> Growth:
        failed: Counter[str] = Counter()
        for generation in generations:
            failed.update(generation.failed)
            failed.subtract(generation.gone_failed)
        rows = sum(generation.rows - generation.gone for generation in generations)
        return Growth(
            identity=identity,
            fingerprint=self.before.fingerprint,
            generations=generations,
            last=self.number,
            rows=rows,
            embedded=rows - failed.total(),
            failed={reason: count for reason, count in sorted(failed.items()) if count},
            gone=sum(generation.gone for generation in generations),
            repeated_ids=0,
            gone_file=names["gone"],
            present_file=names["present"],
        )


def gone_ranges(
    part_rows: NDArray[np.int64], first: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ranges of rows of a run as ranges in its parts: part, first row and number of rows of each.

    Args:
        part_rows: rows of each part, in order.
        first, rows: of each range, in any order; ranges of neighbouring rows become one.
    """
    order = np.argsort(first[rows > 0])
    starts, stops = first[rows > 0][order], (first + rows)[rows > 0][order]
    apart = np.flatnonzero(starts[1:] != stops[:-1]) + 1
    starts = starts[np.concatenate([[0], apart])] if len(starts) else starts
    stops = stops[np.concatenate([apart - 1, [-1]])] if len(stops) else stops
    bounds = np.concatenate([[0], np.cumsum(part_rows)])
    from_part = np.searchsorted(bounds, starts, side="right") - 1
    to_part = np.searchsorted(bounds, stops, side="left")
    counts = to_part - from_part
    part = np.repeat(from_part, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.maximum(np.repeat(starts, counts), bounds[part])
    end = np.minimum(np.repeat(stops, counts), bounds[part + 1])
    return part, begin - bounds[part], end - begin


def _by_part(parts: list[PartFile], gone: pa.Table) -> Iterator[LivePart]:
    """The ranges of files that are gone, for each part that has any."""
    sizes = np.array([part.rows for part in parts], np.int64)
    part, first, rows = gone_ranges(sizes, gone["first"].to_numpy(), gone["rows"].to_numpy())
    for number in np.unique(part):
        here = part == number
        yield LivePart(parts[number], np.stack([first[here], rows[here]], axis=1))


def _gone_table(gone: dict[str, NDArray[np.int64]]) -> pa.Table:
    names = sorted(gone)
    ranges = np.concatenate([np.empty((0, 2), np.int64), *(gone[name] for name in names)])
    parts = np.repeat(np.array(names, object), [len(gone[name]) for name in names])
    return pa.table([pa.array(parts, pa.string()), ranges[:, 0], ranges[:, 1]], schema=GONE)
