"""Growing corpora: a run on a larger or changed input embeds what is new, and marks what is gone.

The unit is a file of the input, by name, size and version. Files that are new or changed are embedded by an ordinary run
into a folder of its own, ``generation-000001`` and so on, with plan, ledgers and staged windows: an interrupted growth
continues there. Rows of files that are gone or changed stay in their parts and are listed as ranges. Then
``growth.json`` is written, in one piece: until then readers (``live_parts``) see the state before. A row that changed
inside of a file has the whole file embedded anew, and a folder of images counts as one file.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crem.errors import ConfigError
from pipelines.embedding.input_files import PRESENT, Difference, compare, read_input_files, write_table
from pipelines.embedding.live_parts import GONE, Generation, Growth, LivePart, generation_parts, live_parts, read_gone
from pipelines.embedding.output import EmbedManifest
from pipelines.embedding.verify_embeddings import repeated_in
from pipelines.sources.sources import SourceFiles
from pipelines.tables import ray_tasks
from pipelines.tables.manifest import PartFile
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = ["Growing", "gone_ranges"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Growing:
    """An output that is complete, and the input that it is to have."""

    output: Folder
    before: Growth
    difference: Difference
    files: SourceFiles

    @classmethod
    def of(cls, output: Folder, files: SourceFiles) -> Growing:
        """Compare the input with what the output has.

        Raises:
            ConfigError: the output is not complete, or is of a crem that kept no table of the files.
        """
        growth = Growth.read(output)
        if growth is not None:
            present = read_input_files(output, growth.present_file)
        else:
            manifest = EmbedManifest.read(output)
            if manifest is None:
                raise ConfigError(
                    f"{output.uri} is not complete, so it cannot grow: run the same command without --grow on the input "
                    "that it was begun from, or give --fresh"
                )
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
                f"{output.uri} has no table of the files it was made from, so what is new is not known: it is damaged or "
                "of an older crem; give --fresh"
            )
        return cls(output, growth, compare(present, files.table), files)

    @property
    def nothing(self) -> bool:
        """Whether the input is what the output has."""
        return not len(self.difference.new) and not len(self.difference.gone)

    @property
    def number(self) -> int:
        return self.before.last + 1

    @property
    def folder(self) -> str:
        """Of the new generation."""
        return f"generation-{self.number:06d}"

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
        gone = read_gone(self.output, self.before) if self.before.gone_file else {}
        ranges: list[LivePart] = []
        for number, generation in generations.items():
            here = self.difference.gone.filter(pa.array(self.difference.gone["generation"].to_numpy() == number))
            found = list(_by_part(generation_parts(self.output, generation), here))
            failed: Counter[str] = Counter(generation.gone_failed)
            for reasons in ray_tasks.stream(partial(_gone_failed, folder=self.output), found):
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
        names = {name: f"{name}-{self.number:06d}.parquet" for name in ("gone", "present")}
        write_table(self.output, _gone_table(gone), names["gone"])
        write_table(self.output, pa.concat_tables(tables).cast(PRESENT), names["present"])
        growth = self._counted(identity, tuple(generations.values()), names)
        growth.write(self.output)
        growth = growth.model_copy(update={"repeated_ids": repeated_in(self.output, live_parts(self.output))})
        growth.write(self.output)
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


def _gone_failed(part: LivePart, *, folder: Folder) -> dict[str, int]:
    """In a worker: rows with an error among those that are gone, by reason."""

    def read() -> pa.ChunkedArray:
        with folder.open(part.file.name) as file:
            return pq.ParquetFile(file).read(columns=["error"])["error"]

    errors = require_storage(f"reading {folder.uri}/{part.file.name}", read)
    gone = errors.filter(pa.array(~part.is_live(0, len(errors)))).drop_null()
    return dict(Counter(error.partition(":")[0] for error in gone.to_pylist()))


def _gone_table(gone: dict[str, NDArray[np.int64]]) -> pa.Table:
    names = sorted(gone)
    ranges = np.concatenate([np.empty((0, 2), np.int64), *(gone[name] for name in names)])
    parts = np.repeat(np.array(names, object), [len(gone[name]) for name in names])
    return pa.table([pa.array(parts, pa.string()), ranges[:, 0], ranges[:, 1]], schema=GONE)
