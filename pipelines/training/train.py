"""``crem train``: the joint training run, DeepSpeed under Ray Train.

The driver, below, reads the rows and starts the workers (``worker.py``); the step that they repeat is
``crem.train.step``. What stays in the output folder:

    config.yaml, data.json   what the run is             metrics.jsonl, tensorboard/    one entry per log interval
    model/           the trained checkpoint              checkpoints/                   ``checkpoints.py``
    best/, best.json the model of the lowest validation  report.html                    curves, configuration, data

A run whose workers died is started again by Ray Train, and one that was killed as a whole with ``resume``: the workers
take the newest good checkpoint, and the order of rows is a pure function of seed and step (``crem.data.mixing``), so
the run goes on as if it had not stopped. The number of workers may change from one start to the next.
"""

from __future__ import annotations

import json
import logging
import tempfile
from typing import Any

import ray
import ray.train
import yaml
from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crem.config import RunConfig
from crem.errors import ConfigError, CremError, DivergenceError, TrainingError
from crem.fetch import local_copy
from pipelines.tables import schema, session
from pipelines.tables.manifest import read_manifest
from pipelines.tables.prepared import require_readable_tables, share_rows
from pipelines.tables.storage import Folder
from pipelines.training.checkpoints import CHECKPOINTS, patiently
from pipelines.training.failed_step import FAILED_STEP, saved_step
from pipelines.training.follow import Follower
from pipelines.training.held_out import data_mix, split_rows, training_texts
from pipelines.training.metrics_log import read_metrics
from pipelines.training.trackers import check_tracker, open_tracker
from pipelines.training.watch import Watch
from pipelines.training.worker import worker

__all__ = ["train"]

log = logging.getLogger(__name__)

KIND = "train"
_DONE = "done.json"
_DATA = "data.json"
_DATA_CPUS = 1
"""Kept free beside the workers, or no row would ever reach them."""
_SECTIONS = ("model", "data", "loss", "optim", "train")


def train(prepared: str, out: str, config: RunConfig, *, resume: bool = False, fresh: bool = False) -> dict[str, Any]:
    """Train a CREM model on prepared tables.

    Args:
        prepared: folder or URI written by ``crem prepare``.
        out: folder or URI for the run.
        resume: continue the run in ``out`` from its newest checkpoint; where there is no run, start it.
        fresh: first remove what an earlier run left in ``out``.

    Returns:
        ``model`` (its URI), ``fingerprint``, ``steps``, ``rows``, ``parameters`` and the last metrics.

    Raises:
        ConfigError: no training rows, or ``out`` holds a run and neither ``resume`` nor ``fresh`` is given, or a
            resumed run's configuration differs.
    """
    check_tracker(config.train.tracker)
    source, target = Folder.at(prepared), Folder.at(out)
    stamp = {"prepared": source.uri, "manifest": schema.content_id(json.dumps(read_manifest(source)).encode())}
    goes_on = _claim(target, config, stamp, resume=resume, fresh=fresh)
    if goes_on and (finished := target.read_json(_DONE)) is not None:
        log.info("the run in %s is complete; nothing to do", target.uri)
        return dict(finished)
    session.connect()
    require_readable_tables(prepared)
    if config.model.backbone is not None:
        session.require_readable_model(config.model.backbone)
    session.require_shared(target)
    workers = config.train.min_workers or config.train.workers
    session.require(
        f"training with {workers} workers",
        cpus=workers * config.train.cpus_per_worker + _DATA_CPUS,
        gpus=workers * config.train.gpus_per_worker,
        remedy="lower train.workers (a divisor of train.global_batch), train.cpus_per_worker or "
        f"train.gpus_per_worker; {_DATA_CPUS} CPU is for the tasks that gather rows",
    )
    with session.remote_errors():
        if config.model.backbone is not None:
            ray.get(ray.remote(num_cpus=_DATA_CPUS)(local_copy).remote(config.model.backbone))  # a wrong one fails here
        rows = share_rows(prepared, split_prefix=("train", "validation"))
    training, held_out = split_rows(rows, config)
    plan = training.plan(config)
    log.info(
        "%d retrieval rows, %d heterogeneous rows, %d for validation; %d steps of %d rows (%.1f epochs of the former)",
        len(plan.retrieval),
        len(plan.heterogeneous),
        held_out.table.num_rows if held_out else 0,
        config.train.steps,
        config.train.global_batch,
        config.train.steps * plan.retrieval_per_step / max(1, len(plan.retrieval)),
    )
    target.remove(FAILED_STEP)
    if not goes_on:  # only here: what was refused above has changed nothing
        _begin(target, config, stamp)
    # on this node: where the driver lives, progress can be told
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    tracker = open_tracker(target, config)
    watch = Watch(config.train.hang_timeout_s)
    spec = {
        "config": config.model_dump(mode="json"),
        "texts": training_texts(rows) if config.model.scratch is not None else None,
        "rows": [ray.put(training)],
        "held_out": [ray.put(held_out)] if held_out else [],
        "queue": queue,
        "pulse": watch.pulse,
        "out": target.uri,
        "run": _identity(config, stamp),
    }
    mix = data_mix(training, held_out)
    heard = Follower(queue, target, config, mix=mix, fresh=not resume, tracker=tracker)
    with session.remote_errors(), heard, watch:
        try:
            _fit(spec, target, config)
        except DivergenceError as error:
            raise saved_step(error, training, config, target) from error
    if heard.result is None:
        raise TrainingError(f"the run in {target.uri} ended without saying its result; run again with --resume")
    last = heard.last or next(iter(read_metrics(target)[-1:]), {})  # a run that only wrote its model this time
    result = {**heard.result, "rows": training.table.num_rows, "metrics": last}
    patiently("writing the result", lambda: target.write_json(result, _DONE))
    return result


def _claim(target: Folder, config: RunConfig, stamp: dict[str, Any], *, resume: bool, fresh: bool) -> bool:
    """Whether a run that ``target`` holds goes on; refuses what ``train`` says."""
    target.claim(KIND)
    held = target.exists("config.yaml")
    if held and not (resume or fresh):
        raise ConfigError(
            f"{target.uri} holds a training run; continue it with --resume, replace it with --fresh, or choose "
            "another --out"
        )
    if resume and held:
        if (trained_on := target.read_json(_DATA)) != stamp:
            raise ConfigError(
                f"the run in {target.uri} was begun on {trained_on}, and now the data is {stamp}: rows, their order "
                "and the tokenizer would change under it; resume with the same prepared tables, or start anew"
            )
        with target.open("config.yaml") as file:
            try:
                before = RunConfig.model_validate(yaml.safe_load(file))
            except ValueError as error:
                raise ConfigError(
                    f"{target.uri}/config.yaml is of another version of crem ({error}); resume with that version"
                ) from error
        for section in _SECTIONS:
            old, new = getattr(before, section), getattr(config, section)
            changed = [
                k
                for k in type(old).model_fields
                if getattr(old, k) != getattr(new, k) and f"{section}.{k}" not in _MAY_CHANGE
            ]
            if changed:
                key = changed[0]
                raise ConfigError(
                    f"the run in {target.uri} has {section}.{key}={getattr(old, key)!r}, and now it is "
                    f"{getattr(new, key)!r}; resume with the same settings ({target.uri}/config.yaml) or start anew"
                )
    return resume and held


def _begin(target: Folder, config: RunConfig, stamp: dict[str, Any]) -> None:
    """A new run in ``target``, without what an earlier one left."""
    made = ("model", "best", "best.json", "report.html", "tracker.json", "metrics.jsonl", "tensorboard")
    for name in (_DONE, "config.yaml", CHECKPOINTS, *made):
        target.remove(name)
    target.write_json(stamp, _DATA)
    target.write_bytes(config.to_yaml().encode(), "config.yaml")


_MAY_CHANGE = {
    "train.log_every",
    "train.keep_checkpoints",
    "train.max_failures",
    "train.cpus_per_worker",
    "train.threads_per_worker",
    "train.checkpoint_every",
    "train.workers",
    "train.min_workers",
    "train.resize_every_s",
    "train.explosion_factor",
    "train.hang_timeout_s",
    "train.tracker",
}
"""Settings of a run that do not change its result. The number of workers belongs here: the order of rows does not
depend on it, and a ZeRO checkpoint is converted. (LoRA's dropout does: another number of workers draws otherwise.)"""


def _identity(config: RunConfig, stamp: dict[str, Any]) -> str:
    """The same for all starts of a run; its checkpoints carry it."""
    settings = {
        f"{name}.{key}": value
        for name in _SECTIONS
        for key, value in getattr(config, name).model_dump(mode="json").items()
        if f"{name}.{key}" not in _MAY_CHANGE
    }
    return f"{schema.content_id(json.dumps([settings, stamp], sort_keys=True).encode()) & (2**64 - 1):016x}"


def _fit(spec: dict[str, Any], target: Folder, config: RunConfig) -> None:
    """Run to the end; a failed run raises the worker's own error, or says which worker failed and how to go on."""
    # Ray Train's own folder holds nothing that outlives this call: see pipelines.training.checkpoints
    with tempfile.TemporaryDirectory(prefix="crem-ray-train-") as storage:
        try:
            _trainer(spec, config, storage).fit()
        except ray.train.TrainingFailedError as error:
            failures = getattr(error, "worker_failures", None)
            failures = failures or {"controller": getattr(error, "controller_failure", error)}
            ours = [root for f in failures.values() if isinstance(root := session.root_cause(f), CremError)]
            if ours:
                raise ours[0] from error
            rank, failure = next(iter(failures.items()))
            raise TrainingError(
                f"worker {rank} of the run in {target.uri} failed: {type(failure).__name__}: {failure}. Its "
                "checkpoints are kept: continue with --resume, and see the cause with --verbose"
            ) from error


class _NoSecondTry(UserCallback):
    """An error of ours comes again at the next try: end the run with it at once. (Ray Train does not retry when a
    callback fails; a worker or node that died has no error of ours and is tried again.)"""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(root := session.root_cause(error), CremError):
                raise root


def _trainer(spec: dict[str, Any], config: RunConfig, storage: str) -> TorchTrainer:
    train = config.train
    on_gpu = train.gpus_per_worker > 0
    environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore::FutureWarning"}
    if not on_gpu:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(train.threads_per_worker)}
    resources = {"CPU": train.cpus_per_worker}
    if on_gpu:
        resources["GPU"] = train.gpus_per_worker
    return TorchTrainer(
        worker,
        train_loop_config=spec,
        scaling_config=ScalingConfig(
            num_workers=train.workers if train.min_workers is None else (train.min_workers, train.workers),
            elastic_resize_monitor_interval_s=train.resize_every_s,
            use_gpu=on_gpu,
            resources_per_worker=resources,
        ),
        run_config=RayRunConfig(
            name=KIND,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=train.max_failures),
            callbacks=[_NoSecondTry()],
            worker_runtime_env={"env_vars": environment},
        ),
    )
