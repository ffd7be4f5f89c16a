"""Ray Train around the workers: their resources and environment, what is tried again, and the error a run ends with."""

from __future__ import annotations

import tempfile
from typing import Any

import ray.train
from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer

from crem.config.training import TrainConfig
from crem.errors import CremError, TrainingError
from pipelines.tables.ray_tasks import root_cause
from pipelines.training.messages import WorkerSpec

__all__ = ["fit", "run_worker"]


def run_worker(given: dict[str, WorkerSpec]) -> None:
    """What Ray Train starts on every rank, and starts again after a failure."""
    from pipelines.training.worker import Worker  # imports the model, which the driver has no use for

    Worker(given["spec"]).run()


def fit(spec: WorkerSpec) -> None:
    """Run to the end.

    Raises:
        CremError: the worker's own, or a ``TrainingError`` that names the failed worker and how to continue.
    """
    # Ray Train's own folder holds nothing that outlives this call: see pipelines.training.checkpoints
    with tempfile.TemporaryDirectory(prefix="crem-ray-train-") as storage:
        try:
            _trainer(spec, storage).fit()
        except ray.train.TrainingFailedError as error:
            failures = getattr(error, "worker_failures", None)
            failures = failures or {"controller": getattr(error, "controller_failure", error)}
            for failure in failures.values():
                if isinstance(root := root_cause(failure), CremError):
                    raise root from error
            rank, failure = next(iter(failures.items()))
            raise TrainingError(
                f"worker {rank} of the run in {spec.out.uri} failed: {type(failure).__name__}: {failure}. Its "
                "checkpoints are kept: continue with --resume, and see the cause with --verbose"
            ) from error


class _NoRetryOfOurErrors(UserCallback):
    """Ends the run at once with an error of ours, which would only come again. (Ray Train does not retry if a callback
    fails; a worker or node that died has no error of ours and is started again.)"""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(root := root_cause(error), CremError):
                raise root


def _trainer(spec: WorkerSpec, storage: str) -> TorchTrainer:
    train = spec.config.train
    on_gpu = train.gpus_per_worker > 0
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if on_gpu else {})
    return TorchTrainer(
        run_worker,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(
            num_workers=train.workers if train.min_workers is None else (train.min_workers, train.workers),
            elastic_resize_monitor_interval_s=train.resize_every_s,
            use_gpu=on_gpu,
            resources_per_worker=resources,
        ),
        run_config=RayRunConfig(
            name="train",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=train.max_failures),
            callbacks=[_NoRetryOfOurErrors()],
            worker_runtime_env={"env_vars": _environment(train)},
        ),
    )


def _environment(train: TrainConfig) -> dict[str, str]:
    shared = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore::FutureWarning"}
    on_cpu = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(train.threads_per_worker)}
    return shared if train.gpus_per_worker > 0 else shared | on_cpu
