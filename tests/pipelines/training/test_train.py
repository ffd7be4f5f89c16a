"""The training job on a real Ray: DeepSpeed over two workers, killed and resumed, and its result evaluated."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import crem
from crem.config import load_config
from crem.errors import ConfigError, TrainingError
from pipelines.corpus.prepare import prepare
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.evaluation_text import evaluation_table
from pipelines.tables import session
from pipelines.tables.prepared import index_images, index_rows, load_rows
from pipelines.tables.storage import Folder
from pipelines.training.held_out import split_rows
from pipelines.training.metrics_log import read_metrics
from pipelines.training.train import train
from tests.conftest import TINY
from tests.pipelines.shapes import write_corpus

pytestmark = pytest.mark.ray

RUN = [
    *TINY,
    "train.global_batch=16",
    "train.workers=2",
    "train.log_every=1",
    "train.cpus_per_worker=0.5",
    "optim.warmup_steps=2",
    "data.retrieval_share=0.75",
    "data.augment=0",
    "loss.alpha_g=1",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    source = write_corpus(folder / "corpus")
    manifest = prepare(source, str(folder / "prepared"), load_config("micro", RUN))
    assert (manifest.rows_in, manifest.rows_out, manifest.images) == (96, 96, 36)
    return str(folder / "prepared")


def metrics(run: Path) -> dict[int, dict[str, float]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {entry["step"]: entry for entry in map(json.loads, lines)}


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(prepared: str, tmp_path: Path) -> None:
    """ZeRO-3. The steps that are run twice, before the kill and after the resume, have the same losses."""
    run = tmp_path / "run"
    overrides = [*RUN, "train.zero_stage=3", "train.steps=15", "train.checkpoint_every=5"]
    command = [sys.executable, "-m", "crem.cli", "train", prepared, "--out", str(run), "--preset", "micro", *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with open(tmp_path / "log", "wb") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while max(metrics(run), default=0) < 7 and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        family = psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []
        for process in [job, *family]:  # the driver, its Ray and the workers, without time to clean up
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        job.wait()
    before = metrics(run)
    assert len(before) >= 7, (tmp_path / "log").read_text()[-2000:]
    assert not (run / "model" / "crem.json").exists() or max(before) == 15

    config = load_config("micro", overrides)
    with pytest.raises(ConfigError, match="--resume"):
        train(prepared, str(run), config)
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        train(prepared, str(run), load_config("micro", [*overrides, "optim.lr=1"]), resume=True)
    result = train(prepared, str(run), config, resume=True)
    after = metrics(run)
    assert sorted(after) == list(range(1, 16))
    again = [step for step in before if step > 5 and after[step] != before[step]]
    assert again, "the run went on after its checkpoint, so some steps were run twice"
    for step in before:
        for name in ("retrieval", "generation", "lr"):
            assert after[step][name] == pytest.approx(before[step][name], rel=1e-5), (step, name)
    assert crem.load(result.model).fingerprint == result.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_trained_model_beats_chance(stage: int, prepared: str, tmp_path: Path) -> None:
    overrides = [*RUN, f"train.zero_stage={stage}", "train.steps=200", "train.log_every=20", "optim.lr=1e-3"]
    config = load_config("micro", [*overrides, "train.validate_every=50"])
    result = train(prepared, str(tmp_path / "run"), config)
    losses = metrics(tmp_path / "run")
    validated = {step: m["validation/loss"] for step, m in losses.items() if "validation/loss" in m}
    assert sorted(validated) == [50, 100, 150, 200] and validated[200] < validated[50]
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["loss"] == min(validated.values()) == validated[best["step"]]
    assert crem.load(str(tmp_path / "run" / "best")).fingerprint == best["fingerprint"]
    assert 0 < losses[200]["flops_utilisation"] < 1 and losses[200]["tokens_per_s"] > losses[200]["samples_per_s"]
    assert "complete" in (tmp_path / "run" / "report.html").read_text()
    assert losses[200]["generation"] < 0.5 * losses[20]["generation"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    report = evaluate(result.model, prepared, str(tmp_path / "evaluation"), config)
    for task in ("t2i", "i2t"):
        figures = report.retrieval[task]["all"]
        assert figures.candidates == 12 and figures.queries == 12
        assert figures.precision_at_1 > 2 * figures.chance_at_1
    answers = report.answers["all"]
    assert answers.commonest == 0.25 and answers.questions == 12
    assert answers.native >= 3 * answers.commonest
    assert report.cache is not None and report.cache.ratio is not None and 0 < report.cache.ratio < 0.5
    assert "P@1" in evaluation_table(report)
    assert json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["fingerprint"] == result.fingerprint


@pytest.mark.slow
def test_a_run_that_diverges_saves_the_rows_of_the_step(prepared: str, tmp_path: Path) -> None:
    """A learning rate that throws the weights out of what a float can hold: NaN after the warm-up's first step."""
    config = load_config("micro", [*RUN, "train.steps=20", "optim.lr=1e30", "train.max_failures=0"])
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"loss of step (\d+) is (nan|inf).*optim\.lr.*failed_step\.json"):
        train(prepared, str(run), config)
    saved = json.loads((run / "failed_step.json").read_text())
    rows = index_rows(prepared, split_prefix="train")
    training, _ = split_rows(rows, config)
    plan = training.plan(config)
    for rank in (0, 1):
        share = plan.step(saved["step"], rank=rank, ranks=2)
        ids = training.ids[share.rows].tolist()
        assert [row["id"] for row in saved["ranks"][rank]["rows"]] == ids and len(ids) == 8
    assert max(metrics(run), default=0) <= saved["step"]
    assert "failed: the loss of step" in (run / "report.html").read_text()
    assert not (run / "model").exists()


@pytest.mark.slow
def test_a_run_on_object_storage(prepared: str, s3_server: Any, s3_env: Any) -> None:
    """Checkpoints by Ray Train, model and metrics by us, resumed when complete: all on a real S3 server."""
    out = f"s3://{s3_server.bucket}/runs/shapes"
    overrides = [*RUN, "train.zero_stage=2", "train.steps=4", "train.checkpoint_every=2"]
    command = [sys.executable, "-m", "crem.cli", "train", prepared, "--out", out, "--preset", "micro", *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Folder.at(out)
    assert [entry["step"] for entry in read_metrics(run)] == [1, 2, 3, 4]
    assert run.child("tensorboard").files() and run.exists("checkpoints")
    assert crem.load(f"{out}/model").embed(["red circle"]).shape == (1, 48)
    again = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "complete" in again.stderr
    assert subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode == 2


def test_rows_and_the_plan_read_each_row_once_per_epoch(prepared: str) -> None:
    rows = index_rows(prepared, split_prefix="train")
    plan = rows.plan(load_config("micro", RUN))
    assert (len(plan.retrieval), len(plan.heterogeneous), plan.retrieval_per_step) == (48, 24, 12)
    seen = np.concatenate([plan.step(s).rows for s in range(4)])
    assert sorted(r for r in seen if r in set(plan.retrieval)) == sorted(plan.retrieval)
    pair = load_rows(rows, index_images(prepared)).examples(plan.retrieval[:1], np.array([True]))[0]
    assert pair.z and pair.target is not None and pair.target_key > 0


def test_too_few_devices_is_said_at_once_and_begins_nothing(prepared: str, tmp_path: Path) -> None:
    session.connect()
    out, greedy = tmp_path / "run", ["train.cpus_per_worker=400", "train.gpus_per_worker=1"]
    with pytest.raises(crem.errors.ResourceError, match=r"801 CPU and 2 GPU, .* and 0 GPU here; lower train\.workers"):
        train(prepared, str(out), load_config("micro", [*RUN, *greedy]))
    assert not (out / "config.yaml").exists()  # the next start needs no --fresh


@pytest.mark.slow
def test_a_refused_fresh_start_leaves_the_run_that_is_there(prepared: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    short = load_config("micro", [*RUN, "train.workers=1", "train.steps=1"])
    done = train(prepared, str(out), short)
    with pytest.raises(crem.errors.ResourceError):
        train(prepared, str(out), load_config("micro", [*RUN, "train.cpus_per_worker=400"]), fresh=True)
    assert train(prepared, str(out), short, resume=True) == done
