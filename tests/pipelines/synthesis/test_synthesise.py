"""``crem synthesise``: prepared tables become prepared tables with questions; money is spent once and within bounds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crem.config import RunConfig, load_config
from crem.errors import ConfigError, ResourceError
from pipelines.corpus.verify import verify
from pipelines.synthesis.answer_table import JOURNAL
from pipelines.synthesis.endpoint import KEY
from pipelines.synthesis.synthesise import synthesise
from pipelines.tables.manifest import read_manifest
from pipelines.tables.prepared import read_rows
from pipelines.tables.storage import Folder
from tests.pipelines.conftest import table
from tests.pipelines.synthesis.answering_server import (
    AnsweringServer,
    Reply,
    Request,
    answering,
    completion,
    good,
    refusal,
)
from tests.pipelines.synthesis.unasked import ASKABLE, ROWS, SKIPPED, write_unasked

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    return write_unasked(tmp_path_factory.mktemp("unasked"))


def config(server: AnsweringServer, *overrides: str) -> RunConfig:
    basic = [f"base_url={server.base_url}", "model=m", "rows_per_shard=25", "actors=1"]
    return load_config("micro", [f"synthesise.{override}" for override in (*basic, *overrides)])


def flaky(number: int, request: Request) -> Reply:
    """One request in four fails in one way or another."""
    bad = {
        2: refusal(429, "slow down", Retry_After="0.1"),
        6: refusal(500, "oh", Retry_After="0.1"),
        10: Reply(body=completion("no JSON")),
        14: Reply(200, completion("{}"), {"retry-after": "0.1"}, cut_at=9),
    }
    return bad.get(number % 16) or good(request)


def test_rows_get_questions_and_the_tables_can_be_trained_on(prepared: str, tmp_path: Path) -> None:
    with answering(flaky) as server:
        made = synthesise(prepared, str(tmp_path), config(server, "input_price=1", "output_price=2", "actors=2"))
        sent = len(server.requests)
    assert (made.rows_in, made.questions, made.by_reason) == (ROWS, ASKABLE, SKIPPED)
    assert made.spent.requests == sent > ASKABLE
    assert made.cost == pytest.approx(sum(made_cost(record) for record in answers(tmp_path)))
    before = {row["id"]: row for row in table(f"{prepared}/rows")}
    after = {row["id"]: row for row in table(tmp_path / "rows")}
    assert before.keys() == after.keys()
    changed = {i for i in before if before[i] != after[i]}
    assert len(changed) == ASKABLE
    for i in changed:
        assert before[i] | {"question": "What is it? 0", "answer": "thing 0"} == after[i]
        assert before[i]["split"] == "train" and before[i]["query"]["images"] and before[i]["question"] is None
    rows = read_rows(str(tmp_path), split_prefix="train")
    examples = rows.examples(np.arange(rows.table.num_rows), np.zeros(rows.table.num_rows, np.bool_))
    both = [e for e in examples if e.target is not None and e.answer is not None]
    assert len(both) == ASKABLE + 1 and all(isinstance(e.query.images[0], bytes) for e in both)
    manifest = read_manifest(Folder.at(tmp_path))
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected, manifest.images) == (ROWS, ROWS, 0, 36)
    assert verify(str(tmp_path)).faults == ()
    assert not (tmp_path / JOURNAL).exists()


def made_cost(record: dict[str, Any]) -> float:
    return ((record["prompt_tokens"] or 0) + 2 * (record["answer_tokens"] or 0)) / 1e6


def answers(out: Path) -> list[dict[str, Any]]:
    return table(out / "answers")


@pytest.mark.slow
def test_every_answer_keeps_where_it_comes_from(prepared: str, tmp_path: Path) -> None:
    with answering(lambda number, request: good(request)) as server:
        synthesise(prepared, str(tmp_path), config(server, "temperature=0.3", "request={seed: 9}"))
        host = server.base_url.split("/")[2]
    records = answers(tmp_path)
    assert len(records) == ROWS and Counter(r["reason"] for r in records if r["reason"]) == SKIPPED
    asked = [r for r in records if r["model"] is not None]
    assert len(asked) == ASKABLE
    for record in asked:
        assert (record["model"], record["endpoint"], record["prompt"]) == ("m", host, "grounded-1")
        assert len(record["prompt_hash"]) == 16 and record["asked_at"].year >= 2024 and record["seconds"] > 0
        assert (record["requests"], record["prompt_tokens"], record["answer_tokens"]) == (1, 100, 20)
        assert json.loads(record["parameters"])["request"] == {"seed": 9}
        assert record["pairs"] == [{"kind": "describe", "question": "What is it? 0", "answer": "thing 0"}]
    stored = read_manifest(Folder.at(tmp_path)).config["synthesise"]
    assert stored["prompt_hash"] == asked[0]["prompt_hash"] and stored["requests"] == ASKABLE


def test_a_complete_output_is_not_asked_again_and_other_settings_are_refused(prepared: str, tmp_path: Path) -> None:
    with answering(lambda number, request: good(request)) as server:
        synthesise(prepared, str(tmp_path), config(server))
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
        again = synthesise(prepared, str(tmp_path), config(server, "concurrency=3"))
        assert again.was_complete and again.questions == ASKABLE and len(server.requests) == ASKABLE
        for override, named in (("model=n", "model: 'm'"), ("temperature=1", "temperature"), ("split=test", "split")):
            with pytest.raises(ConfigError, match=named):
                synthesise(prepared, str(tmp_path), config(server, override))
        with pytest.raises(ConfigError, match="holds the tables themselves"):
            synthesise(prepared, prepared, config(server))
        with pytest.raises(ConfigError, match="output of crem prepare"):
            synthesise(str(tmp_path), prepared, config(server))
        with pytest.raises(ConfigError, match="no completed prepared tables"):
            synthesise(str(tmp_path / "rows"), str(tmp_path / "x"), config(server))
        with pytest.raises(ConfigError, match="who writes the questions"):
            synthesise(prepared, str(tmp_path / "x"), load_config("micro"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == files


@pytest.mark.slow
def test_several_questions_become_copies_of_the_row(prepared: str, tmp_path: Path) -> None:
    with answering(lambda number, request: good(request, pairs=3)) as server:
        made = synthesise(prepared, str(tmp_path), config(server, "questions=3"))
    assert (made.questions, read_manifest(Folder.at(tmp_path)).rows_out) == (3 * ASKABLE, ROWS + 2 * ASKABLE)
    rows = table(tmp_path / "rows")
    assert len({row["id"] for row in rows}) == len(rows) == ROWS + 2 * ASKABLE
    of_one = [row for row in rows if row["key"].startswith("red-circle-14.png")]
    assert [(r["key"], r["question"]) for r in of_one] == [
        ("red-circle-14.png", "What is it? 0"),
        ("red-circle-14.png/2", "What is it? 1"),
        ("red-circle-14.png/3", "What is it? 2"),
    ]
    assert all(row["query"] == of_one[0]["query"] and row["target"] == of_one[0]["target"] for row in of_one)


def test_bounds_stop_the_job_and_it_goes_on(prepared: str, tmp_path: Path) -> None:
    with answering(lambda number, request: good(request)) as server:
        with pytest.raises(ResourceError, match=r"stopped at synthesise.max_requests=7: 7 requests, 840 tokens"):
            synthesise(prepared, str(tmp_path), config(server, "max_requests=7"))
        assert len(server.requests) == 7 and not (tmp_path / "manifest.json").exists()
        prices = config(server, "input_price=1000", "output_price=1000", "max_cost=1.9")
        with pytest.raises(ResourceError, match="max_cost=1.9: 15 requests, 1800 tokens, cost 1.80"):
            synthesise(prepared, str(tmp_path), prices)
        assert len(server.requests) == 15
        made = synthesise(prepared, str(tmp_path), config(server))
        assert len(server.requests) == made.spent.requests == ASKABLE == made.questions


@pytest.mark.slow
def test_a_bound_can_finish_the_tables(prepared: str, tmp_path: Path) -> None:
    with answering(lambda number, request: good(request)) as server:
        made = synthesise(prepared, str(tmp_path), config(server, "max_requests=5", "when_spent=finish"))
        assert made.questions == 5 and made.by_reason == SKIPPED | {"bound_reached": ASKABLE - 5}
        assert read_manifest(Folder.at(tmp_path)).rows_out == ROWS
        more = synthesise(str(tmp_path), str(tmp_path / "more"), config(server))  # the rest, from the tables made
        assert more.questions == ASKABLE - 5 and len(server.requests) == ASKABLE


@pytest.mark.slow
def test_failures_are_counted(prepared: str, tmp_path: Path) -> None:
    def behave(number: int, request: Request) -> Reply:
        return good(request) if "count" in request.text.partition("Rules")[0] else Reply(body=completion("sorry"))

    with answering(behave) as server:
        made = synthesise(prepared, str(tmp_path / "a"), config(server, "attempts=2"))
        asked = [r for r in answers(tmp_path / "a") if r["model"]]
        failed = [r for r in asked if r["reason"]]
        assert made.by_reason == SKIPPED | {"invalid_json": len(failed)} and 0 < len(failed) < ASKABLE
        assert all(r["requests"] == 2 and "sorry" in r["detail"] and r["pairs"] == [] for r in failed)
        assert len(server.requests) == len(asked) + len(failed)


@pytest.mark.slow
def test_a_wrong_key_ends_the_job(prepared: str, tmp_path: Path) -> None:
    with (
        answering(lambda number, request: refusal(401, "Incorrect API key provided: sk-secret")) as server,
        pytest.raises(ConfigError, match=f"status 401.*{KEY}"),
    ):
        synthesise(prepared, str(tmp_path), config(server))
    assert len(server.requests) <= 32 and not (tmp_path / "manifest.json").exists()


def command(prepared: str, out: Path, server: AnsweringServer, *overrides: str) -> list[str]:
    words = ["synthesise", prepared, "--out", str(out), "--preset", "micro"]
    basic = [f"base_url={server.base_url}", "model=m", "rows_per_shard=10", *overrides]
    return [sys.executable, "-m", "crem.cli", *words, *(f"synthesise.{override}" for override in basic)]


def wait_for(what: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["driver", "endpoint"])
def test_killed_at_any_moment_it_goes_on_without_asking_twice(prepared: str, tmp_path: Path, how: str) -> None:
    """The driver is killed, or the endpoint goes away for longer than the job waits."""
    in_flight = 2
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", KEY: "sk-secret"}

    def behave(number: int, request: Request) -> Reply:
        return Reply(**(vars(good(request)) | {"delay_s": 0.5}))

    with answering(behave) as server:
        words = command(prepared, tmp_path, server, f"concurrency={in_flight}", "away_s=1", "timeout_s=5")
        run = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait_for(lambda: len(server.requests) >= 12)
        port = server.server_port
        if how == "driver":
            os.killpg(run.pid, signal.SIGKILL)
    error = run.communicate(timeout=300)[1]
    if how == "endpoint":
        assert run.returncode == 1 and error.strip().splitlines()[-1].startswith("crem synthesise: no answer for")
    first = len(server.requests)
    with answering(behave, port) as second:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        assert "sk-secret" not in done.stdout + done.stderr + error
    lost = first + len(second.requests) - ASKABLE
    per_second = 2 * in_flight
    assert 0 <= lost <= in_flight + 2 * per_second, "what was in flight, and the answers of the last second"
    assert f"new questions {ASKABLE}" in done.stdout and len(table(tmp_path / "rows")) == ROWS


@pytest.mark.slow
def test_our_own_server_speaks_the_same_language(prepared: str, tmp_path: Path, tiny_model_dir: str) -> None:
    """A model of random weights answers with nonsense; the wire format, images and all, is what is tested."""
    log = tmp_path / "serve.log"
    words = [sys.executable, "-m", "crem.cli", "serve", tiny_model_dir, "serve.port=0"]
    with log.open("w") as lines:
        serving = subprocess.Popen(words, stdout=lines, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(lambda: serving.poll() is not None or " at http://" in log.read_text())
        address = log.read_text().partition(" at http://")[2].split()[0]
        overrides = [
            *(f"synthesise.base_url=http://{address}/v1", "synthesise.model=model", "synthesise.attempts=1"),
            *("synthesise.max_answer_tokens=8", "synthesise.max_failed_share=1", "synthesise.concurrency=4"),
        ]
        made = synthesise(prepared, str(tmp_path / "out"), load_config("micro", overrides))
    finally:
        serving.terminate()  # not its group: Ray has to outlive the application that is deleted
        serving.wait(timeout=120)
    reasons = {reason: n for reason, n in made.by_reason.items() if reason not in SKIPPED}
    assert sum(reasons.values()) == ASKABLE and set(reasons) <= {"invalid_json", "cut_off"}, made.by_reason
    assert made.spent.prompt_tokens > 100 * ASKABLE and 0 < made.spent.answer_tokens <= 8 * ASKABLE
