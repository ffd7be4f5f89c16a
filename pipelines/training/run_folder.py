"""The output folder of a training run: what identifies the run, and whether a start may use the folder.

config.yaml, data.json   what the run is             done.json     its result, written last
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import yaml

from crem.config import RunConfig
from crem.errors import ConfigError
from pipelines.tables import schema
from pipelines.tables.manifest import read_manifest
from pipelines.tables.storage import Folder, JobKind
from pipelines.training.checkpoints import CHECKPOINTS

if TYPE_CHECKING:  # it draws charts
    from pipelines.reports.training_page import MetricEntry

__all__ = ["RunStamp", "TrainResult", "begin", "claim", "read_result", "run_identity", "write_result"]

_DONE = "done.json"
_DATA = "data.json"
_CONFIG = "config.yaml"
_RESULTS = ("model", "best", "best.json", "report.html", "tracker.json", "metrics.jsonl", "tensorboard")
_SECTIONS = ("model", "data", "loss", "optim", "train")
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


@dataclass(frozen=True)
class RunStamp:
    """``data.json``: what a run is trained on."""

    prepared: str
    """URI of the prepared tables"""
    manifest: int
    """hash of their manifest"""

    @classmethod
    def of(cls, prepared: Folder) -> RunStamp:
        """Of prepared tables.

        Raises:
            ConfigError: there are no complete ones.
        """
        return cls(prepared.uri, read_manifest(prepared).content_id)


@dataclass(frozen=True)
class TrainResult:
    """``done.json``: what a complete run returns."""

    model: str
    """URI of the trained checkpoint"""
    fingerprint: str
    steps: int
    parameters: int
    rows: int
    """training rows"""
    metrics: MetricEntry
    """of the last step"""


def read_result(run: Folder) -> TrainResult | None:
    """The result of a complete run; ``None`` if the run is not complete."""
    done = run.read_json(_DONE)
    return None if done is None else TrainResult(**done)


def write_result(run: Folder, result: TrainResult) -> None:
    """Make a run complete."""
    run.write_json(asdict(result), _DONE)


def claim(run: Folder, config: RunConfig, stamp: RunStamp, *, resume: bool, fresh: bool) -> bool:
    """Claim the folder; returns whether the run that it holds is resumed.

    Raises:
        ConfigError: it holds a run and neither ``resume`` nor ``fresh`` is given, or a resumed run's data or
            configuration differs.
    """
    run.claim(JobKind.TRAIN)
    holds_run = run.exists(_CONFIG)
    if holds_run and not (resume or fresh):
        raise ConfigError(
            f"{run.uri} holds a training run; continue it with --resume, replace it with --fresh, or choose "
            "another --out"
        )
    if not (resume and holds_run):
        return False
    if (trained_on := run.read_json(_DATA)) != asdict(stamp):
        raise ConfigError(
            f"the run in {run.uri} began with the data {trained_on}, and now it is {asdict(stamp)}: rows, their order "
            "and the tokenizer would change; resume with the same prepared tables, or start a new run"
        )
    _require_same_settings(run, _read_config(run), config)
    return True


def begin(run: Folder, config: RunConfig, stamp: RunStamp) -> None:
    """A new run in the folder, without what an earlier one left."""
    for name in (_DONE, _CONFIG, CHECKPOINTS, *_RESULTS):
        run.remove(name)
    run.write_json(asdict(stamp), _DATA)
    run.write_bytes(config.to_yaml().encode(), _CONFIG)


def run_identity(config: RunConfig, stamp: RunStamp) -> str:
    """The same for all starts of a run; its checkpoints carry it."""
    settings = {
        f"{name}.{key}": value
        for name in _SECTIONS
        for key, value in getattr(config, name).model_dump(mode="json").items()
        if f"{name}.{key}" not in _MAY_CHANGE
    }
    return f"{schema.content_id(json.dumps([settings, asdict(stamp)], sort_keys=True).encode()) & (2**64 - 1):016x}"


def _read_config(run: Folder) -> RunConfig:
    with run.open(_CONFIG) as file:
        try:
            return RunConfig.model_validate(yaml.safe_load(file))
        except ValueError as error:
            raise ConfigError(
                f"{run.uri}/{_CONFIG} is of another version of crem ({error}); resume with that version"
            ) from error


def _require_same_settings(run: Folder, before: RunConfig, now: RunConfig) -> None:
    for section in _SECTIONS:
        old, new = getattr(before, section), getattr(now, section)
        for key in type(old).model_fields:
            if getattr(old, key) != getattr(new, key) and f"{section}.{key}" not in _MAY_CHANGE:
                raise ConfigError(
                    f"the run in {run.uri} has {section}.{key}={getattr(old, key)!r}, and now it is "
                    f"{getattr(new, key)!r}; resume with the same settings ({run.uri}/{_CONFIG}) or start a new run"
                )
