"""``crem demo``: every job on the embedded emoji corpus, on this machine, ending in ``report.html``.

The training is a short one, to be watched: from the shipped backbone ``crem-micro-base``, a few minutes. What embeds,
answers and serves is the shipped ``crem-micro``, which had an hour; both are evaluated, beside the untrained start.

It calls the same functions as the other sub-commands, and the server through a process of its own and HTTP, as a user
would. The output folder is claimed, and each stage replaces what an earlier demo left there.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from crem.config import RunConfig
from crem.errors import ConfigError, CremError, ResourceError
from crem.fetch import local_copy
from crem.host_memory import available_bytes
from pipelines.corpus.prepare import prepare
from pipelines.embedding.embed import embed
from pipelines.emoji import corpus_path
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.evaluation_result import EvaluationResult
from pipelines.evaluation.evaluation_text import evaluation_table
from pipelines.reports.demo_page import write_report
from pipelines.search import index as vector_index
from pipelines.tables import session
from pipelines.tables.prepared import PreparedRows, read_rows, texts_of
from pipelines.tables.storage import Folder
from pipelines.training.metrics_log import read_metrics
from pipelines.training.train import train

__all__ = ["demo"]

log = logging.getLogger(__name__)

_MIN_MEMORY_GIB = 4.0
_QUERIES = ("red apple", "grinning cat", "musical note", "sailboat", "birthday cake")
_MODEL = "crem-micro"
_START_S = 180.0


def demo(out: str, config: RunConfig) -> str:
    """Run everything into the local folder ``out``; returns the table that the command prints.

    Raises:
        ConfigError: ``out`` holds something else, or the preset needs what is not here.
        ResourceError: too little memory.
    """
    if config.train.gpus_per_worker or config.model.backbone not in (None, "crem-micro-base"):
        raise ConfigError(f"crem demo runs on CPU from what is in the package; preset {config.preset!r} needs more")
    free = available_bytes() / 2**30
    if free < _MIN_MEMORY_GIB:
        raise ResourceError(
            f"crem demo needs {_MIN_MEMORY_GIB:g} GiB of free memory and {free:.1f} are free; close something"
        )
    folder = Folder.at(out)
    if not folder.is_local:
        raise ConfigError(f"crem demo writes to a folder on this machine, not to {out!r}; give --out a path")
    folder.claim("demo")
    report = _Demo(Path(folder.uri), config).run()
    folder.write_json(report, "report.json")
    write_report(
        report, read_rows(str(Path(folder.uri) / "prepared"), split_prefix="test"), Path(folder.uri) / "report.html"
    )
    return _summary(report, folder.uri)


class _Demo:
    """The stages in order, with their timings."""

    def __init__(self, out: Path, config: RunConfig):
        self._out, self._config = out, config
        self._timings: dict[str, float] = {}
        self._stage = 0

    def run(self) -> dict[str, Any]:
        with _PeakMemory() as memory:
            began = time.monotonic()
            report = self._jobs()
            seconds = time.monotonic() - began
        return {
            "config": self._config.model_dump(mode="json"),
            "checks": _checks(report["evaluation"]),
            **report,
            "timings_s": {**self._timings, "total": round(seconds, 1)},
            "peak_memory_gib": round(memory.peak / 2**30, 2),
        }

    def _jobs(self) -> dict[str, Any]:
        path = {n: str(self._out / n) for n in ("prepared", "run", "model", "untrained", "embeddings", "index")}
        config = self._config
        with self._timed("start Ray"):
            os.environ.pop("RAY_ADDRESS", None)  # the demo is of this machine
            session.connect()
        with self._timed("prepare"):
            prepared = prepare(corpus_path(), path["prepared"], config)
        with self._timed("train"):
            trained = train(path["prepared"], path["run"], config, fresh=True)
            shutil.rmtree(path["model"], ignore_errors=True)
            shutil.copytree(local_copy(_MODEL), path["model"])
        with self._timed("embed"):
            embedded = embed(path["model"], path["prepared"], path["embeddings"], config, fresh=True)
        with self._timed("index"):
            indexed = vector_index.build(path["embeddings"], path["index"], config)
        with self._timed("evaluate"):
            evaluation = evaluate(path["model"], path["prepared"], str(self._out / "evaluation"), config).to_json()
        with self._timed("evaluate the short training"):
            short = evaluate(trained["model"], path["prepared"], str(self._out / "evaluation_short"), config).to_json()
        with self._timed("evaluate the untrained model"):
            _save_untrained(read_rows(path["prepared"], split_prefix="train"), path["untrained"], config)
            untrained = evaluate(
                path["untrained"], path["prepared"], str(self._out / "evaluation_untrained"), config
            ).to_json()
        ray.shutdown()
        with self._timed("serve"):
            served = _serve_and_ask(path["model"], path["index"], path["prepared"], self._out / "serve.log")
        return {
            "prepare": {k: prepared[k] for k in ("rows_in", "rows_out", "rejected", "filtered", "images")},
            "train": {k: v for k, v in trained.items() if k != "model"},
            "curves": read_metrics(Folder.at(path["run"])),
            "embed": {k: v for k, v in embedded.items() if k != "model"},
            "index": {k: v for k, v in indexed.items() if k != "model"},
            "evaluation": {k: v for k, v in evaluation.items() if k != "model"},
            "short": {k: short[k] for k in ("fingerprint", "retrieval", "answers", "cache")},
            "untrained": {k: untrained[k] for k in ("fingerprint", "retrieval", "answers", "cache")},
            "serve": served,
        }

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._stage += 1
        log.info("[%d/10] %s", self._stage, name)
        began = time.monotonic()
        yield
        self._timings[name] = round(time.monotonic() - began, 1)


def _checks(evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the demo promises, with what came out, on the unseen vendor's drawings."""
    found = evaluation["retrieval"]["text_to_image"]["all"]
    answers = evaluation["answers"]["all"]
    promises = {
        "text to image, Precision@1 over chance": (found["precision_at_1"] / found["chance_at_1"], 50.0),
        "answers, native over commonest": (answers["native"] / answers["commonest"], 1.5),
        "answers, compressed over commonest": (answers["compressed"] / answers["commonest"], 1.5),
        "answers, compressed over native": (answers["compressed"] / max(answers["native"], 1e-9), 0.5),
    }
    return {
        name: {"value": round(value, 2), "at_least": bound, "kept": bool(value >= bound)}
        for name, (value, bound) in promises.items()
    }


def _save_untrained(rows: PreparedRows, folder: str, config: RunConfig) -> None:
    """The model as it was before the first step: same seed, same tokenizer."""
    from crem.checkpoint import save_model
    from crem.model.build import build_model

    save_model(*build_model(config.model, texts=texts_of(rows), seed=config.train.seed), folder)


def _serve_and_ask(model: str, index: str, prepared: str, log_file: Path) -> dict[str, Any]:
    """Start ``crem serve`` as a process and use it over HTTP."""
    command = [sys.executable, "-m", "crem.cli", "serve", model, "--preset", "micro", "serve.port=0"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    began = time.monotonic()
    with open(log_file, "wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        url = _address(server, log_file)
        ready = time.monotonic() - began
        log.info("server ready at %s", url)
        return {"seconds_until_ready": round(ready, 1), **_queries(url, index, prepared)}
    finally:
        _stop(server)


def _address(server: subprocess.Popen[bytes], log_file: Path) -> str:
    """The URL that the server tells once it answers."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.poll() is None:
        if told := re.search(r"serving \S+ at (http://\S+)\n", log_file.read_text(errors="replace")):
            return told[1]
        time.sleep(0.2)
    tail = log_file.read_text(errors="replace").strip().splitlines()[-3:]
    raise CremError(f"the server did not start within {_START_S:.0f} s; the end of {log_file}: {' | '.join(tail)}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server, which shuts its Ray down; by force if it does not."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _queries(url: str, index: str, prepared: str) -> dict[str, Any]:
    opened = vector_index.Index(index)
    searches, seconds = [], []
    for text in _QUERIES:
        answer, took = _post(f"{url}/v1/embeddings", {"model": "model", "input": text})
        vector = np.array([answer["data"][0]["embedding"]], dtype=np.float32)
        hits = [{"id": h.id, "uri": h.uri, "score": round(h.score, 4)} for h in opened.search(vector, 5)[0]]
        searches.append({"query": text, "hits": hits})
        seconds.append(took)
    rows = read_rows(prepared, split_prefix="test")
    asked = [row for row in rows.table.to_pylist() if row["question"]]
    asked = asked[:: max(1, len(asked) // 4)][:4]
    chats = []
    for row in asked:
        image = row["query"]["images"][0]
        data_url = "data:image/png;base64," + base64.b64encode(rows.image(image)).decode()
        content = [{"type": "image_url", "image_url": {"url": data_url}}, {"type": "text", "text": row["question"]}]
        chat = {"question": row["question"], "expected": row["answer"], "image": image}
        for mode in ("native", "compressed"):
            body = {
                "model": "model",
                "messages": [{"role": "user", "content": content}],
                "mode": mode,
                "max_tokens": 16,
            }
            answer, took = _post(f"{url}/v1/chat/completions", body)
            chat |= {mode: answer["choices"][0]["message"]["content"], f"{mode}_s": round(took, 3)}
        chats.append(chat)
    return {"searches": searches, "embedding_request_s": round(float(np.median(seconds)), 4), "chats": chats}


def _post(url: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    began = time.monotonic()
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read()), time.monotonic() - began


class _PeakMemory:
    """Samples the memory that the whole machine uses beyond what it used before."""

    def __init__(self) -> None:
        self._before = psutil.virtual_memory().used
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self.peak = max(self.peak, psutil.virtual_memory().used - self._before)


def _summary(report: dict[str, Any], out: str) -> str:
    """What the command prints at its end."""
    timings = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in report["timings_s"].items())
    other = {
        name: report[name]["retrieval"].get("text_to_image", {}).get("all", {}).get("precision_at_1", 0.0)
        for name in ("short", "untrained")
    }
    return "\n".join(
        [
            evaluation_table(EvaluationResult.from_json(report["evaluation"])),
            f"text_to_image P@1 of the training just now, {report['train']['steps']} steps: {other['short']:.2%}; "
            f"untrained: {other['untrained']:.2%}",
            "",
            *(
                f"{'kept  ' if check['kept'] else 'MISSED'}  {name}: {check['value']} (at least {check['at_least']})"
                for name, check in report["checks"].items()
            ),
            "",
            timings,
            f"peak memory {report['peak_memory_gib']} GiB",
            "",
            f"model   {out}/model",
            f"report  {out}/report.html",
        ]
    )
