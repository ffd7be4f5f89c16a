"""One rank of a training run: take the newest checkpoint, run the loop, write the model.

``worker`` is what Ray Train starts on every rank, and starts again after a failure; the loop is ``crem.train.loop``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.collective import broadcast_from_rank_zero

from crem.config import RunConfig
from pipelines.tables.storage import Folder
from pipelines.training.checkpoints import CHECKPOINTS, Checkpoints, Uploads, fetch_newest, leads, patiently, scratch
from pipelines.training.feed import step_batches
from pipelines.training.held_out import validation_batches
from pipelines.training.watch import Heart

__all__ = ["worker"]

log = logging.getLogger(__name__)


def worker(spec: dict[str, Any]) -> None:
    """Run one rank to the end; ``spec`` is made by ``pipelines.training.train``."""
    rank = _Rank(spec)
    start_step = rank.start()
    rank.train(start_step)
    rank.finish()


class _Rank:
    """What a rank has: its place in the run, the engine, and the uploads of its checkpoints."""

    def __init__(self, spec: dict[str, Any]):
        import torch

        logging.getLogger("deepspeed").setLevel(logging.WARNING)
        self.spec = spec
        self.config = RunConfig.model_validate(spec["config"])
        context = ray.train.get_context()
        self.rank, self.ranks = context.get_world_rank(), context.get_world_size()
        self.heart = Heart(spec["pulse"], rank=self.rank, ranks=self.ranks)
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(self.config.train.threads_per_worker)
        self.out = Folder.at(spec["out"])
        self.attempt = broadcast_from_rank_zero(uuid.uuid4().hex[:8])
        self.place = scratch(f"{self.out.uri} {spec['run']}", ray.get_runtime_context().get_node_id(), self.attempt)
        self.checkpoints = Checkpoints(self.out.child(CHECKPOINTS))
        self.uploads = Uploads(
            self.checkpoints,
            rank=self.rank,
            attempt=self.attempt,
            keep=self.config.train.keep_checkpoints,
            tell=self._tell,
        )

    def start(self) -> int:
        """Build the engine, from the newest good checkpoint where there is one; returns the first step to make."""
        from crem.model.build import build_model
        from crem.train.optim import initialise
        from crem.train.state import load_state

        newest = fetch_newest(
            self.checkpoints,
            self.place,
            rank=self.rank,
            ranks=self.ranks,
            leader=leads(self.place),
            from_rank_zero=broadcast_from_rank_zero,
            anywhere=self._anywhere,
            tell=self._tell,
        )
        seed = self.config.train.seed
        model, self.collator = build_model(self.config.model, texts=self.spec["texts"], seed=seed)
        self.engine = initialise(model.to(self.device), self.config, self.device)
        if newest is None:
            return 0
        folder, start_step = newest
        load_state(self.engine, folder, run=self.spec["run"])
        self._anywhere(False)  # all have read before the first removes
        shutil.rmtree(folder, ignore_errors=True)
        self._say(resumed=start_step, workers=self.ranks)
        return start_step

    def train(self, start_step: int) -> None:
        """The loop, with what it calls at its intervals."""
        from crem.train.loop import Progress, train_loop
        from crem.train.state import save_state
        from crem.train.validate import validate
        from pipelines.training.best import BestModel

        config, spec = self.config, self.spec

        def on_progress(progress: Progress) -> None:
            self._say(progress=progress.as_dict())

        def on_checkpoint(step: int, progress: Progress) -> None:
            self.uploads.make_room()
            local = self.place / f"save-{self.rank}"
            save_state(self.engine, local, step=step, run=spec["run"])
            self.uploads.start(local, step)

        best = BestModel(self.out, _upload) if spec["held_out"] else None

        def on_validation(step: int) -> dict[str, float]:
            assert best is not None
            rows = ray.get(spec["held_out"][0])
            held_out = validation_batches(rows, config, self.collator, rank=self.rank, ranks=self.ranks)
            terms = validate(self.engine, held_out, config.loss, self.device).as_dict()
            self.heart.phase(step - 1, "export")
            best.offer(step, terms, self.engine, self.collator)
            return terms

        train_loop(
            self.engine,
            step_batches(
                spec["rows"][0], config, self.collator, start_step=start_step, rank=self.rank, ranks=self.ranks
            ),
            config,
            start_step=start_step,
            device=self.device,
            on_progress=on_progress,
            on_checkpoint=on_checkpoint,
            on_phase=self.heart.phase,
            validate=on_validation if best else None,
        )

    def finish(self) -> None:
        """Wait for the last checkpoint, tidy up, write the trained model."""
        from crem.train.export import export

        self.uploads.finish()
        self._anywhere(False)  # now the last checkpoint is complete, if it ever will be
        if self.rank == 0:
            self.uploads.tidy()
        self.heart.phase(self.config.train.steps, "export")
        for empty in (self.place / "leader", self.place, *self.place.parents[:2]):  # the node's last leaves nothing
            with contextlib.suppress(OSError):
                empty.rmdir()
        with tempfile.TemporaryDirectory() as exported:
            fingerprint = export(self.engine, self.collator, exported)
            if self.rank:
                return
            target = self.out.child("model")
            patiently("writing the model", lambda: _upload(exported, target))
            parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in self.engine.module.parameters())
            result = {"model": target.uri, "fingerprint": fingerprint, "steps": self.config.train.steps}
            self._say(result={**result, "parameters": parameters})

    def _say(self, **message: Any) -> None:
        """To the driver, from rank 0."""
        if self.rank == 0:
            self.spec["queue"].put(message)

    def _tell(self, warning: str) -> None:
        log.warning("%s", warning)
        self.spec["queue"].put({"warning": warning})

    def _anywhere(self, problem: bool) -> bool:
        """Whether any rank has a problem; all ranks ask at once."""
        import torch

        from crem.distributed import sum_over_ranks

        return bool(sum_over_ranks(torch.tensor(float(problem), device=self.device)))


def _upload(folder: str, target: Folder) -> None:
    """Copy a finished checkpoint; ``crem.json``, without which it is no checkpoint, goes last."""
    from crem.checkpoint import CREM_FILE

    target.remove(CREM_FILE)
    for name in sorted(os.listdir(folder), key=lambda n: n == CREM_FILE):
        with open(os.path.join(folder, name), "rb") as source, target.open(name, mode="wb") as file:
            while block := source.read(2**24):
                file.write(block)
