"""Metrics of a run: files always, and trackers if they are installed and set."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crem.config import load_config
from crem.errors import ConfigError
from crem.train.progress import Progress, ValidationResult
from pipelines.tables.storage import Folder
from pipelines.training.follow import cuts_line, duration, progress_line
from pipelines.training.metrics_log import MetricsLog, read_metrics
from pipelines.training.trackers import check_tracker, open_tracker

PLAIN = {
    "loss": 2.0,
    "retrieval": 1.5,
    "generation": 0.5,
    "answer_tokens": 40,
    "alignment": 0.3,
    "uniformity": -2.0,
    "temperature": 0.05,
    "lr": 2e-3,
    "grad_norm": 1.25,
    "samples_per_s": 812.4,
    "tokens_per_s": 21_480.0,
    "flops_utilisation": 0.184,
    "peak_flops": 1.2e11,
    "waiting_share": 0.02,
    "padding_share": 0.05,
    "seconds_left": 4000.0,
}


def progress(step: int, validation: ValidationResult | None = None, **terms: float) -> Progress:
    return Progress(step=step, **PLAIN | terms, validation=validation)  # type: ignore[arg-type]


def test_files_of_every_run(tmp_path: Path) -> None:
    """JSON lines are JSON (no NaN), TensorBoard has the same numbers, and a resumed run replaces what it repeats."""
    run = Folder.at(tmp_path)
    log = MetricsLog(run, fresh=True)
    log.write(progress(10, alignment=float("nan")))
    log.write(progress(20, ValidationResult(3.0, 2.0, 0.5, 1.0, 1.5)))
    log.write(progress(30))
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert first["alignment"] is None and first["loss"] == 2.0
    resumed = MetricsLog(run, fresh=False)
    resumed.write(progress(20, loss=1.0))
    resumed.close()
    assert [(e["step"], e["loss"]) for e in read_metrics(run)] == [(10, 2.0), (20, 1.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [e.value for e in board.Scalars("validation/loss")] == [3.0]
    assert [e.step for e in board.Scalars("train/tokens_per_s")] == [10, 20, 30, 20]
    assert "train/alignment" in board.Tags()["scalars"]


def test_the_line_that_a_person_reads() -> None:
    line = progress_line(progress(120), 560)
    assert line == (
        "step 120/560  loss 2.000 (retrieval 1.500, generation 0.500)  lr 2.0e-03  grad 1.25  812 samples/s  "
        "21.5k tokens/s  MFU 18.4 %  67 min left"
    )
    assert [duration(s) for s in (0, 45.4, 600, 3 * 3600 + 300)] == ["0 s", "45 s", "10 min", "3 h 05 min"]


def test_the_share_of_cut_texts_is_that_of_all_steps() -> None:
    prompt = load_config("micro").model.prompt
    entries = [progress(10, cut_share=0.5).as_dict(), progress(30).as_dict(), progress(40, cut_share=0.1).as_dict()]
    line = cuts_line(entries, prompt)
    assert line is not None and line.startswith("in 40 steps 15 % of the sequences lost the end of a text")
    assert "max_text_tokens=64" in line
    old = [{k: v for k, v in progress(10).as_dict().items() if k != "cut_share"}]  # of a run begun before the figure
    assert cuts_line(old, prompt) is None and cuts_line([], prompt) is None


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_a_missing_package_is_reported_before_any_work(kind: str) -> None:
    if importlib.util.find_spec(kind) is not None:
        pytest.skip(f"{kind} is installed")
    with pytest.raises(ConfigError, match=rf"train\.tracker={kind}.*pip install {kind}"):
        check_tracker(kind)


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client on a SQLite store: the resumed run continues the same MLflow run."""
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config, run = load_config("micro", ["train.tracker=mlflow"]), Folder.at(tmp_path / "run")
    for step, loss, failed in ((10, 2.0, True), (20, 1.0, False)):
        log = MetricsLog(run, fresh=False, tracker=open_tracker(run, config))
        log.write(progress(step, loss=loss, alignment=float("nan")))
        log.close(failed=failed)
    client = tracking.MlflowClient()
    found = client.get_run(json.loads((tmp_path / "run" / "tracker.json").read_text())["id"])
    assert found.info.status == "FINISHED" and found.data.params["optim.lr"] == "0.0025"
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss")] == [(10, 2), (20, 1)]
    assert "train/alignment" not in found.data.metrics


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package in its offline mode, twice for one run: what it wrote can be synchronised as one."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config, run = load_config("micro", ["train.tracker=wandb"]), Folder.at(tmp_path / "run")
    for step in (10, 20):
        log = MetricsLog(run, fresh=False, tracker=open_tracker(run, config))
        log.write(progress(step))
        log.close()
    known = json.loads((tmp_path / "run" / "tracker.json").read_text())["id"]
    files = list(tmp_path.glob(f"wandb/offline-run-*-{known}/run-{known}.wandb"))
    assert len(files) == 2 and all(b"train/tokens_per_s" in file.read_bytes() for file in files)
