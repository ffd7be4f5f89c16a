"""What ``crem embed`` leaves in its output folder: parts, a ledger of each shard, the plan, and the manifest.

    rows/part-*.parquet        the parts, with nothing else beside them: any reader of Parquet takes the folder
    rows.lance/                or, with embed.output_format=lance, a Lance dataset (``lance_dataset``)
    ledger/shard-*.json        what each shard holds
    plan.json, manifest.json, input/, progress.jsonl

``plan.json`` is written first and says what the parts are of: the model, the input and the settings that decide
vectors. A run into a folder with another plan is refused. A *shard* is a group of pieces of the plan, up to a million
rows. Its vectors are staged in ``_work``, window by window, and become parts when all are there; then its ledger is
written, in one piece: the parts that a ledger lists belong to the output, and no others do. ``manifest.json`` is
written last.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from crem.data.sequence import CutCount
from crem.errors import ConfigError
from pipelines.tables.conditional_write import write_new
from pipelines.tables.json_file import JsonFile
from pipelines.tables.manifest import PartFile
from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder, JobKind

__all__ = [
    "DATASET",
    "LEDGER",
    "PART_FOLDERS",
    "PROGRESS",
    "EmbedManifest",
    "EmbedPlan",
    "ShardLedger",
    "check_plan",
    "create_ledger",
    "ledger_file",
    "part_name",
    "part_sizes",
    "parts_of",
    "read_ledger",
    "read_ledgers",
]

LEDGER = "ledger"
"""Folder of the ledgers."""
DATASET = "rows.lance"
"""Folder of the Lance dataset."""
PART_FOLDERS = {"parquet": "rows", "lance": f"{DATASET}/data"}
"""Where parts are, by ``embed.output_format``."""
PROGRESS = "progress.jsonl"
"""What the jobs said while they ran (``embed_progress``)."""


class EmbedPlan(JsonFile):
    """What the parts in an output folder are of."""

    FILE: ClassVar[str] = "plan.json"

    identity: str
    """Hash of the input and of the settings that decide the output."""
    fingerprint: str
    dim: int
    chorus_tokens: int | None = None
    model: str
    """Folder, URI or name of the checkpoint."""
    source: str
    files: int
    bytes: int
    """Of the input."""
    settings: dict[str, JsonValue]
    """How the input is read, and the columns of the output and their types."""
    row_bytes: int
    """Of the vector, the states and the memory of a row."""

    @property
    def output_format(self) -> str:
        return str(self.settings.get("output_format", "parquet"))

    @property
    def input(self) -> str:
        return f"{self.source} ({self.files} files, {self.bytes} bytes)"


class ShardLedger(BaseModel):
    """A shard that is done: ``rows == embedded + sum(failed)``."""

    model_config = ConfigDict(frozen=True)

    shard: int
    first_piece: int
    pieces: int
    rows: int
    embedded: int
    failed: dict[str, int]
    """Rows with an error in place of an embedding, by its reason."""
    cut: int
    """Embedded items of which a text lost its end."""
    longest_text: int
    tokens: int
    device_s: float
    """Seconds that models took for it."""
    prepare_s: float = 0.0
    """Seconds in which its items were read and prepared."""
    seconds: float = 0.0
    """From the model's first window of it to the last."""
    unknown: dict[str, int]
    """Rows that have a column which is not read."""
    embedded_again: int = 0
    """Rows of windows that were begun once more, because a process died; as often as they were."""
    prepared_again: int = 0
    """The same of pieces that were read and prepared."""
    fingerprint: str
    identity: str = ""
    """Of the plan."""
    parts: tuple[PartFile, ...]
    """Their names are paths from the output."""
    fragments: tuple[dict[str, Any], ...] = ()
    """What Lance says of each part, where they are fragments of a Lance dataset."""
    committed: str
    """Time, UTC."""


class EmbedManifest(JsonFile):
    """The result of a completed run; ``rows_in == rows_out == embedded + errors``."""

    FILE: ClassVar[str] = "manifest.json"

    kind: Literal[JobKind.EMBED] = JobKind.EMBED
    identity: str = ""
    """Of the plan."""
    fingerprint: str
    dim: int
    model: str
    rows_in: int
    rows_out: int
    embedded: int
    errors: int
    """Rows with an error in place of an embedding."""
    failed: dict[str, int] = Field(default_factory=dict)
    """The same by reason."""
    resumed: int
    """Rows that an earlier run had finished."""
    items_per_s: float
    """Of the rows that this run embedded."""
    seconds: float = 0.0
    """Of this run."""
    idle: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Share of the time in which the models waited: in the first, middle and last third of this run."""
    cost: float | None = None
    """Of the accelerators in this run, where ``embed.price_per_hour`` is set."""
    shards: int = 0
    parts: int = 0
    repeated_ids: int = 0
    """Rows whose id an earlier row has."""
    gone: int = 0
    """Rows in parts that count no more, because the input has changed (``live_parts``); in no other count."""
    embedded_again: int = 0
    """Rows of windows that were begun once more because a process died, in all runs; as often as they were."""
    prepared_again: int = 0
    """The same of pieces that were read and prepared."""
    tokens: int = 0
    """That the model read."""
    device_s: float = 0.0
    """Seconds that models took."""
    cut: int = 0
    """Embedded items of which a text was longer than the model reads, and lost its end."""
    longest_text: int = 0
    """Tokens of the longest text, before any was cut."""
    max_text_tokens: int = 0
    """The model's limit."""

    @classmethod
    def of(cls, plan: EmbedPlan, ledgers: list[ShardLedger], **of_run: Any) -> Self:
        """Of a run whose shards are all done; ``of_run`` has what the ledgers do not say."""
        failed = Counter[str]()
        for ledger in ledgers:
            failed.update(ledger.failed)
        rows = sum(ledger.rows for ledger in ledgers)
        return cls(
            identity=plan.identity,
            fingerprint=plan.fingerprint,
            dim=plan.dim,
            model=plan.model,
            rows_in=rows,
            rows_out=rows,
            embedded=sum(ledger.embedded for ledger in ledgers),
            errors=failed.total(),
            failed=dict(sorted(failed.items())),
            shards=len(ledgers),
            parts=len(parts_of(ledgers)),
            embedded_again=sum(ledger.embedded_again for ledger in ledgers),
            prepared_again=sum(ledger.prepared_again for ledger in ledgers),
            tokens=sum(ledger.tokens for ledger in ledgers),
            device_s=round(sum(ledger.device_s for ledger in ledgers), 3),
            cut=sum(ledger.cut for ledger in ledgers),
            longest_text=max(ledger.longest_text for ledger in ledgers),
            **of_run,
        )

    def is_of(self, ledgers: list[ShardLedger]) -> bool:
        """Whether these are the ledgers of all of its shards."""
        found = [ledger.shard for ledger in ledgers]
        return found == list(range(self.shards)) and sum(ledger.rows for ledger in ledgers) == self.rows_in

    @property
    def cut_sentence(self) -> str | None:
        """How many items lost the end of a text, for a person to read; ``None`` where none did."""
        return CutCount(self.embedded, self.cut, self.longest_text).sentence("items", self.max_text_tokens)


def check_plan(target: Folder, plan: EmbedPlan, *, grow: bool = False) -> bool:
    """Whether an output folder has this plan already.

    Args:
        grow: other files of the same source may be there.

    Raises:
        ConfigError: the parts there are of another model or other input, or the plan there is damaged.
    """
    earlier = EmbedPlan.read(target)
    if earlier is None:
        if target.exists(EmbedPlan.FILE):
            raise ConfigError(
                f"{target.uri}/{EmbedPlan.FILE} is damaged, or of an older crem; give --fresh to embed all anew, or "
                "choose another --out"
            )
        return False
    if earlier.fingerprint != plan.fingerprint:
        raise ConfigError(
            f"{target.uri} holds embeddings of model {earlier.fingerprint} ({earlier.model}), and this model is "
            f"{plan.fingerprint} ({plan.model}); choose another --out, or remove that folder"
        )
    if earlier.identity != plan.identity and not (grow and Folder.at(earlier.source) == Folder.at(plan.source)):
        raise ConfigError(
            f"{target.uri} was begun from other input: {earlier.input}, and now it is {plan.input}; "
            "choose another --out, give --fresh, or, where the same source has grown or changed, --grow"
        )
    if "output_format" not in earlier.settings:
        raise ConfigError(
            f"{target.uri} is of an older crem, whose parts stand beside {EmbedPlan.FILE}; crem index and crem verify "
            f"read them, and new ones go into {PART_FOLDERS['parquet']}/: choose another --out, or give --fresh"
        )
    changed = [name for name in plan.settings if earlier.settings.get(name) != plan.settings[name]]
    if changed:
        raise ConfigError(
            f"{target.uri} was begun with other settings: "
            + ", ".join(f"{k} was {earlier.settings.get(k)!r} and is {plan.settings[k]!r}" for k in changed)
            + "; choose another --out, or give --fresh"
        )
    return True


def part_name(shard: int, number: int, commit: str, output_format: str = "parquet") -> str:
    """Path of a part of a shard. ``commit`` names the attempt that wrote it: no other ever writes over it."""
    return f"{PART_FOLDERS[output_format]}/part-{shard:06d}-{number:04d}-{commit}.{output_format}"


def part_sizes(target: Folder) -> dict[str, int]:
    """Bytes of every file where parts are, by its path; names that readers of such folders skip are left out."""
    return {
        f"{folder}/{name}": size
        for folder in PART_FOLDERS.values()
        for name, size in target.child(folder).sizes().items()
        if not name.startswith((".", "_"))
    }


def ledger_file(shard: int) -> str:
    """Path of a shard's ledger."""
    return f"{LEDGER}/shard-{shard:06d}.json"


def create_ledger(target: Folder, ledger: ShardLedger) -> bool:
    """Commit a shard, unless another attempt has; whether it is ours. Of several at once exactly one succeeds."""
    return write_new(target, ledger.model_dump_json(indent=1).encode(), ledger_file(ledger.shard))


def read_ledger(target: Folder, shard: int) -> ShardLedger | None:
    """Of one shard; ``None`` where it is not done, or its ledger is damaged."""
    found = target.read_json(ledger_file(shard))
    try:
        return None if found is None else ShardLedger.model_validate(found)
    except ValidationError:
        return None


def read_ledgers(target: Folder) -> list[ShardLedger]:
    """Of all shards that are done, in their order.

    Raises:
        ConfigError: one is damaged.
    """

    def read(name: str) -> ShardLedger:
        try:
            return ShardLedger.model_validate(json.loads(target.read_bytes(LEDGER, name)))
        except (ValueError, ValidationError) as error:
            raise ConfigError(
                f"{target.uri}/{LEDGER}/{name} is damaged; run crem embed into that folder again with --repair"
            ) from error

    return in_threads(read, target.child(LEDGER).files(".json"))


def parts_of(ledgers: Iterable[ShardLedger]) -> list[PartFile]:
    """The parts of some shards, in order."""
    return [part for ledger in ledgers for part in ledger.parts]
