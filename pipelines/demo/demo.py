"""``crem demo``: every job on the embedded emoji corpus, on this machine, ending in ``report.html``.

The training is a short one, to be watched: from the shipped backbone ``crem-micro-base``, a few minutes. The shipped
``crem-micro``, which was trained for an hour, embeds, answers and is served; both are evaluated, and the untrained
start beside them.

The demo calls the same functions as the other sub-commands, and uses the server over HTTP (``served.py``). The output
folder is claimed, and each stage replaces what an earlier demo left there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray

from crem.config import RunConfig
from crem.errors import ConfigError, ResourceError
from crem.fetch import local_copy
from crem.host_memory import available_bytes
from pipelines.corpus.prepare import prepare
from pipelines.demo.demo_page import demo_page
from pipelines.demo.demo_report import Check, DemoReport
from pipelines.demo.served import serve_and_query
from pipelines.embedding.embed import embed
from pipelines.emoji import corpus_path
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.evaluation_result import EvaluationResult
from pipelines.evaluation.evaluation_text import evaluation_table
from pipelines.search.index import build
from pipelines.tables import session
from pipelines.tables.prepared import PreparedRows, read_rows, texts_of
from pipelines.tables.storage import Folder, JobKind
from pipelines.training.metrics_log import read_metrics
from pipelines.training.train import train

__all__ = ["demo"]

log = logging.getLogger(__name__)

_MIN_MEMORY_GIB = 4.0
_MODEL = "crem-micro"
_STAGES = 9


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
    folder.claim(JobKind.DEMO)
    report = _run(Path(folder.uri), config)
    folder.write_json(report.to_json(), "report.json")
    rows = read_rows(folder.child("prepared").uri, split_prefix="test")
    folder.write_bytes(demo_page(report, rows).encode(), "report.html")
    return _summary(report, folder.uri)


def _run(out: Path, config: RunConfig) -> DemoReport:
    """The stages, one after the other."""
    prepared, run, model, untrained_model, embeddings, index = (
        str(out / name) for name in ("prepared", "run", "model", "untrained", "embeddings", "index")
    )
    timer = _Timer()
    with _PeakMemory() as memory:
        with timer.stage("start Ray"):
            os.environ.pop("RAY_ADDRESS", None)  # the demo is of this machine
            session.connect()
        with timer.stage("prepare"):
            counts = prepare(corpus_path(), prepared, config)
        with timer.stage("train"):
            trained = train(prepared, run, config, fresh=True)
            shutil.rmtree(model, ignore_errors=True)
            shutil.copytree(local_copy(_MODEL), model)
        with timer.stage("embed"):
            embedded = embed(model, prepared, embeddings, config, fresh=True)
        with timer.stage("index"):
            indexed = build(embeddings, index, config)
        with timer.stage("evaluate"):
            evaluation = evaluate(model, prepared, str(out / "evaluation"), config)
        with timer.stage("evaluate the short training"):
            short = evaluate(trained.model, prepared, str(out / "evaluation_short"), config)
        with timer.stage("evaluate the untrained model"):
            _save_untrained(read_rows(prepared, split_prefix="train"), untrained_model, config)
            untrained = evaluate(untrained_model, prepared, str(out / "evaluation_untrained"), config)
        ray.shutdown()
        with timer.stage("serve"):
            served = serve_and_query(model, index, prepared, out / "serve.log")
        timings_s = timer.timings_s
    return DemoReport(
        config=config,
        checks=_checks(evaluation),
        prepare=counts,
        train=trained,
        curves=list(read_metrics(Folder.at(run))),
        embed=embedded,
        index=indexed,
        evaluation=evaluation,
        short=short,
        untrained=untrained,
        serve=served,
        timings_s=timings_s,
        peak_memory_gib=round(memory.peak_bytes / 2**30, 2),
    )


def _checks(evaluation: EvaluationResult) -> dict[str, Check]:
    """The promises of the demo and what came out, on the drawings of the unseen vendor."""
    retrieval, answers = evaluation.retrieval["text_to_image"]["all"], evaluation.answers["all"]
    assert answers.compressed is not None, "the shipped model has chorus tokens"
    promises = {
        "text to image, Precision@1 over chance": (retrieval.precision_at_1 / retrieval.chance_at_1, 50.0),
        "answers, native over commonest": (answers.native / answers.commonest, 1.5),
        "answers, compressed over commonest": (answers.compressed / answers.commonest, 1.5),
        "answers, compressed over native": (answers.compressed / max(answers.native, 1e-9), 0.5),
    }
    return {name: Check(round(value, 2), bound, bool(value >= bound)) for name, (value, bound) in promises.items()}


def _save_untrained(rows: PreparedRows, folder: str, config: RunConfig) -> None:
    """The model as it was before the first step: same seed, same tokenizer."""
    from crem.checkpoint import save_model
    from crem.model.build import build_model

    save_model(*build_model(config.model, texts=texts_of(rows), seed=config.train.seed), folder)


class _Timer:
    """Logs each stage as it begins, and keeps its seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        log.info("[%d/%d] %s", len(self._seconds) + 1, _STAGES, name)
        began = time.monotonic()
        yield
        self._seconds[name] = round(time.monotonic() - began, 1)

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds by stage, and in ``total``."""
        return {**self._seconds, "total": round(time.monotonic() - self._began, 1)}


class _PeakMemory:
    """Samples the memory that the whole machine uses beyond what it used before."""

    def __init__(self) -> None:
        self._before = psutil.virtual_memory().used
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self.peak_bytes = max(self.peak_bytes, psutil.virtual_memory().used - self._before)


def _summary(report: DemoReport, out: str) -> str:
    """What the command prints at its end."""
    short, untrained = (
        result.retrieval["text_to_image"]["all"].precision_at_1 for result in (report.short, report.untrained)
    )
    return "\n".join(
        [
            evaluation_table(report.evaluation),
            f"text_to_image P@1 of the training just now, {report.train.steps} steps: {short:.2%}; "
            f"untrained: {untrained:.2%}",
            "",
            *(
                f"{'kept  ' if check.kept else 'MISSED'}  {name}: {check.value} (at least {check.at_least})"
                for name, check in report.checks.items()
            ),
            "",
            "  ".join(f"{name} {seconds:.0f} s" for name, seconds in report.timings_s.items()),
            f"peak memory {report.peak_memory_gib} GiB",
            "",
            f"model   {out}/model",
            f"report  {out}/report.html",
        ]
    )
