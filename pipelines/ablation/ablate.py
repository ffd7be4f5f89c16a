"""``crem ablate``: the paper's Tables 3 and 4 and Figure 4 with seeds and error bars, beside the paper's figures.

Every variant (``variants.py``) is trained with every seed by ``pipelines.training.train`` and evaluated by
``pipelines.evaluation.evaluate`` at each of its chorus counts. What stays in the output folder:

    runs/<variant>-<seed>/              the training run          ablation.json      all figures, trends and settings
    evaluations/<variant>-<seed>.json   its figures               report.html, ablation.png, maps.png
    maps/<variant>-<seed>.json          its attention maps

Choices:

- All variants of one seed come before the next seed, so an ablation that is stopped is balanced; the report is written
  anew after every run.
- A run is a process of its own, ``ablate.parallel`` at a time: with its own Ray (or that of ``RAY_ADDRESS``), and
  evaluated in that process. What a run leaks or breaks is gone with it. A child ends when its parent does.
- A finished run is not done again; an unfinished one resumes from its newest checkpoint; seeds can be added. Other
  settings than those of the finished runs are refused before any work.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from crem.config import RunConfig
from crem.errors import ConfigError, CremError, TrainingError
from pipelines.ablation.report import write_ablation_report
from pipelines.ablation.trends import NO_SEED, claims, estimate, judge, map_claims
from pipelines.ablation.variants import BACKBONE, MAP_METRICS, METRICS, PAPER, PAPER_SOURCE, Variant, key_of, variants
from pipelines.tables.manifest import read_manifest
from pipelines.tables.prepared import PreparedRows, read_rows
from pipelines.tables.storage import Folder

__all__ = ["ablate"]

log = logging.getLogger(__name__)

KIND = "ablate"
RESULT = "ablation.json"
REPORT = "report.html"
CHART = "ablation.png"
MAPS_CHART = "maps.png"
_EVALUATIONS = "evaluations"
_MAPS = "maps"
_BACKBONE = "backbone"
_DETERMINES = {"model": None, "data": None, "loss": None, "optim": None, "train": ("steps", "global_batch", "seed")}
"""Settings that a figure depends on: whole sections, or some keys of one."""
_TRIES = 3
"""Of a run that fails. Source: measured: on an overloaded machine Ray gives up its own start after 30 s."""
_GRACE_S = 20.0
"""What a run gets to shut its Ray down when the ablation ends."""


@dataclass(frozen=True)
class _Job:
    """One run of one variant, or the evaluation of the backbone (without a variant)."""

    name: str
    config: RunConfig
    seed: int = NO_SEED
    variant: Variant | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        return self.variant.counts if self.variant else (0,)

    @property
    def wants_maps(self) -> bool:
        return self.variant is not None and "figure4" in self.variant.tables

    @property
    def determined_by(self) -> dict[str, Any]:
        """What the figures of this job depend on, as JSON."""
        tree = self.config.model_dump(mode="json")
        return {s: tree[s] if keys is None else {k: tree[s][k] for k in keys} for s, keys in _DETERMINES.items()}


def ablate(
    prepared: str,
    out: str,
    config: RunConfig,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    only: str | None = None,
    report_only: bool = False,
) -> dict[str, Any]:
    """Train and evaluate every variant with every seed, and write the comparison with the paper.

    Args:
        prepared: folder or URI written by ``crem prepare``, with test splits.
        out: folder or URI; what an earlier ablation finished there is kept.
        only: one of ``variants.TABLES``.
        report_only: run nothing, and report what is finished.

    Returns:
        The content of ``ablation.json``.

    Raises:
        ConfigError: finished runs in ``out`` have other settings, or ``prepared`` has no test rows.
        TrainingError: some runs failed; the others are done and reported.
    """
    source, target = Folder.at(prepared), Folder.at(out)
    read_manifest(source)
    rows = read_rows(prepared, split_prefix="test")
    jobs = _jobs(config, seeds, only)
    target.claim(KIND)
    stamp = {"prepared": source.uri, "backbone": config.model.backbone}
    open_jobs = [job for job in jobs if not _finished(target, job, stamp)]
    log.info("%d runs, %d of them finished earlier", len(jobs), len(jobs) - len(open_jobs))
    if report_only:
        return _write(target, jobs, config, rows)
    failures = _run_all(
        open_jobs, source, target, config.ablate.parallel, stamp, partial(_write, target, jobs, config, rows)
    )
    result = _write(target, jobs, config, rows)
    if failures:
        told = "; ".join(f"{name}: {error}" for name, error in failures.items())
        raise TrainingError(
            f"{len(failures)} of {len(jobs)} runs failed, the others are in {target.uri}/{REPORT}: {told}. Run the "
            "same command again to continue them"
        )
    return result


def _jobs(config: RunConfig, seeds: tuple[int, ...], only: str | None) -> list[_Job]:
    plain = Variant(_BACKBONE, "backbone", "backbone", (), {"model": {"chorus_tokens": 0, "nested_chorus": []}}, (0,))
    jobs = [_Job(_BACKBONE, plain.config(config, 0))]
    for seed in dict.fromkeys(seeds):
        for variant in variants(config.ablate, only):
            jobs.append(_Job(f"{variant.name}-{seed}", variant.config(config, seed), seed, variant))
    return jobs


def _finished(target: Folder, job: _Job, stamp: dict[str, Any]) -> bool:
    """Whether the figures of ``job`` are there.

    Raises:
        ConfigError: they are, and of other settings.
    """
    held = target.read_json(_EVALUATIONS, f"{job.name}.json")
    if held is None:
        return False
    wanted = json.loads(json.dumps({**job.determined_by, "from": stamp}))
    for section, values in wanted.items():
        before = held["determined_by"].get(section, {})
        changed = [key for key, value in values.items() if before.get(key) != value]
        if changed:
            key = changed[0]
            raise ConfigError(
                f"{target.uri}/runs/{job.name} has {section}.{key}={before.get(key)!r}, and now it is {values[key]!r}; "
                "ablate with the same settings, or into another --out"
            )
    return _evaluated(target, job) and (not job.wants_maps or _mapped(target, job))


def _evaluated(target: Folder, job: _Job) -> bool:
    held = target.read_json(_EVALUATIONS, f"{job.name}.json")
    return held is not None and held["evaluate"] == job.config.evaluate.model_dump(mode="json")


def _mapped(target: Folder, job: _Job) -> bool:
    held = target.read_json(_MAPS, f"{job.name}.json")
    return held is not None and held["asked"] == job.config.ablate.map_images


def _run_all(
    waiting: list[_Job],
    source: Folder,
    target: Folder,
    parallel: int,
    stamp: dict[str, Any],
    report: Callable[[], object],
) -> dict[str, str]:
    """Run the jobs, ``parallel`` at a time, and report after each; returns what went wrong to the end, by name."""
    waiting, total = list(waiting), len(waiting)
    running: dict[Connection, _Child] = {}
    failures: dict[str, str] = {}
    tries: dict[str, int] = {}
    began = time.monotonic()
    starting = multiprocessing.get_context("spawn").Lock()
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                child = _Child(waiting.pop(0), source, target, stamp, starting)
                running[child.answer] = child
            for ready in wait(list(running)):
                child = running.pop(ready)  # type: ignore[arg-type]
                error = child.error()
                if isinstance(error, CremError) and not isinstance(error, TrainingError):
                    raise error  # the same would meet every other run
                if error is not None:
                    log.error("%s failed: %s", child.job.name, error)
                    failures[child.job.name] = str(error)
                    tries[child.job.name] = tries.get(child.job.name, 0) + 1
                    if tries[child.job.name] < _TRIES:  # at the end, from its newest checkpoint
                        waiting.append(child.job)
                else:
                    failures.pop(child.job.name, None)
                done = total - len(waiting) - len(running)
                left = (time.monotonic() - began) / done * (total - done)
                log.info("%d of %d runs ended, %s; about %.0f min left", done, total, child.job.name, left / 60)
                try:
                    report()
                except Exception:  # hours of training do not end because a report could not be drawn
                    log.warning("the report could not be written", exc_info=True)
    finally:
        for child in running.values():
            child.process.terminate()
        for child in running.values():
            child.process.join(_GRACE_S)
            child.process.kill()
    return failures


class _Child:
    """The process of one job."""

    def __init__(self, job: _Job, source: Folder, target: Folder, stamp: dict[str, Any], starting: Any):
        context = multiprocessing.get_context("spawn")
        self.job = job
        self.answer, answer = context.Pipe(duplex=False)
        level = logging.getLogger("pipelines").getEffectiveLevel()
        self.process: BaseProcess = context.Process(
            target=_child_main, args=(answer, job, source.uri, target, stamp, starting, level), name=f"crem-{job.name}"
        )
        self.process.start()
        answer.close()

    def error(self) -> Exception | None:
        """What went wrong in the process, which has said so or has ended."""
        try:
            told: Exception | None = self.answer.recv()
        except EOFError:
            self.process.join()
            return TrainingError(f"its process ended with code {self.process.exitcode} and said nothing")
        self.process.join(_GRACE_S)
        self.process.kill()
        return told


def _child_main(
    answer: Connection, job: _Job, prepared: str, target: Folder, stamp: dict[str, Any], starting: Any, level: int
) -> None:
    """Train and evaluate one job; tells the parent the error, or None."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {job.name}: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pipelines").setLevel(level)
    if level > logging.DEBUG:
        warnings.filterwarnings("ignore")
    for noisy in ("ray", "deepspeed", "DeepSpeed", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        _do(job, prepared, target, stamp, starting)
        answer.send(None)
    except CremError as error:
        answer.send(error)
    except Exception as error:
        log.exception("%s failed", job.name)
        answer.send(TrainingError(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """A run whose ablation was killed must not go on beside the run of the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # Ray's handler, if it is there, shuts its processes down
    time.sleep(_GRACE_S)
    os._exit(1)


def _do(job: _Job, prepared: str, target: Folder, stamp: dict[str, Any], starting: Any) -> None:
    """Train, evaluate and draw the maps of one job, each unless that is done."""
    import torch

    import crem
    from pipelines.ablation.attention_maps import measure_maps
    from pipelines.tables import session
    from pipelines.training.train import train

    began = time.monotonic()
    losses: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if job.variant is None:
            model = _save_backbone(prepared, scratch, job.config)
        else:
            run = target.child("runs").child(job.name)
            if not run.exists("done.json"):
                with starting:  # two Rays that start at once may take the same ports
                    session.connect()
            trained = train(prepared, run.uri, job.config, resume=True)
            model, losses = trained.model, trained.metrics
        torch.set_num_threads(job.config.embed.threads_per_actor)
        rows = read_rows(prepared, split_prefix="test")
        trained_s = time.monotonic() - began
        if not _evaluated(target, job):
            record = _evaluate(job, model, rows, trained_s)
            record |= {"determined_by": {**job.determined_by, "from": stamp}, "losses": losses}
            target.write_json(record, _EVALUATIONS, f"{job.name}.json")
            log.info("trained in %(train).0f s, evaluated in %(evaluate).0f s", record["seconds"])
        if job.wants_maps and not _mapped(target, job):
            asked = job.config.ablate.map_images
            target.write_json(
                {"asked": asked, **measure_maps(crem.load(model), rows, asked)}, _MAPS, f"{job.name}.json"
            )


def _evaluate(job: _Job, model: str, rows: PreparedRows, trained_s: float) -> dict[str, Any]:
    """The figures of a checkpoint at every chorus count of the job."""
    import crem
    from pipelines.evaluation.evaluate import evaluate_loaded

    began = time.monotonic()
    evaluations = {}
    for count in job.counts:
        figures = evaluate_loaded(crem.load(model, chorus_tokens=count), rows, job.config).to_json()
        evaluations[str(count)] = {k: v for k, v in figures.items() if k not in ("examples", "format")}
    return {
        "evaluate": job.config.evaluate.model_dump(mode="json"),
        "seconds": {"train": round(trained_s, 1), "evaluate": round(time.monotonic() - began, 1)},
        "evaluations": evaluations,
    }


def _save_backbone(prepared: str, folder: str, config: RunConfig) -> str:
    """The backbone as the variants start from it, read by EOS pooling."""
    from crem.checkpoint import save_model
    from crem.model.build import build_model
    from pipelines.tables.prepared import texts_of

    texts = texts_of(read_rows(prepared, split_prefix="train")) if config.model.scratch is not None else None
    save_model(*build_model(config.model, texts=texts, seed=config.train.seed), folder)
    return folder


def _write(target: Folder, jobs: list[_Job], config: RunConfig, rows: PreparedRows) -> dict[str, Any]:
    """``ablation.json``, the report and its images from whatever is finished."""
    records = {job.name: target.read_json(_EVALUATIONS, f"{job.name}.json") for job in jobs}
    held = [(job, records[job.name]) for job in jobs if records[job.name] is not None]
    scores = _scores(held)
    maps = {job.name: found for job, _ in held if (found := target.read_json(_MAPS, f"{job.name}.json"))}
    for job, _ in held:
        for metric in MAP_METRICS:
            if (value := maps.get(job.name, {}).get(metric)) is not None and job.variant:
                key = key_of(job.variant.family, job.variant.counts[0])
                scores.setdefault(key, {}).setdefault(metric, {})[job.seed] = 100 * value
    main, counts = config.ablate.chorus_tokens, config.ablate.chorus_counts
    result = {
        "config": config.model_dump(mode="json"),
        "seeds": sorted({job.seed for job, _ in held} - {NO_SEED}),
        "runs": {"finished": len(held), "wanted": len(jobs)},
        "seconds": {job.name: record["seconds"] for job, record in held},
        "rows": _rows(held, scores),
        "paper": {"source": PAPER_SOURCE, "figures": PAPER},
        "trends": [judged for claim in claims(main, counts) if (judged := judge(claim, scores))],
        "map_trends": [judged for claim in map_claims(main) if (judged := judge(claim, scores))],
        "maps_by_layer": {name: found["by_layer"] for name, found in maps.items()},
        "directions": _directions(held),
    }
    target.write_json(result, RESULT)
    shown = _shown(held, maps)
    page, chart, maps_chart = write_ablation_report(result, shown, rows)
    target.write_bytes(page.encode(), REPORT)
    target.write_bytes(chart, CHART)
    if maps_chart:
        target.write_bytes(maps_chart, MAPS_CHART)
    return result


def _shown(held: list[tuple[_Job, dict[str, Any]]], maps: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """label -> images with their maps, of the first seed that has them."""
    out: dict[str, list[dict[str, Any]]] = {}
    for family in ("retrieval_only", "generation_only", "crem"):  # the paper's order
        for job, _ in held:
            if job.variant and job.variant.family == family and job.name in maps:
                out.setdefault(job.variant.label, maps[job.name]["shown"])
    return out


def _scores(held: list[tuple[_Job, dict[str, Any]]]) -> dict[str, dict[str, dict[int, float]]]:
    """key -> metric -> seed -> percent, of the whole test set."""
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for job, record in held:
        for count, figures in record["evaluations"].items():
            key = key_of(job.variant.family, int(count)) if job.variant else BACKBONE
            answers = figures["answers"].get("all", {})
            values = {
                "retrieval": figures["retrieval_mean"]["all"]["precision_at_1"],
                "native": answers.get("native"),
                "compressed": answers.get("compressed"),
                "cache": figures["cache"].get("ratio"),
            }
            for metric, value in values.items():
                if value is not None:
                    scores.setdefault(key, {}).setdefault(metric, {})[job.seed] = 100 * value
    return scores


def _rows(
    held: list[tuple[_Job, dict[str, Any]]], scores: dict[str, dict[str, dict[int, float]]]
) -> list[dict[str, Any]]:
    """One row for each key: every metric with mean, standard error, n, and the value of each seed."""
    rows: dict[str, dict[str, Any]] = {}
    for job, record in held:
        for count in record["evaluations"]:
            family, label = ("backbone", "backbone") if job.variant is None else (job.variant.family, job.variant.label)
            if family == "nested":
                label = f"{label}, K' = {count}"
            key = key_of(family, int(count))
            if key in rows:
                continue
            rows[key] = {"key": key, "family": family, "label": label, "chorus_tokens": int(count)}
            rows[key]["tables"] = list(job.variant.tables) if job.variant else ["table3"]
            for metric in (*METRICS, *MAP_METRICS):
                if values := scores.get(key, {}).get(metric):
                    summary = estimate(list(values.values()))
                    rows[key][metric] = {"mean": summary.mean, "se": summary.se, "n": summary.n, "values": values}
    return list(rows.values())


def _directions(held: list[tuple[_Job, dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """key -> direction/split -> mean Precision@1 over seeds in percent, for whoever asks where a difference is from."""
    values: dict[str, dict[str, list[float]]] = {}
    for job, record in held:
        for count, figures in record["evaluations"].items():
            key = key_of(job.variant.family, int(count)) if job.variant else BACKBONE
            for task, splits in figures["retrieval"].items():
                for split, found in splits.items():
                    values.setdefault(key, {}).setdefault(f"{task}/{split}", []).append(100 * found["precision_at_1"])
    return {key: {name: sum(v) / len(v) for name, v in named.items()} for key, named in values.items()}
