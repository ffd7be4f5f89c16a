"""``crem ablate``: the paper's Tables 3 and 4 and Figure 4 with seeds and error bars, beside the paper's figures.

Every variant (``variants.py``) is trained with every seed by ``pipelines.training.train`` and evaluated by
``pipelines.evaluation.evaluate`` at each of its chorus counts (``runs.py``). The output folder has:

    runs/<variant>-<seed>/              the training run          ablation.json      all figures, trends and settings
    evaluations/<variant>-<seed>.json   its figures               report.html, ablation.png, maps.png
    maps/<variant>-<seed>.json          its attention maps

Choices:

- All variants of one seed come before the next seed, so an ablation that is stopped is balanced; the report is written
  anew after every run.
- A run is a process of its own (``child_processes.py``), ``ablate.parallel`` at a time: with its own Ray (or that of
  ``RAY_ADDRESS``), and evaluated in that process. A child ends when its parent does.
- A finished run is not done again; an unfinished one resumes from its newest checkpoint; seeds can be added. Other
  settings than those of the finished runs are refused before any work.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from crem.config import RunConfig
from crem.errors import TrainingError
from pipelines.ablation.ablation_page import ablation_page
from pipelines.ablation.ablation_result import AblationResult, PaperFigures, RunCounts
from pipelines.ablation.child_processes import execute_all
from pipelines.ablation.runs import AblationInputs, FinishedRun, Run, planned_runs
from pipelines.ablation.scores import example_maps, mean_directions, model_rows, scores_of
from pipelines.ablation.trends import NO_SEED, claims, judge, map_claims
from pipelines.ablation.variants import PAPER, PAPER_SOURCE
from pipelines.tables.manifest import read_manifest
from pipelines.tables.prepared import PreparedRows, read_rows
from pipelines.tables.storage import Folder, JobKind

__all__ = ["ablate"]

log = logging.getLogger(__name__)

RESULT = "ablation.json"
REPORT = "report.html"
CHART = "ablation.png"
MAPS_CHART = "maps.png"


def ablate(
    prepared: str,
    out: str,
    config: RunConfig,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    only: str | None = None,
    report_only: bool = False,
) -> AblationResult:
    """Train and evaluate every variant with every seed, and write the comparison with the paper.

    Args:
        prepared: folder or URI written by ``crem prepare``, with test splits.
        out: folder or URI; what an earlier ablation finished there is kept.
        only: one of ``variants.TABLES``.
        report_only: run nothing, and report what is finished.

    Raises:
        ConfigError: finished runs in ``out`` have other settings, or ``prepared`` has no test rows.
        TrainingError: some runs failed; the others are done and reported.
    """
    source, target = Folder.at(prepared), Folder.at(out)
    read_manifest(source)
    rows = read_rows(prepared, split_prefix="test")
    runs = planned_runs(config, seeds, only)
    target.claim(JobKind.ABLATE)
    inputs = AblationInputs(source.uri, config.model.backbone)
    unfinished = [run for run in runs if not run.is_finished(target, inputs)]
    log.info("%d runs, %d of them finished earlier", len(runs), len(runs) - len(unfinished))

    def report() -> AblationResult:
        return _write(target, runs, config, rows)

    failures = {} if report_only else execute_all(unfinished, target, inputs, config.ablate.parallel, report)
    result = report()
    if failures:
        errors = "; ".join(f"{name}: {error}" for name, error in failures.items())
        raise TrainingError(
            f"{len(failures)} of {len(runs)} runs failed, the others are in {target.uri}/{REPORT}: {errors}. Run the "
            "same command again to continue them"
        )
    return result


def _write(target: Folder, runs: Sequence[Run], config: RunConfig, rows: PreparedRows) -> AblationResult:
    """Write ``ablation.json``, the report and its images from whatever is finished."""
    finished = [
        FinishedRun(run, record, run.maps(target)) for run in runs if (record := run.record(target)) is not None
    ]
    result = _result(finished, len(runs), config)
    target.write_json(result.to_json(), RESULT)
    page = ablation_page(result, example_maps(finished), rows)
    target.write_bytes(page.html.encode(), REPORT)
    target.write_bytes(page.chart, CHART)
    if page.maps_chart:
        target.write_bytes(page.maps_chart, MAPS_CHART)
    return result


def _result(finished: Sequence[FinishedRun], wanted: int, config: RunConfig) -> AblationResult:
    scores = scores_of(finished)
    main, counts = config.ablate.chorus_tokens, config.ablate.chorus_counts
    return AblationResult(
        config=config.model_dump(mode="json"),
        seeds=sorted({done.run.seed for done in finished} - {NO_SEED}),
        runs=RunCounts(len(finished), wanted),
        seconds={done.run.name: done.record.seconds for done in finished},
        rows=model_rows(finished, scores),
        paper=PaperFigures(PAPER_SOURCE, PAPER),
        trends=[trend for claim in claims(main, counts) if (trend := judge(claim, scores))],
        map_trends=[trend for claim in map_claims(main) if (trend := judge(claim, scores))],
        maps_by_layer={done.run.name: done.maps.by_layer for done in finished if done.maps},
        directions=mean_directions(finished),
    )
