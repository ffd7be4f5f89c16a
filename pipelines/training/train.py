"""``crem train``: the joint training run, DeepSpeed under Ray Train.

The driver, below, finds the rows (not their content, which ``feed.py`` fetches) and starts the workers (``worker.py``);
the step that they repeat is ``crem.train.step``. What stays in the output folder:

    config.yaml, data.json   what the run is             metrics.jsonl, tensorboard/    one entry per log interval
    model/           the trained checkpoint              checkpoints/                   ``checkpoints.py``
    best/, best.json the model of the lowest validation  report.html                    curves, configuration, data

Ray Train restarts a run whose workers died; ``resume`` restarts one that was killed entirely. Either way the workers
take the newest good checkpoint, and the order of rows is a pure function of seed and step (``crem.data.mixing``), so
the run continues as if it had not stopped. The number of workers may change from one start to the next.
"""

from __future__ import annotations

import logging
from dataclasses import asdict

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crem.config import RunConfig
from crem.data.mixing import MixingPlan
from crem.errors import DivergenceError, TrainingError
from crem.fetch import local_copy
from pipelines.tables import session
from pipelines.tables.prepared import index_images, index_rows, load_rows
from pipelines.tables.ray_tasks import on_nodes, remote_errors
from pipelines.tables.richness import warn_of_small_images
from pipelines.tables.row_index import RowIndex
from pipelines.tables.shared_folders import require_readable_model, require_readable_tables, require_shared
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import retry_storage
from pipelines.training import run_folder
from pipelines.training.failed_step import FAILED_STEP, save_failed_step
from pipelines.training.follow import Follower
from pipelines.training.held_out import data_mix, split_rows, training_texts
from pipelines.training.messages import WorkerSpec
from pipelines.training.metrics_log import read_metrics
from pipelines.training.run_folder import RunStamp, TrainResult
from pipelines.training.trackers import check_tracker, open_tracker
from pipelines.training.trainer import fit
from pipelines.training.watch import HangWatch

__all__ = ["TrainResult", "train"]

log = logging.getLogger(__name__)

_DATA_CPUS = 1
"""Kept free beside the workers: the tasks that gather their rows need it."""
_TASK_CPUS = 0.25
"""Of a task that mostly waits for storage."""


def train(prepared: str, out: str, config: RunConfig, *, resume: bool = False, fresh: bool = False) -> TrainResult:
    """Train a CREM model on prepared tables.

    Args:
        prepared: folder or URI written by ``crem prepare``.
        out: folder or URI for the run.
        resume: continue the run in ``out`` from its newest checkpoint; if there is no run, start it.
        fresh: first remove what an earlier run left in ``out``.

    Raises:
        ConfigError: no training rows, or ``out`` holds a run and neither ``resume`` nor ``fresh`` is given, or a
            resumed run's configuration differs.
    """
    check_tracker(config.train.tracker)
    source, run = Folder.at(prepared), Folder.at(out)
    stamp = RunStamp.of(source)
    resumed = run_folder.claim(run, config, stamp, resume=resume, fresh=fresh)
    if resumed and (finished := run_folder.read_result(run)) is not None:
        log.info("the run in %s is complete; nothing to do", run.uri)
        return finished
    session.connect()
    require_readable_tables(prepared)
    warn_of_small_images(prepared, config.model.image.max_pixels)
    if config.model.backbone is not None:
        require_readable_model(config.model.backbone)
    require_shared(run)
    _require_devices(config)
    with remote_errors():
        if config.model.backbone is not None:
            ray.get(ray.remote(num_cpus=_DATA_CPUS)(local_copy).remote(config.model.backbone))  # a wrong one fails here
        images = ray.remote(num_cpus=_TASK_CPUS)(index_images).remote(prepared, each=on_nodes)
        rows = index_rows(prepared, split_prefix=("train", "validation"), each=on_nodes)
        training, held_out = split_rows(rows, config)
        ray.get(images)  # a damaged part fails here
    _log_plan(training.plan(config), held_out, config)
    run.remove(FAILED_STEP)
    if not resumed:  # only here: what was refused above has changed nothing
        run_folder.begin(run, config, stamp)

    # on this node: progress arrives for as long as the driver lives
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    tracker = open_tracker(run, config)
    watch = HangWatch(config.train.hang_timeout_s)
    spec = WorkerSpec(
        config=config,
        texts=training_texts(rows) if config.model.scratch is not None else None,
        rows=ray.put(training),
        images=images,
        held_out=ray.remote(num_cpus=_TASK_CPUS)(load_rows).remote(held_out, images) if held_out is not None else None,
        queue=queue,
        heartbeats=watch.board,
        out=run,
        run=run_folder.run_identity(config, stamp),
    )
    follower = Follower(queue, run, config, mix=data_mix(training, held_out), fresh=not resume, tracker=tracker)
    with remote_errors(), follower, watch:
        try:
            fit(spec)
        except DivergenceError as error:
            raise save_failed_step(error, training, config, run) from error
    result = _result(follower, training, run)
    retry_storage("writing the result", lambda: run_folder.write_result(run, result))
    return result


def _require_devices(config: RunConfig) -> None:
    train = config.train
    workers = train.min_workers or train.workers
    session.require(
        f"training with {workers} workers",
        cpus=workers * train.cpus_per_worker + _DATA_CPUS,
        gpus=workers * train.gpus_per_worker,
        remedy="lower train.workers (a divisor of train.global_batch), train.cpus_per_worker or "
        f"train.gpus_per_worker; {_DATA_CPUS} CPU is for the tasks that gather rows",
    )


def _log_plan(plan: MixingPlan, held_out: RowIndex | None, config: RunConfig) -> None:
    log.info(
        "%d retrieval rows, %d heterogeneous rows, %d for validation; %d steps of %d rows (%.1f epochs of the former)",
        len(plan.retrieval),
        len(plan.heterogeneous),
        len(held_out) if held_out is not None else 0,
        config.train.steps,
        config.train.global_batch,
        config.train.steps * plan.retrieval_per_step / max(1, len(plan.retrieval)),
    )


def _result(follower: Follower, training: RowIndex, run: Folder) -> TrainResult:
    if follower.exported is None:
        raise TrainingError(f"the run in {run.uri} ended without a result from its workers; run again with --resume")
    if follower.last is None and (entries := read_metrics(run)):  # this start had only the model to write
        metrics = entries[-1]
    else:
        metrics = follower.last.as_dict() if follower.last else {}
    return TrainResult(**asdict(follower.exported), rows=len(training), metrics=metrics)
