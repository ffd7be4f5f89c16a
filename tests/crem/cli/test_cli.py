"""The command line: help that teaches, overrides anywhere, one clear message for what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import crem
from crem.cli import main
from crem.cli.command_line import parse
from crem.config import RunConfig, load_config

JOBS = [
    "demo",
    "prepare",
    "synthesise",
    "graft",
    "train",
    "embed",
    "plan",
    "index",
    "search",
    "answer",
    "mine",
    "evaluate",
    "ablate",
    "serve",
    "submit",
    "doctor",
]


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help_with_an_example(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([job, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"crem {job}" in printed and "example:" in printed and "--print-config" in printed


def test_help_lists_the_jobs_and_loads_neither_torch_nor_ray(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from crem.cli import main; main(['--help']); assert not {'torch', 'ray'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(job in done.stdout for job in JOBS), done.stderr
    assert main([]) == 2
    assert "crem doctor" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"crem {crem.__version__}\n"


def test_print_config_is_complete_and_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "x", "optim.lr=3e-4", "--out", "y", "--print-config", "train.steps=7"]) == 0
    shown = capsys.readouterr().out
    config = RunConfig.model_validate(yaml.safe_load(shown))
    assert (config.optim.lr, config.train.steps, config.preset) == (3e-4, 7, "2b")
    (tmp_path / "run.yaml").write_text(shown)
    assert load_config(tmp_path / "run.yaml") == config


@pytest.mark.parametrize("job", JOBS)
def test_print_config_needs_no_folders(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([job, "--preset", "7b", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["preset"] == "7b"


def test_overrides_of_a_submitted_job_stand_behind_the_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["train", "a", "--out", "b", "train.steps=2"]
    line = parse(["submit", "--", *job])
    assert line.job == "submit" and line.overrides == ()
    assert parse(job).overrides == ("train.steps=2",)
    assert main(["submit", "train.steps=1", "--", *job]) == 2
    assert "put it behind" in capsys.readouterr().err
    assert main(["submit", "--", *job, "train.stepz=1"]) == 2
    assert "train.steps" in capsys.readouterr().err
    assert main(["submit", "--", "trian", "a"]) == 2
    assert 'Did you mean "train"' in capsys.readouterr().err
    assert main(["submit", "--", *job, "--outt", "c"]) == 2
    assert "Did you mean --out" in capsys.readouterr().err
    assert main(["submit"]) == 2
    assert "a job is missing" in capsys.readouterr().err


def test_settings_stand_anywhere_and_the_last_wins(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "train.steps=1", "optim.lr=3e-4", "x", "--out", "y", "train.steps=2", "--preset", "2b+full"]
    line = parse(words)
    assert line.overrides == ("train.steps=1", "optim.lr=3e-4", "train.steps=2")
    assert main([*words, "-v", "--preset", "7b", "--print-config"]) == 0
    config = RunConfig.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert (config.preset, config.train.steps, config.optim.lr) == ("7b", 2, 3e-4)
    seeds = parse(["ablate", "p", "--out", "o", "--seeds", "3", "4", "train.steps=2"])
    assert seeds.call.keywords["seeds"] == (3, 4) and seeds.overrides == ("train.steps=2",)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian", "x", "--out", "y"], 'Did you mean "train"'),
        (["train", "x", "--outt", "y"], "Did you mean --out"),
        (["train", "x", "y"], "unexpected word 'y'"),
        (["train", "x", "--out", "y", "--resume", "--fresh"], "--resume, --fresh"),
        (["evaluate", "x", "--out", "y"], "--model"),
        (["search", "x", "-k", "many"], "many"),
        (["train", "x", "--out", "y", "--preset", "2b-full"], "2b+full"),
        (["train", "x", "--out", "y", "--preset", "/nowhere/run.yaml"], "there is no file '/nowhere/run.yaml'"),
        (["train", "x", "--out", "y", "train.stepz=1"], "train.steps"),
        (["train", "x", "--out", "y", "--preset", "mikro"], "micro"),
        (["train", "/nowhere/prepared", "--out", "y"], "crem prepare"),
        (["prepare", "/nowhere/corpus", "--out", "y"], "/nowhere/corpus"),
        (["embed", "/nowhere/items", "--model", "m", "--out", "y"], "/nowhere/items"),
        (["index", "/nowhere/vectors", "--out", "y"], "/nowhere/vectors"),
        (["search", "apple", "--index", "/nowhere/index"], "crem index"),
        (["search"], "nothing to look for"),
        (["answer", "what?", "--index", "/nowhere/index"], "crem index"),
        (["search", "apple", "index.probez=1"], "index.probes"),
        (["doctor", "foo.bar=1"], "foo"),
        (["evaluate", "/nowhere/prepared", "--model", "m", "--out", "y"], "crem prepare"),
        (["serve", "/nowhere/model", "serve.port=0"], "/nowhere/model"),
        (["demo", "--preset", "2b"], "runs on CPU"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) in (1, 2)
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown, shown


def test_a_stock_backbone_is_not_a_crem_checkpoint(
    tiny_model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = tmp_path / "stock"
    shutil.copytree(tiny_model_dir, stock)
    (stock / "crem.json").unlink()
    assert main(["serve", str(stock), "serve.port=0"]) == 1
    assert "crem train" in capsys.readouterr().err


def test_doctor_names_versions_and_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    assert main(["doctor", "--storage", str(tmp_path / "bucket")]) == 0
    shown = capsys.readouterr().out
    assert ray.__version__ in shown and "readable and writable" in shown
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--storage", str(tmp_path / "file" / "below")]) == 1
    assert "PROBLEM" in capsys.readouterr().out


def test_search_prints_json_lines(tiny_model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Index and search a folder of embeddings written by hand, through the command line."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.tables import schema

    model = crem.load(tiny_model_dir)
    texts = ["a red apple", "a green square", "animals"]
    table = pa.table(
        {"id": [1, 2, 3], "embedding": list(model.embed(texts)), "error": [None] * 3, "uri": [None] * 3, "text": texts},
        schema=schema.embeddings(schema.EmbeddingStamp(model.fingerprint, model.dim, tiny_model_dir)),
    )
    (tmp_path / "vectors").mkdir()
    pq.write_table(table, tmp_path / "vectors" / "part.parquet")
    assert main(["index", str(tmp_path / "vectors"), "--out", str(tmp_path / "index")]) == 0
    capsys.readouterr()
    assert main(["search", "a green square", "--index", str(tmp_path / "index"), "-k", "2", "--json"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [h["rank"] for h in hits] == [1, 2] and hits[0]["id"] == 2 and hits[0]["score"] > 0.9999


@pytest.mark.parametrize("job", ["prepare", "serve", "doctor"])
def test_a_ray_client_address_is_refused_with_the_remedy(job: str, tmp_path: Path, tiny_model_dir: str) -> None:
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text('{"query_text": "a", "target_text": "b"}\n')
    words = {"prepare": [str(corpus), "--out", str(tmp_path / "out")], "serve": [tiny_model_dir], "doctor": []}
    done = subprocess.run(
        [sys.executable, "-m", "crem.cli", job, *words[job]],
        env=os.environ | {"RAY_ADDRESS": "ray://head:10001"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = done.stdout + done.stderr
    assert done.returncode == (1 if job == "doctor" else 2) and "Traceback" not in output, output
    assert "RAY_ADDRESS='ray://head:10001' is a Ray Client address" in output and "crem submit" in output
    assert not (tmp_path / "out").exists()
