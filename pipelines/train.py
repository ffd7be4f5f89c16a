"""``crem train``: the joint training run, DeepSpeed under Ray Train.

The driver reads the rows and starts the workers; a worker is ``_worker`` below, and the step that it repeats is
``crem.train.step``. What stays in the output folder:

    config.yaml, data.json   what the run is             metrics.jsonl, tensorboard/    one entry per log interval
    model/           the trained checkpoint              run/                           Ray Train's checkpoints
    best/, best.json the model of the lowest validation  report.html                    curves, configuration, data

A run that was killed continues with ``resume``: Ray Train hands the newest complete checkpoint to the workers, and the
order of rows is a pure function of seed and step (``crem.data.mixing``), so the run goes on as if it had not stopped.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from typing import Any

import pyarrow.fs
import ray
import ray.train
import yaml
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crem.config import RunConfig
from crem.errors import ConfigError, CremError, DivergenceError, TrainingError
from crem.fetch import local_copy
from pipelines import schema, session
from pipelines.failed_step import FAILED_STEP, saved_step
from pipelines.follow import Follower
from pipelines.held_out import data_mix, split_rows, training_texts, validation_batches
from pipelines.prepare import read_manifest
from pipelines.rows import share_rows, step_batches
from pipelines.storage import Folder
from pipelines.trackers import check_tracker, open_tracker
from pipelines.watch import Heart, Watch

__all__ = ["train"]

log = logging.getLogger(__name__)

KIND = "train"
_DONE = "done.json"
_DATA = "data.json"
_DATA_CPUS = 1
"""Kept free beside the workers, or no row would ever reach them."""
_RUN = "run"


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
    _claim(target, config, stamp, resume=resume, fresh=fresh)
    finished = target.read_json(_DONE)
    if finished is not None:
        log.info("the run in %s is complete; nothing to do", target.uri)
        return dict(finished)
    target.remove(FAILED_STEP)
    session.connect()
    session.require(
        f"training with {config.train.workers} workers",
        cpus=config.train.workers * config.train.cpus_per_worker + _DATA_CPUS,
        gpus=config.train.workers * config.train.gpus_per_worker,
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
    }
    mix = data_mix(training, held_out)
    heard = Follower(queue, target, config, mix=mix, fresh=not resume, tracker=tracker)
    with session.remote_errors(), heard, watch:
        try:
            _fit(_trainer(spec, target, config), target)
        except DivergenceError as error:
            raise saved_step(error, training, config, target) from error
    if heard.result is None:
        raise TrainingError(f"the run in {target.uri} ended without saying its result; run again with --resume")
    result = {**heard.result, "rows": training.table.num_rows, "metrics": heard.last}
    target.write_json(result, _DONE)
    return result


def _claim(target: Folder, config: RunConfig, stamp: dict[str, Any], *, resume: bool, fresh: bool) -> None:
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
        for section in ("model", "data", "loss", "optim", "train"):
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
        return
    made = ("model", "best", "best.json", "report.html", "tracker.json", "metrics.jsonl", "tensorboard")
    for name in (_DONE, "config.yaml", _RUN, *made):
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
    "train.explosion_factor",
    "train.hang_timeout_s",
    "train.tracker",
}
"""Settings of a run that do not change its result. The number of workers does not belong here: a ZeRO checkpoint is
read by as many ranks as wrote it."""


def _fit(trainer: TorchTrainer, target: Folder) -> None:
    """Run to the end; a failed run raises the worker's own error, or says which worker failed and how to go on."""
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {"controller": error}
        ours = [f for f in failures.values() if isinstance(f, CremError)]
        if ours:
            raise ours[0] from error
        rank, failure = next(iter(failures.items()))
        raise TrainingError(
            f"worker {rank} of the run in {target.uri} failed: {type(failure).__name__}: {failure}. Its checkpoints "
            "are kept: continue with --resume, and see the cause with --verbose"
        ) from error


def _trainer(spec: dict[str, Any], target: Folder, config: RunConfig) -> TorchTrainer:
    on_gpu = config.train.gpus_per_worker > 0
    environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore::FutureWarning"}
    if not on_gpu:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(config.train.threads_per_worker)}
    filesystem, path = (
        (pyarrow.fs.LocalFileSystem(), target.uri) if target.is_local else pyarrow.fs.FileSystem.from_uri(target.uri)
    )
    resources = {"CPU": config.train.cpus_per_worker}
    if on_gpu:
        resources["GPU"] = config.train.gpus_per_worker
    return TorchTrainer(
        _worker,
        train_loop_config=spec,
        scaling_config=ScalingConfig(num_workers=config.train.workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RayRunConfig(
            name=_RUN,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def _worker(spec: dict[str, Any]) -> None:
    """One rank: build the model, load the newest checkpoint, run the loop."""
    import torch

    from crem.checkpoint import build_model
    from crem.train.export import export
    from crem.train.loop import Progress, train_loop
    from crem.train.optim import initialise
    from crem.train.validate import validate
    from pipelines.best import BestModel

    logging.getLogger("deepspeed").setLevel(logging.WARNING)
    config = RunConfig.model_validate(spec["config"])
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    heart = Heart(spec["pulse"], rank=rank, ranks=ranks)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.train.threads_per_worker)
    model, collator = build_model(config.model, texts=spec["texts"], seed=config.train.seed)
    engine = initialise(model.to(device), config, device)
    start_step = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder, tag="state")
        start_step = state["step"]
        log.info("rank %d continues at step %d", rank, start_step)

    def on_progress(progress: Progress) -> None:
        if rank == 0:
            spec["queue"].put({"progress": progress.as_dict()})

    def on_checkpoint(step: int, progress: Progress) -> None:
        with tempfile.TemporaryDirectory() as folder:
            engine.save_checkpoint(folder, tag="state", client_state={"step": step})
            ray.train.report(progress.as_dict(), checkpoint=Checkpoint.from_directory(folder))

    out = Folder.at(spec["out"])
    best = BestModel(out, _upload) if spec["held_out"] else None

    def on_validation(step: int) -> dict[str, float]:
        assert best is not None
        rows = ray.get(spec["held_out"][0])
        held_out = validation_batches(rows, config, collator, rank=rank, ranks=ranks)
        terms = validate(engine, held_out, config.loss, device).as_dict()
        heart.phase(step - 1, "export")
        best.offer(step, terms, engine, collator)
        return terms

    batches = step_batches(spec["rows"][0], config, collator, start_step=start_step, rank=rank, ranks=ranks)
    train_loop(
        engine,
        batches,
        config,
        start_step=start_step,
        device=device,
        on_progress=on_progress,
        on_checkpoint=on_checkpoint,
        on_phase=heart.phase,
        validate=on_validation if best else None,
    )
    heart.phase(config.train.steps, "export")
    with tempfile.TemporaryDirectory() as folder:
        fingerprint = export(engine, collator, folder)
        if rank == 0:
            _upload(folder, out.child("model"))
            parameters = sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters())
            spec["queue"].put(
                {
                    "result": {
                        "model": out.child("model").uri,
                        "fingerprint": fingerprint,
                        "steps": config.train.steps,
                        "parameters": parameters,
                    }
                }
            )


def _upload(folder: str, target: Folder) -> None:
    """Copy a finished checkpoint; ``crem.json``, without which it is no checkpoint, goes last."""
    from crem.checkpoint import CREM_FILE

    target.remove(CREM_FILE)
    for name in sorted(os.listdir(folder), key=lambda n: n == CREM_FILE):
        with open(os.path.join(folder, name), "rb") as source, target.open(name, mode="wb") as file:
            while block := source.read(2**24):
                file.write(block)
