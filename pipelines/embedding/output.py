"""What ``crem embed`` leaves in its output folder: the plan, a part per shard, and the manifest.

``plan.json`` is written first and says what the parts are of: the model and the input. A run into a folder with another
plan is refused. A part is written in one piece and carries the stamp of its model, so the parts themselves tell what an
interrupted run has finished. ``manifest.json`` is written last.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from typing import IO, ClassVar, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from crem.data.sequence import CutCount
from crem.errors import ConfigError
from pipelines.formats.unknown_columns import UnknownColumns
from pipelines.sources.records import FileStamp, RowRange
from pipelines.tables.json_file import JsonFile
from pipelines.tables.schema import EmbeddingStamp
from pipelines.tables.storage import Folder, JobKind

__all__ = [
    "EmbedManifest",
    "EmbedPlan",
    "EmbedShard",
    "ShardCounts",
    "finished_part",
    "first_error",
    "part_name",
    "start_or_resume",
    "write_part",
]

log = logging.getLogger(__name__)

_CUTS_KEY = b"crem_cuts"


class EmbedPlan(JsonFile):
    """What the parts in an output folder are of."""

    FILE: ClassVar[str] = "plan.json"

    fingerprint: str
    dim: int
    chorus_tokens: int | None = None
    model: str
    """Folder, URI or name of the checkpoint."""
    files: tuple[FileStamp, ...]
    """The input."""
    shards: tuple[int, ...]
    """Rows of each shard."""
    reading: dict[str, JsonValue] | None = None
    """How the input is read (``Detection.reading``); ``None`` in plans from before formats."""


class EmbedManifest(JsonFile):
    """The result of a completed run; ``rows_in == rows_out == embedded + errors``."""

    FILE: ClassVar[str] = "manifest.json"

    kind: Literal[JobKind.EMBED] = JobKind.EMBED
    fingerprint: str
    dim: int
    model: str
    rows_in: int
    rows_out: int
    embedded: int
    errors: int
    """Rows with an error in place of an embedding."""
    resumed: int
    """Rows that an earlier run had finished."""
    items_per_s: float
    """Of the rows that this run embedded."""
    cut: int = 0
    """Embedded items of which a text was longer than the model reads, and lost its end."""
    longest_text: int = 0
    """Tokens of the longest text, before any was cut."""
    max_text_tokens: int = 0
    """The model's limit."""

    @property
    def cut_sentence(self) -> str | None:
        """How many items lost the end of a text, for a person to read; ``None`` where none did."""
        return CutCount(self.embedded, self.cut, self.longest_text).sentence("items", self.max_text_tokens)


@dataclass(frozen=True)
class EmbedShard:
    """The rows that become one part."""

    number: int
    ranges: tuple[RowRange, ...]


@dataclass(frozen=True)
class ShardCounts:
    """Rows of one part."""

    embedded: int
    errors: int
    cuts: CutCount = field(default_factory=CutCount)
    unknown: UnknownColumns = field(default_factory=UnknownColumns)
    """Of the rows that this run embedded."""


def write_part(target: Folder, shard: int, table: pa.Table, cuts: CutCount) -> ShardCounts:
    """Write a shard's part, in one piece, with its count of cut texts in the metadata of its schema."""
    metadata = {**(table.schema.metadata or {}), _CUTS_KEY: json.dumps(asdict(cuts))}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd", write_page_checksum=True)
    target.write_bytes(sink.getvalue().to_pybytes(), part_name(shard))
    embedded = table["error"].null_count
    return ShardCounts(embedded=embedded, errors=table.num_rows - embedded, cuts=cuts)


def part_name(shard: int) -> str:
    """File name of a shard's part."""
    return f"part-{shard:06d}.parquet"


def start_or_resume(target: Folder, plan: EmbedPlan, *, fresh: bool) -> None:
    """Write the plan into an output folder that is new or has the same plan.

    Args:
        fresh: remove what an earlier run left, whatever its plan.

    Raises:
        ConfigError: the parts there are of another model or other input, or the plan there is damaged.
    """
    earlier = None if fresh else EmbedPlan.read(target)
    if earlier is None:
        if not fresh and target.exists(EmbedPlan.FILE):
            raise ConfigError(
                f"{target.uri}/{EmbedPlan.FILE} is damaged; give --fresh to embed all anew, or choose another --out"
            )
        target.remove(EmbedManifest.FILE)
        for name in target.files(".parquet"):
            target.remove(name)
    elif earlier.fingerprint != plan.fingerprint:
        raise ConfigError(
            f"{target.uri} holds embeddings of model {earlier.fingerprint} ({earlier.model}), and this model is "
            f"{plan.fingerprint} ({plan.model}); choose another --out, or remove that folder"
        )
    elif (earlier.files, earlier.shards) != (plan.files, plan.shards):
        raise ConfigError(
            f"{target.uri} was begun from other input: {_difference(earlier.files, plan.files)}; "
            "choose another --out, or remove that folder"
        )
    elif earlier.reading is not None and earlier.reading != plan.reading:
        changed = [k for k in plan.reading or {} if earlier.reading.get(k) != (plan.reading or {})[k]]
        raise ConfigError(
            f"{target.uri} was begun with another reading of the input: "
            + ", ".join(f"{k} was {earlier.reading.get(k)!r} and is {(plan.reading or {})[k]!r}" for k in changed)
            + "; choose another --out, or give --fresh"
        )
    plan.write(target)


def first_error(target: Folder) -> str:
    """The first error in the parts of an output folder."""
    for name in target.files(".parquet"):
        with target.open(name) as file:
            errors = pq.read_table(file, columns=["error"])["error"].drop_null()
        if len(errors):
            return str(errors[0].as_py())[:300]
    return "no part has an error"


def _difference(before: tuple[FileStamp, ...], now: tuple[FileStamp, ...]) -> str:
    changed = [f for f in now if f not in before] or [f for f in before if f not in now]
    return ", ".join(f"{f.file} ({f.size} bytes)" for f in changed[:3]) or "split into other shards"


def finished_part(target: Folder, shard: int, plan: EmbedPlan) -> ShardCounts | None:
    """Counts of a part that an earlier run wrote, or ``None`` where the shard has to be embedded."""
    name = part_name(shard)
    if not target.exists(name):
        return None
    try:
        with target.open(name) as file:
            part = _checked(file)
    except (pa.ArrowException, OSError):
        data = target.read_bytes(name)  # raises again if the storage failed, so that below only the file is to blame
        try:
            part = _checked(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            log.warning("%s is damaged (%s) and is embedded again", target.path(name), error)
            return None
    if part.stamp is None or part.stamp.fingerprint != plan.fingerprint or len(part.errors) != plan.shards[shard]:
        return None
    embedded = part.errors.null_count
    return ShardCounts(embedded=embedded, errors=len(part.errors) - embedded, cuts=part.cuts)


class _Part(NamedTuple):
    stamp: EmbeddingStamp | None
    errors: pa.ChunkedArray
    cuts: CutCount


def _checked(file: IO[bytes] | pa.BufferReader) -> _Part:
    """What a part says of itself; reads the whole part, to verify the checksums of its pages."""
    part = pq.ParquetFile(file, page_checksum_verification=True)
    metadata = part.schema_arrow.metadata or {}
    cuts = CutCount(**json.loads(metadata[_CUTS_KEY])) if _CUTS_KEY in metadata else CutCount()
    return _Part(EmbeddingStamp.of(part.schema_arrow), part.read()["error"], cuts)
