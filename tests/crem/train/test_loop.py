"""The loop around the step and its callbacks: what it reports, when it validates, and what ends it."""

from __future__ import annotations

import json
import logging
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crem.config import RunConfig
from crem.data.collator import Batch, Collator
from crem.data.sequence import CutCount
from crem.errors import DivergenceError, TrainingError
from crem.forecast.flops import ModelFlops
from crem.losses import info_nce
from crem.metrics import precision_at_1
from crem.model.build import build_model
from crem.model.crem import CremModel
from crem.train.callbacks import Callback, Interval, ProgressReport
from crem.train.checkpoint_writer import CheckpointWriter
from crem.train.guard import LossGuard
from crem.train.loop import train_loop
from crem.train.phases import Phase
from crem.train.progress import Progress, ValidationResult
from crem.train.state import read_manifests
from crem.train.step import StepResult, train_step
from crem.train.validate import Validation, validate
from tests.conftest import TEXTS
from tests.crem.train.runs import ROWS, PlainEngine, pairs, run_config, share, spawn

CPU = torch.device("cpu")


class Engine(PlainEngine):
    """``PlainEngine`` with what the loop uses of DeepSpeed."""

    def __init__(self, model: CremModel, config: RunConfig, chunks: int = 1):
        super().__init__(model, config, chunks)
        self.module = model

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_global_grad_norm(self) -> float:
        return self.norms[-1]

    def zero_optimization_stage(self) -> int:
        return 0

    def save_checkpoint(self, folder: str, *, tag: str, client_state: dict[str, int]) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        torch.save(client_state, Path(folder) / tag / "client_state.pt")


def started(*overrides: str, chunks: int = 1) -> tuple[RunConfig, Engine, Collator]:
    config = run_config("train.workers=1", "train.validate_every=0", *overrides)
    model, collator = build_model(config.model, texts=TEXTS)
    return config, Engine(model, config, chunks), collator


def run(
    config: RunConfig, engine: Engine, collator: Collator, chunks: int = 1, *, before: tuple[Callback, ...] = ()
) -> list[Progress]:
    """The progress of a run whose other callbacks come before the report."""
    reported: list[Progress] = []
    batches = (share(collator, "mixed", step, 0, 1, chunks) for step in range(config.train.steps))
    callbacks = [*before, ProgressReport(config.train, reported.append)]
    train_loop(engine, batches, config, callbacks, start_step=0, device=CPU)
    return reported


def test_progress_of_an_interval() -> None:
    """Rates are over the interval: tokens/s over samples/s is tokens per sample of its steps, whatever the clock says;
    so is utilisation, with the FLOPs of its batches."""
    config, engine, collator = started(
        "train.log_every=4", "train.checkpoint_every=8", "loss.temperature=0.3", "model.prompt.max_answer_tokens=2"
    )
    reported = run(config, engine, collator)
    assert [p.step for p in reported] == [4, 8]
    chunks = [share(collator, "mixed", step, 0, 1)[0] for step in range(4)]
    per_sample = sum(chunk.tokens for chunk in chunks) / (4 * ROWS)
    assert reported[0].tokens_per_s / reported[0].samples_per_s == pytest.approx(per_sample, rel=1e-5)
    assert reported[0].padding_share == pytest.approx(sum(c.padding_share for c in chunks) / 4, abs=1e-5)
    cuts = sum((chunk.cuts for chunk in chunks), CutCount())
    assert reported[0].cut_share == pytest.approx(cuts.cut / cuts.sequences) and 0 < cuts.cut < cuts.sequences
    flops = ModelFlops.of(engine.module)
    useful = sum(flops.of_batch(chunk) for chunk in chunks) / (4 * ROWS)
    assert reported[0].flops_utilisation == pytest.approx(
        useful * reported[0].samples_per_s / reported[0].peak_flops, rel=1e-5
    )
    assert reported[0].grad_norm == pytest.approx(engine.norms[3]) and reported[0].temperature == 0.3
    assert reported[0].seconds_left == pytest.approx(4 * ROWS / reported[0].samples_per_s, rel=1e-5)
    assert 0 <= reported[0].waiting_share <= 1 and reported[1].seconds_left == 0


def test_gradient_caching_is_no_more_useful_work() -> None:
    config, engine, collator = started("train.log_every=8")
    whole = run(config, engine, collator)[0]
    config, engine, collator = started("train.log_every=8", "train.chunk_rows=2", chunks=4)
    cached = run(config, engine, collator, chunks=4)[0]
    assert cached.tokens_per_s / cached.samples_per_s == pytest.approx(whole.tokens_per_s / whole.samples_per_s)


class Phases(Callback):
    """Records the phases that the loop announces."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Phase]] = []

    def on_phase(self, step: int, phase: Phase) -> None:
        self.seen.append((step, phase))

    def of_step(self, step: int) -> list[Phase]:
        return [phase for at, phase in self.seen if at == step]


class Store:
    """A ``PartStore`` that leaves the parts where they are."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def make_room(self) -> None:
        self.events.append("make room")

    def start(self, local: Path, step: int) -> None:
        self.events.append(f"start {step}")


def test_validation_is_reported_with_its_step_and_at_the_end(tmp_path: Path) -> None:
    config, engine, collator = started("train.validate_every=3", "train.log_every=2", "train.checkpoint_every=100")
    phases, store = Phases(), Store()
    validation = Validation(engine, lambda: held_out(collator, 1), config, CPU)
    writer = CheckpointWriter(engine, store, tmp_path / "part", config.train, run="r", device=CPU)
    reported = run(config, engine, collator, before=(phases, validation, writer))
    assert {p.step: p.validation is not None for p in reported} == {2: False, 3: True, 4: False, 6: True, 8: True}
    terms = reported[1].validation
    assert terms is not None and isinstance(terms, ValidationResult)
    assert reported[1].as_dict()["validation/loss"] == terms.loss and "validation" not in reported[1].as_dict()
    assert phases.of_step(2) == [Phase.ROWS, Phase.COMPUTE, Phase.VALIDATION]
    assert phases.of_step(7)[-2:] == [Phase.VALIDATION, Phase.CHECKPOINT]
    assert store.events == ["make room", "start 8"]
    (manifest,) = read_manifests(tmp_path / "part")
    assert (manifest.step, manifest.run) == (8, "r")


def held_out(collator: Collator, pieces: int) -> list[tuple[Batch, Batch]]:
    rows, size = pairs("mixed"), ROWS // pieces
    parts = [rows[at : at + size] for at in range(0, ROWS, size)]
    return [tuple(collator.examples([replace(p, z=z) for p in part]) for z in (False, True)) for part in parts]  # type: ignore[misc]


def test_validation_by_hand() -> None:
    """In one piece or in four, with dropout or without: the losses of the whole, computed here from the definition."""
    config, engine, collator = started()
    found = [validate(engine, held_out(collator, pieces), config.loss, CPU).as_dict() for pieces in (1, 4)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert engine.model.training and not any(p.grad is not None for p in engine.parameters)
    (native, compressed), model = held_out(collator, 1)[0], engine.model.eval()
    with torch.no_grad():
        out, cut = model(native), model(compressed)
    queries, targets = (out.embeddings[at] for at in (native.queries, native.targets))
    retrieval = info_nce(
        *(queries, out.embeddings[torch.cat([native.targets, native.negatives])]),
        query_keys=native.query_keys,
        candidate_keys=torch.cat([native.target_keys, native.negative_keys]),
        temperature=config.loss.temperature,
        symmetric=config.loss.symmetric,
    )
    terms = found[0]
    assert terms["retrieval"] == pytest.approx(float(retrieval), rel=1e-5)
    assert terms["generation_native"] == pytest.approx(float(out.lm_loss_sum / out.answer_tokens), rel=1e-5)
    assert terms["generation_compressed"] == pytest.approx(float(cut.lm_loss_sum / cut.answer_tokens), rel=1e-5)
    assert terms["generation_native"] != pytest.approx(terms["generation_compressed"], rel=1e-4)
    mixed = (terms["generation_native"] + terms["generation_compressed"]) / 2  # p is 0.5
    assert terms["loss"] == pytest.approx(float(retrieval) + config.loss.alpha_g * mixed, rel=1e-5)
    right = (queries @ targets.T).argmax(1) == torch.arange(len(queries))
    assert terms["precision_at_1"] == pytest.approx(float(right.float().mean()))


def test_precision_at_1_counts_the_same_content_as_right() -> None:
    queries, targets = torch.eye(4), torch.eye(4)[[0, 2, 1, 3]]
    none = torch.full((4,), -1)
    assert precision_at_1(queries, targets, none, none) == 0.5
    assert precision_at_1(queries, targets, none, torch.tensor([1, 7, 7, 2])) == 1.0
    assert precision_at_1(queries, targets, torch.tensor([1, 5, 5, 2]), none) == 1.0
    assert math.isnan(precision_at_1(queries[:0], targets[:0], none[:0], none[:0]))


def result_of(loss: float) -> StepResult:
    return StepResult(loss, loss, 0.0, 1, 0.0, 0.0)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(loss: float) -> None:
    with pytest.raises(DivergenceError, match=r"loss of step 7 is (nan|inf).*optim\.lr") as error:
        LossGuard(None, warmup_steps=100).on_step(7, result_of(loss))
    assert error.value.step == 7 and error.value.ranks == 1
    again = pickle.loads(pickle.dumps(error.value))
    assert isinstance(again, TrainingError) and str(again) == str(error.value)
    assert (again.step, again.ranks) == (7, 1)


def test_an_exploding_loss_ends_the_run() -> None:
    guard = LossGuard(10.0, warmup_steps=30)
    for step in range(30):
        guard.on_step(step, result_of(500.0 if step == 25 else 2.0))  # allowed in the warm-up
    guard.on_step(30, result_of(19.9))
    with pytest.raises(DivergenceError, match=r"train\.explosion_factor=10 times 2,"):
        guard.on_step(31, result_of(20.1))
    LossGuard(10.0, warmup_steps=0).on_step(0, result_of(1e6))  # too few losses to compare with


def test_a_loss_near_zero_does_not_explode() -> None:
    guard, free = LossGuard(10.0, warmup_steps=0), LossGuard(None, warmup_steps=0)
    for step in range(50):
        guard.on_step(step, result_of(0.01))
        free.on_step(step, result_of(1.0))
    guard.on_step(50, result_of(0.9))
    free.on_step(50, result_of(1e9))
    with pytest.raises(DivergenceError):
        guard.on_step(51, result_of(1.1))


def test_the_loop_stops_before_a_checkpoint_of_a_broken_model() -> None:
    config, engine, collator = started("train.log_every=1")
    saved: list[int] = []

    class BreakIt(Callback):
        def on_interval(self, interval: Interval) -> None:
            saved.append(interval.progress.step)
            if interval.progress.step == 3:
                with torch.no_grad():
                    engine.parameters[0].fill_(float("nan"))

    with pytest.raises(DivergenceError, match="step 3 is nan"):
        run(config, engine, collator, before=(LossGuard(None, warmup_steps=0), BreakIt()))
    assert saved == [1, 2, 3]


def validate_on_rank(number: int, folder: Path) -> None:
    """ZeRO-3: rank 1 has an image in none of its rows. A step follows, so training continues after a validation."""
    from crem.train.optim import initialise

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = run_config("train.zero_stage=3", "train.workers=2", "train.precision=float32")
    model, collator = build_model(config.model, texts=TEXTS)
    engine = initialise(model.train(), config, CPU)
    rows = pairs("no images")[number * ROWS // 2 : (number + 1) * ROWS // 2]
    batches = [tuple(collator.examples([replace(p, z=z) for p in rows]) for z in (False, True))]
    before = validate(engine, batches, config.loss, CPU)  # type: ignore[arg-type]
    train_step(engine, share(collator, "no images", 0, number, 2), config.loss)
    train_step(engine, share(collator, "no images", 1, number, 2), config.loss)
    after = validate(engine, batches, config.loss, CPU)  # type: ignore[arg-type]
    (folder / f"{number}.json").write_text(json.dumps([before.as_dict(), after.as_dict()]))


@pytest.mark.slow
def test_validation_on_two_ranks_under_zero_3_is_that_of_one_process(tmp_path: Path) -> None:
    spawn(validate_on_rank, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    config, engine, collator = started()
    whole = [tuple(collator.examples([replace(p, z=z) for p in pairs("no images")]) for z in (False, True))]
    assert first[0] == pytest.approx(validate(engine, whole, config.loss, CPU).as_dict(), rel=1e-5)  # type: ignore[arg-type]
    assert first[1]["loss"] != pytest.approx(first[0]["loss"], rel=1e-3), "the steps have changed the model"
