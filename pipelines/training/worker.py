"""One rank of a training run: take the newest checkpoint, run the loop, write the model.

Ray Train starts it on every rank and starts it again after a failure (``trainer.py``); the loop is ``crem.train.loop``.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Iterator

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.collective import broadcast_from_rank_zero

from crem.data.collator import Batch
from crem.distributed import sum_over_ranks
from crem.model.build import build_model
from crem.train.callbacks import Callback, ProgressReport
from crem.train.checkpoint_writer import CheckpointWriter
from crem.train.export import export
from crem.train.guard import LossGuard
from crem.train.loop import train_loop
from crem.train.optim import initialise
from crem.train.phases import Phase
from crem.train.state import load_state
from crem.train.validate import Validation
from pipelines.tables.storage_retry import retry_storage
from pipelines.training.best import BestModel
from pipelines.training.checkpoints import CHECKPOINTS, Checkpoints
from pipelines.training.feed import step_batches
from pipelines.training.held_out import validation_batches
from pipelines.training.messages import Exported, Message, Resumed, WorkerSpec, WorkerWarning
from pipelines.training.restore import RankPlace, fetch_newest
from pipelines.training.uploads import Uploads, upload_model
from pipelines.training.watch import HeartbeatSender
from pipelines.training.workspace import close_workspace, is_node_leader, open_workspace

__all__ = ["Worker"]

log = logging.getLogger(__name__)


class Worker:
    """A rank with its place in the run, its engine, and the uploads of its checkpoints."""

    def __init__(self, spec: WorkerSpec):
        logging.getLogger("deepspeed").setLevel(logging.WARNING)
        self.spec, self.config = spec, spec.config
        context = ray.train.get_context()
        self.rank, self.ranks = context.get_world_rank(), context.get_world_size()
        self.heartbeat = HeartbeatSender(spec.heartbeats, rank=self.rank, ranks=self.ranks)
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(self.config.train.threads_per_worker)
        attempt = broadcast_from_rank_zero(uuid.uuid4().hex[:8])
        self.workspace = open_workspace(f"{spec.out.uri} {spec.run}", ray.get_runtime_context().get_node_id(), attempt)
        self.checkpoints = Checkpoints(spec.out.child(CHECKPOINTS))
        self.uploads = Uploads(
            self.checkpoints,
            rank=self.rank,
            attempt=attempt,
            keep=self.config.train.keep_checkpoints,
            warn=self._warn,
        )

    def run(self) -> None:
        """Run the rank to the end."""
        start_step = self._start()
        train_loop(
            self.engine,
            step_batches(
                ray.get(self.spec.rows),
                self.spec.images,
                self.config,
                self.collator,
                start_step=start_step,
                rank=self.rank,
                ranks=self.ranks,
            ),
            self.config,
            self._callbacks(),
            start_step=start_step,
            device=self.device,
        )
        self._finish()

    def _start(self) -> int:
        """Build the engine, from the newest good checkpoint if there is one; returns the first step to make."""
        newest = fetch_newest(
            self.checkpoints,
            RankPlace(self.rank, self.ranks, is_node_leader(self.workspace), self.workspace),
            from_rank_zero=broadcast_from_rank_zero,
            any_rank=self._any_rank,
            warn=self._warn,
        )
        model, self.collator = build_model(self.config.model, texts=self.spec.texts, seed=self.config.train.seed)
        self.engine = initialise(model.to(self.device), self.config, self.device)
        if newest is None:
            return 0
        load_state(self.engine, newest.folder, run=self.spec.run)
        self._barrier()  # all have read before the first removes
        shutil.rmtree(newest.folder, ignore_errors=True)
        self._report(Resumed(newest.step, self.ranks))
        return newest.step

    def _callbacks(self) -> list[Callback]:
        """Those of the loop, in their order (``crem.train.callbacks``)."""
        config = self.config
        callbacks: list[Callback] = [
            self.heartbeat,
            LossGuard(config.train.explosion_factor, config.optim.warmup_steps),
        ]
        if self.spec.held_out is not None:
            callbacks += [
                Validation(self.engine, self._validation_batches, config, self.device),
                BestModel(self.spec.out, self.engine, self.collator),
            ]
        return [
            *callbacks,
            ProgressReport(config.train, self._report),
            CheckpointWriter(
                self.engine,
                self.uploads,
                self.workspace / f"save-{self.rank}",
                config.train,
                run=self.spec.run,
                device=self.device,
            ),
        ]

    def _finish(self) -> None:
        """Wait for the last checkpoint, tidy up, write the trained model."""
        self.uploads.finish()
        self._barrier()  # the last checkpoint is complete now, or never will be
        if self.rank == 0:
            self.uploads.tidy()
        steps = self.config.train.steps
        self.heartbeat.on_phase(steps, Phase.EXPORT)
        close_workspace(self.workspace)
        with tempfile.TemporaryDirectory() as exported:
            fingerprint = export(self.engine, self.collator, exported)
            if self.rank == 0:
                target = self.spec.out.child("model")
                retry_storage("writing the model", lambda: upload_model(exported, target))
                parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in self.engine.module.parameters())
                self._report(Exported(target.uri, fingerprint, steps, parameters))
        self.heartbeat.on_phase(steps, Phase.FINISHED)

    def _validation_batches(self) -> Iterator[tuple[Batch, Batch]]:
        rows = ray.get(self.spec.held_out)
        return validation_batches(rows, self.config, self.collator, rank=self.rank, ranks=self.ranks)

    def _report(self, message: Message) -> None:
        """To the driver, from rank 0."""
        if self.rank == 0:
            self.spec.queue.put(message)

    def _warn(self, text: str) -> None:
        """To the driver, from any rank."""
        log.warning("%s", text)
        self.spec.queue.put(WorkerWarning(text))

    def _any_rank(self, problem: bool) -> bool:
        """Whether any rank has a problem; every rank must call."""
        return bool(sum_over_ranks(torch.tensor(float(problem), device=self.device)))

    def _barrier(self) -> None:
        self._any_rank(False)
