"""The pieces of an input through Ray Data, and the commit of each shard as soon as its last piece is staged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice

import pyarrow as pa
import ray
import ray.data

from crem.config import EmbedConfig
from pipelines.corpus import work_plan
from pipelines.corpus.work_plan import Piece, WorkPlan, read_pieces
from pipelines.embedding.attempts import Attempts
from pipelines.embedding.embed_progress import EmbedProgress
from pipelines.embedding.item_loading import LoaderSettings
from pipelines.embedding.output import EmbedPlan, ShardLedger
from pipelines.embedding.shard_commit import commit_shard, complete_pieces
from pipelines.embedding.window_embedder import WindowCounts, WindowEmbedder
from pipelines.embedding.windows import WindowMaker
from pipelines.tables import ray_tasks
from pipelines.tables.models import ModelLoader, load_model
from pipelines.tables.storage import Folder

__all__ = ["EmbedRun"]

log = logging.getLogger(__name__)

_PIECES_AT_ONCE = 8192
"""Pieces of one Ray Data execution, up to 33 million rows: its driver keeps some 10 KB for each."""
_COMMIT_RETRIES = 20
"""Of a commit whose process or node died."""
_CALLS_PER_ACTOR = 2
"""The model computes one window while another is unpickled or written."""


class EmbedRun:
    """Embeds what is not done yet."""

    def __init__(
        self,
        target: Folder,
        work: Folder,
        plan: EmbedPlan,
        pieces: WorkPlan,
        schema: pa.Schema,
        loader: LoaderSettings,
        config: EmbedConfig,
        run: str,
        load: ModelLoader = load_model,
    ):
        self.load = load
        self.target, self.work, self.plan, self.pieces = target, work, plan, pieces
        self.schema, self.config = schema, config
        self.attempts = Attempts(work, run, config.item_attempts, work_plan.GROUP_PIECES)
        self.maker = WindowMaker(loader, self.attempts, plan.row_bytes)
        self._missing: dict[int, set[int]] = {}
        self._windows: dict[int, tuple[set[int], int]] = {}
        self._commits: dict[ray.ObjectRef[ShardLedger], int] = {}

    def start(self, done: Sequence[ShardLedger]) -> int:
        """Find what is staged already; how many rows an earlier run has finished."""
        finished = {ledger.shard for ledger in done}
        self._missing = {n: set(self.pieces.group(n)) for n in range(self.pieces.groups) if n not in finished}
        staged = self.work.child("staged")
        resumed = sum(ledger.rows for ledger in done)
        for name in staged.folders():
            if int(name) in self._missing:
                pieces = complete_pieces(staged.child(name)) & self._missing[int(name)]
                self._missing[int(name)] -= pieces
                resumed += len(pieces) * self.pieces.records // self.pieces.pieces
        return min(resumed, self.pieces.records)

    def steps(self, progress: EmbedProgress) -> Iterator[None]:
        """Embed; yields often, so that the caller may look after its lease."""
        for shard, missing in list(self._missing.items()):
            if not missing:
                self._commit(shard)
        waiting = (piece for piece in read_pieces(self.work, self.pieces) if self._is_missing(piece.number))
        while pieces := list(islice(waiting, _PIECES_AT_ONCE)):
            for counts in ray_tasks.results(self._dataset(pieces)):
                progress.add(counts)
                self._staged(counts)
                self._collect(wait=False)
                yield
        while self._commits:
            self._collect(wait=True)
            yield

    def _is_missing(self, piece: int) -> bool:
        return piece in self._missing.get(piece // work_plan.GROUP_PIECES, ())

    def _dataset(self, pieces: list[Piece]) -> ray.data.Dataset:
        config = self.config
        most = min(config.max_actors, len(pieces))
        fewest = min(config.min_actors, most)
        return (
            ray_tasks.task_dataset(pieces)
            .map_batches(
                self.maker,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=config.cpus_per_task,
            )
            .map_batches(
                WindowEmbedder,
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=fewest, max_size=most, max_concurrent_calls_per_actor=_CALLS_PER_ACTOR
                ),
                num_cpus=config.cpus_per_actor,
                num_gpus=config.gpus_per_actor,
                fn_constructor_args=(self.work, self.plan, self.schema, self.attempts, config, self.load),
            )
        )

    def _staged(self, counts: WindowCounts) -> None:
        numbers, last = self._windows.get(counts.piece, (set(), -1))
        numbers.add(counts.number)
        last = counts.number if counts.last else last
        if last < 0 or len(numbers) <= last:
            self._windows[counts.piece] = numbers, last
            return
        self._windows.pop(counts.piece, None)
        shard = counts.piece // work_plan.GROUP_PIECES
        self._missing[shard].discard(counts.piece)
        if not self._missing[shard]:
            self._commit(shard)

    def _commit(self, shard: int) -> None:
        """In a task of its own, which waits for storage most of the time, beside those that embed."""
        in_task = ray.remote(num_cpus=0, max_retries=_COMMIT_RETRIES)(commit_shard)
        commit = in_task.remote(shard, self.pieces.group(shard), target=self.target, work=self.work, plan=self.plan)
        self._commits[commit] = shard

    def _collect(self, *, wait: bool) -> None:
        ready, _ = ray.wait(list(self._commits), timeout=1.0 if wait else 0) if self._commits else ([], [])
        for commit in ready:
            ledger = ray.get(commit)
            del self._commits[commit]
            log.debug("shard %d: %d rows in %d parts", ledger.shard, ledger.rows, len(ledger.parts))
