"""The actor that has the model: a window of prepared items becomes a staged file with their vectors.

Two windows are at work in an actor: while the model computes one, the other is unpickled, or its vectors are written.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import ray
import torch

from crem.config import EmbedConfig
from crem.data.sequence import CutCount, PreparedSequence
from crem.errors import CheckpointError, CremError, ItemError, ResourceError
from crem.model.backbone import compile_layers
from crem.model.encoding import Encoded, default_batch_tokens
from pipelines.embedding.attempts import Attempts
from pipelines.embedding.deadlines import arm, disarm
from pipelines.embedding.lone_items import embed_alone, lost_device
from pipelines.embedding.output import EmbedPlan
from pipelines.embedding.result_columns import ResultColumns
from pipelines.embedding.windows import ERROR, WINDOW, Window
from pipelines.tables import ray_tasks
from pipelines.tables.models import ModelLoader, load_model
from pipelines.tables.storage import Folder

__all__ = ["WindowCounts", "WindowEmbedder", "counts_of", "staged_file", "staged_place"]

log = logging.getLogger(__name__)

_COUNTS = b"crem_window"
_LAST = ".last"


@dataclass(frozen=True)
class WindowCounts:
    """What the driver hears of a window, and what its staged file says."""

    piece: int
    number: int
    last: bool
    embedded: int
    failed: dict[str, int] = field(default_factory=dict)
    """Rows with an error, by its reason."""
    cut: int = 0
    longest_text: int = 0
    tokens: int = 0
    device_s: float = 0.0
    """Seconds that the model took."""
    prepare_s: float = 0.0
    """Seconds in which its items were read and prepared."""
    ended: float = 0.0
    """When the model was done: seconds since 1970."""
    unknown: dict[str, int] = field(default_factory=dict)
    """Rows that have a column which is not read."""
    actor: str = ""
    attempt: int = 1
    """How often it was begun; more than once where processes died."""
    piece_attempt: int = 1
    """How often its piece was begun to be prepared."""

    @property
    def rows(self) -> int:
        return self.embedded + sum(self.failed.values())


class WindowEmbedder:
    """One model; embeds a window per call."""

    def __init__(
        self,
        work: Folder,
        plan: EmbedPlan,
        schema: pa.Schema,
        attempts: Attempts,
        config: EmbedConfig,
        load: ModelLoader = load_model,
    ):
        self.load = load
        self.model = load(plan.model, config.threads_per_actor, config.chorus_tokens)
        self.fingerprint = self.model.fingerprint
        self.work, self.plan, self.schema, self.attempts, self.config = work, plan, schema, attempts, config
        self.results = ResultColumns(schema)
        if config.compile:
            compile_layers(self.model.model.core)
        self.batch_size = config.batch_size
        self.batch_tokens = config.batch_tokens or default_batch_tokens(self.model.device)
        self.actor = ray.get_runtime_context().get_actor_id() or ""
        self.turn = threading.Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        results = [
            {"value": b"", "error": row[ERROR]} if row[ERROR] else ray_tasks.attempt(self.embed, row[WINDOW])
            for row in batch.to_pylist()
        ]
        return pa.Table.from_pylist(results)

    def embed(self, window: Window) -> WindowCounts:
        """Embed a window and write its staged file."""
        if self.fingerprint != self.plan.fingerprint:
            raise CheckpointError(
                f"{self.plan.model} changed during the run: it was {self.plan.fingerprint} and is "
                f"{self.fingerprint}; run again once nothing writes to it"
            )
        attempt = self.attempts.begin(window.piece, window.number)
        if attempt > 1 and (staged := self._staged(window)) is not None:
            return staged  # only the answer of the attempt before was lost
        with self.turn:
            began = time.perf_counter()
            window, encoded = self._embedded(window, careful=self.attempts.is_careful(attempt))
            device_s = time.perf_counter() - began
        cuts, errors = CutCount.of(window.sequences), window.columns["error"]
        reasons = Counter(error.partition(":")[0] for error in errors.drop_null().to_pylist())
        counts = WindowCounts(
            window.piece,
            window.number,
            window.last,
            errors.null_count,
            dict(sorted(reasons.items())),
            cuts.cut,
            cuts.longest,
            sum(sequence.tokens for sequence in window.sequences),
            round(device_s, 4),
            window.prepare_s,
            round(time.time(), 3),
            dict(sorted(window.unknown.counts.items())),
            self.actor,
            attempt,
            window.attempt,
        )
        self._write(window, encoded, counts)
        return counts

    def _staged(self, window: Window) -> WindowCounts | None:
        """The counts of the window's file, where there is one."""
        name = self._file(window)
        if not self.work.exists(name):
            return None
        return counts_of(pa.ipc.open_file(pa.BufferReader(self.work.read_bytes(name))).schema)

    def _embedded(self, window: Window, *, careful: bool) -> tuple[Window, Encoded]:
        """The window with the errors of items that cannot be embedded, and what the model gives of the others."""
        if not careful:
            try:
                return window, self._encoded(window.sequences)
            except (CremError, MemoryError):
                raise
            except Exception as error:
                if lost_device(error):
                    log.exception("piece %d: the device is lost to this process, which ends", window.piece)
                    os._exit(1)
                log.warning("piece %d: a forward failed (%s); its items go one by one", window.piece, error)
        return self._one_by_one(window)

    def _one_by_one(self, window: Window) -> tuple[Window, Encoded]:
        device = self.model.device.type
        del self.model  # the process apart has its own
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        config, plan = self.config, self.plan
        try:
            found = embed_alone(
                window.sequences,
                results=self.results,
                model=plan.model,
                chorus_tokens=config.chorus_tokens,
                device=device,
                threads=config.threads_per_actor,
                timeout_s=config.item_timeout_s,
                attempts=config.item_attempts,
            )
        finally:
            self.model = self.load(plan.model, config.threads_per_actor, config.chorus_tokens)
        failures = {n: str(one) for n, one in enumerate(found) if isinstance(one, ItemError)}
        return window.failing(failures), self.results.joined([one for one in found if isinstance(one, Encoded)])

    def _encoded(self, sequences: list[PreparedSequence]) -> Encoded:
        while True:
            try:
                return self.results.encode(
                    self.model,
                    sequences,
                    batch_size=self.batch_size,
                    batch_tokens=self.batch_tokens,
                    before_batch=self._set_deadline,
                )
            except (MemoryError, RuntimeError) as error:
                if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
                    raise
                if self.batch_tokens < max(sequence.tokens for sequence in sequences):
                    raise ResourceError(
                        f"an item of {max(sequence.tokens for sequence in sequences)} tokens does not fit in memory "
                        f"alone: {error}; lower model.image.max_pixels"
                    ) from error
            finally:
                disarm()
            self.batch_tokens //= 2  # for all windows to come: the first one found the limit
            log.warning("a batch did not fit in memory; from now on batches have %d tokens", self.batch_tokens)

    def _set_deadline(self, items: int) -> None:
        """For a forward; on a CPU one of many items may take long, and be well."""
        arm(self.config.item_timeout_s * (items if self.model.device.type == "cpu" else 1))

    def _write(self, window: Window, encoded: Encoded, counts: WindowCounts) -> None:
        valid = window.columns["error"].combine_chunks().is_null().to_numpy(zero_copy_only=False)
        results = self.results.columns(encoded, valid)
        columns = [results[name] if name in results else window.columns[name] for name in self.schema.names]
        metadata = {**(self.schema.metadata or {}), _COUNTS: json.dumps(asdict(counts))}
        table = pa.table(columns, schema=self.schema.with_metadata(metadata))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        self.work.write_bytes(sink.getvalue().to_pybytes(), self._file(window))

    def _file(self, window: Window) -> str:
        shard = window.piece // self.attempts.group_pieces
        return staged_file(shard, window.piece, window.number, window.last)


def staged_file(shard: int, piece: int, window: int, last: bool) -> str:
    """Path of a window's file in the work folder."""
    return f"staged/{shard:06d}/{piece:08d}-{window:04d}{_LAST if last else ''}.arrow"


def staged_place(name: str) -> tuple[int, int, bool]:
    """Piece, number and whether it is the last, by the name of a window's file."""
    piece, _, number = name.removesuffix(".arrow").partition("-")
    return int(piece), int(number.removesuffix(_LAST)), number.endswith(_LAST)


def counts_of(staged: pa.Schema) -> WindowCounts:
    """What a staged file says of its window."""
    return WindowCounts(**json.loads(staged.metadata[_COUNTS]))
