"""The runs of an ablation: one variant with one seed, trained and evaluated, with its files in the output folder."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

from pydantic import JsonValue, TypeAdapter

from crem.config import RunConfig
from crem.errors import ConfigError
from pipelines.ablation.ablation_result import RunSeconds
from pipelines.ablation.attention_maps import AttentionMaps
from pipelines.ablation.trends import NO_SEED
from pipelines.ablation.variants import UNTRAINED, Variant, variants
from pipelines.evaluation.evaluation_result import EvaluationResult
from pipelines.tables.prepared import PreparedRows, read_rows
from pipelines.tables.storage import Folder

__all__ = ["AblationInputs", "FinishedRun", "Run", "RunRecord", "planned_runs"]

log = logging.getLogger(__name__)

_EVALUATIONS = "evaluations"
_MAPS = "maps"
_RUNS = "runs"
_DETERMINES = {"model": None, "data": None, "loss": None, "optim": None, "train": ("steps", "global_batch", "seed")}
"""Settings that a figure depends on: whole sections, or some keys of one."""


@dataclass(frozen=True)
class AblationInputs:
    """What all runs of an ablation start from."""

    prepared: str
    """URI of the prepared tables"""
    backbone: str | None


@dataclass(frozen=True)
class RunRecord:
    """``evaluations/<run>.json``: the figures of one run, and the settings that they depend on."""

    evaluate: dict[str, JsonValue]
    """settings of the evaluation"""
    seconds: RunSeconds
    evaluations: dict[int, EvaluationResult]
    """by chorus count"""
    determined_by: dict[str, dict[str, JsonValue]]
    """settings by section, and in ``from`` the inputs"""
    losses: dict[str, JsonValue]
    """last metrics of the training"""

    def to_json(self) -> dict[str, object]:
        return {
            "evaluate": self.evaluate,
            "seconds": asdict(self.seconds),
            "evaluations": {str(count): result.to_json() for count, result in self.evaluations.items()},
            "determined_by": self.determined_by,
            "losses": self.losses,
        }

    @classmethod
    def from_json(cls, tree: dict[str, JsonValue]) -> RunRecord:
        evaluations = tree["evaluations"]
        assert isinstance(evaluations, Mapping)
        results = {count: EvaluationResult.from_json(result) for count, result in evaluations.items()}
        return _RECORD.validate_python({**tree, "evaluations": results})


_RECORD = TypeAdapter(RunRecord)


@dataclass(frozen=True)
class Run:
    """One variant with one seed; without a seed, the backbone, which is evaluated only."""

    variant: Variant
    config: RunConfig
    seed: int = NO_SEED

    @property
    def name(self) -> str:
        return self.variant.name if self.seed == NO_SEED else f"{self.variant.name}-{self.seed}"

    @property
    def wants_maps(self) -> bool:
        return "figure4" in self.variant.tables

    def determined_by(self, inputs: AblationInputs) -> dict[str, dict[str, JsonValue]]:
        """What the figures of this run depend on, as JSON."""
        tree = self.config.model_dump(mode="json")
        settings = {s: tree[s] if keys is None else {k: tree[s][k] for k in keys} for s, keys in _DETERMINES.items()}
        return {**settings, "from": asdict(inputs)}

    def record(self, target: Folder) -> RunRecord | None:
        """The figures in the output folder; None where there are none."""
        tree = target.read_json(_EVALUATIONS, f"{self.name}.json")
        return None if tree is None else RunRecord.from_json(tree)

    def maps(self, target: Folder) -> AttentionMaps | None:
        """The attention maps in the output folder; None where there are none."""
        tree = target.read_json(_MAPS, f"{self.name}.json")
        return None if tree is None else AttentionMaps.from_json(tree)

    def is_finished(self, target: Folder, inputs: AblationInputs) -> bool:
        """Whether all figures are in the output folder.

        Raises:
            ConfigError: there are figures, of other settings.
        """
        record = self.record(target)
        if record is None:
            return False
        for section, values in self.determined_by(inputs).items():
            before = record.determined_by.get(section, {})
            for key, value in values.items():
                if before.get(key) != value:
                    raise ConfigError(
                        f"{target.uri}/runs/{self.name} has {section}.{key}={before.get(key)!r}, and now it is "
                        f"{value!r}; ablate with the same settings, or into another --out"
                    )
        return self._is_evaluated(target) and self._is_mapped(target)

    def execute(self, target: Folder, inputs: AblationInputs, start_lock: AbstractContextManager[object]) -> None:
        """Train, evaluate and measure the maps, each unless that is done.

        Args:
            start_lock: held while Ray starts: two that start at once may take the same ports.
        """
        import torch

        import crem
        from pipelines.ablation.attention_maps import measure_maps

        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            losses: dict[str, JsonValue] = {}
            if self.variant == UNTRAINED:
                model = _save_backbone(inputs.prepared, scratch, self.config)
            else:
                model, losses = self._train(target, inputs, start_lock)
            torch.set_num_threads(self.config.embed.threads_per_actor)
            rows = read_rows(inputs.prepared, split_prefix="test")
            train_s = round(time.monotonic() - began, 1)
            if not self._is_evaluated(target):
                record = self._evaluate(model, rows, inputs, train_s, losses)
                target.write_json(record.to_json(), _EVALUATIONS, f"{self.name}.json")
                log.info("trained in %.0f s, evaluated in %.0f s", record.seconds.train, record.seconds.evaluate)
            if not self._is_mapped(target):
                maps = measure_maps(crem.load(model), rows, self.config.ablate.map_images)
                target.write_json(maps.to_json(), _MAPS, f"{self.name}.json")

    def _is_evaluated(self, target: Folder) -> bool:
        record = self.record(target)
        return record is not None and record.evaluate == self.config.evaluate.model_dump(mode="json")

    def _is_mapped(self, target: Folder) -> bool:
        if not self.wants_maps:
            return True
        maps = self.maps(target)
        return maps is not None and maps.max_images == self.config.ablate.map_images

    def _train(
        self, target: Folder, inputs: AblationInputs, start_lock: AbstractContextManager[object]
    ) -> tuple[str, dict[str, JsonValue]]:
        """URI of the trained model, and the last metrics."""
        from pipelines.tables import session
        from pipelines.training.train import train

        folder = target.child(_RUNS).child(self.name)
        if not folder.exists("done.json"):
            with start_lock:
                session.connect()
        trained = train(inputs.prepared, folder.uri, self.config, resume=True)
        return trained.model, dict(trained.metrics)

    def _evaluate(
        self, model: str, rows: PreparedRows, inputs: AblationInputs, train_s: float, losses: dict[str, JsonValue]
    ) -> RunRecord:
        """The figures of a checkpoint at every chorus count of the variant."""
        import crem
        from pipelines.evaluation.evaluate import evaluate_loaded

        began = time.monotonic()
        evaluations = {
            count: replace(evaluate_loaded(crem.load(model, chorus_tokens=count), rows, self.config), examples=None)
            for count in self.variant.counts
        }
        return RunRecord(
            evaluate=self.config.evaluate.model_dump(mode="json"),
            seconds=RunSeconds(train_s, round(time.monotonic() - began, 1)),
            evaluations=evaluations,
            determined_by=self.determined_by(inputs),
            losses=losses,
        )


@dataclass(frozen=True)
class FinishedRun:
    """A run with its figures, and its maps where it has them."""

    run: Run
    record: RunRecord
    maps: AttentionMaps | None

    @property
    def family(self) -> str:
        return self.run.variant.family


def planned_runs(config: RunConfig, seeds: Iterable[int], only: str | None) -> list[Run]:
    """The backbone, and all variants of one seed before those of the next."""
    runs = [Run(UNTRAINED, UNTRAINED.config(config, 0))]
    for seed in dict.fromkeys(seeds):
        runs += [Run(variant, variant.config(config, seed), seed) for variant in variants(config.ablate, only)]
    return runs


def _save_backbone(prepared: str, folder: str, config: RunConfig) -> str:
    """The backbone as the variants start from it, read by EOS pooling."""
    from crem.checkpoint import save_model
    from crem.model.build import build_model
    from pipelines.tables.prepared import texts_of

    texts = texts_of(read_rows(prepared, split_prefix="train")) if config.model.scratch is not None else None
    save_model(*build_model(config.model, texts=texts, seed=config.train.seed), folder)
    return folder
