"""Experiment trackers by one setting, ``train.tracker``: MLflow or Weights & Biases, beside the files of every run.

Neither is a dependency: they are imported when they are set, and a missing one is reported before any work. Their own
environment says where they write (``MLFLOW_TRACKING_URI``, ``WANDB_MODE`` …). The id of the tracker's run is kept in
the output folder, so a resumed run continues the same one.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from crem.config import RunConfig
from crem.errors import ConfigError
from pipelines.tables.storage import Folder

__all__ = ["Tracker", "TrackerRecord", "check_tracker", "open_tracker"]

_FILE = "tracker.json"
_PACKAGES = {"mlflow": ("mlflow", "mlflow-skinny sqlalchemy alembic"), "wandb": ("wandb", "wandb")}
_PROJECT = "crem"


@dataclass(frozen=True)
class TrackerRecord:
    """``tracker.json``."""

    tracker: str
    """``train.tracker``"""
    id: str
    """of the tracker's run"""


class Tracker(Protocol):
    """Receives metrics of steps until it is closed."""

    id: str

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def close(self, *, failed: bool) -> None: ...


def check_tracker(kind: str) -> None:
    """Check that the tracker's package is installed.

    Raises:
        ConfigError: it is not; with the command that installs it.
    """
    if kind == "none":
        return
    module, packages = _PACKAGES[kind]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"train.tracker={kind} needs a package that is missing here: pip install {packages}; or leave it out; "
            "metrics.jsonl and TensorBoard files are written in any case"
        )


def open_tracker(run: Folder, config: RunConfig) -> Tracker | None:
    """The tracker of ``config``, in the run that an earlier start of this training began; ``None`` if none is set.

    Raises:
        ConfigError: its package is missing, or it does not answer.
    """
    kind = config.train.tracker
    if kind == "none":
        return None
    check_tracker(kind)
    saved = run.read_json(_FILE)
    record = TrackerRecord(**saved) if isinstance(saved, dict) else None
    known = record.id if record is not None and record.tracker == kind else None
    try:
        tracker: Tracker = (_Mlflow if kind == "mlflow" else _Wandb)(run, config, known)
    except Exception as error:  # each client has its own
        raise ConfigError(
            f"train.tracker={kind} cannot begin its run: {type(error).__name__}: {error}; check its environment "
            "(MLFLOW_TRACKING_URI; WANDB_MODE, WANDB_API_KEY) or set train.tracker=none"
        ) from error
    run.write_json(asdict(TrackerRecord(kind, tracker.id)), _FILE)
    return tracker


def _settings(config: RunConfig) -> dict[str, object]:
    """Those of a training run, by their dotted names."""
    return {
        f"{section}{name}": value
        for section in ("model", "data", "loss", "optim", "train")
        for name, value in _flat(getattr(config, section).model_dump(mode="json"))
    }


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _flat(below, f"{prefix}.{key}")
    else:
        yield prefix, value


class _Mlflow:
    def __init__(self, run: Folder, config: RunConfig, known: str | None):
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient()  # no global state: another run of this process may be active
        if known is not None:
            self.id = known
            self._client.set_terminated(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = self._client.create_run(number, run_name=run.name, tags={"crem.out": run.uri}).info.run_id
        self._client.log_batch(self.id, params=[Param(k, str(v)[:500]) for k, v in _settings(config).items()])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[self._metric(k, v, now, step) for k, v in metrics.items()])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


class _Wandb:
    def __init__(self, run: Folder, config: RunConfig, known: str | None):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            id=known,
            resume="allow" if known else None,
            config=_settings(config),
            settings=wandb.Settings(silent=True),
        )
        self.id = self._run.id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
