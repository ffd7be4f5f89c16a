"""The jobs that measure: evaluate a model, the paper's ablations, the demo. What a function imports is loaded only when
its job runs."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from crem.cli.command_line import Config, Options, Place, Preset, Setting, job


@job
def evaluate(
    prepared: Place,
    /,
    *settings: Setting,
    model: str,
    out: str,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> None:
    """Precision@1 and @10 per direction and split, answers native and compressed, cache sizes.

    example:
      crem evaluate out/demo/prepared --model out/demo/model --out out/demo/evaluation

    Args:
        prepared: prepared tables with test splits
        model: checkpoint folder or URI
        out: folder or URI for evaluation.json
    """
    from pipelines.evaluation.evaluate import evaluate
    from pipelines.evaluation.evaluation_text import evaluation_table

    print(evaluation_table(evaluate(model, prepared, out, config)))


@job
def ablate(
    prepared: Place,
    /,
    *settings: Setting,
    out: str,
    seeds: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (0, 1, 2),
    only: Literal["table3", "table4", "figure4"] | None = None,
    report: bool = False,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> None:
    """Train and evaluate the paper's ablations with seeds and error bars, beside the paper's figures.

    example:
      crem ablate out/prepared --out out/ablation --seeds 0 1 2 model.scratch=null model.backbone=out/base/model

    Args:
        prepared: prepared tables with test splits
        out: folder or URI for runs and report; continues what it holds
        seeds: seeds of every variant
        only: only the variants of one of them
        report: run nothing; report what is finished
    """
    from pipelines.ablation.ablate import ablate
    from pipelines.ablation.ablation_text import ablation_table

    print(ablation_table(ablate(prepared, out, config, seeds=seeds, only=only, report_only=report)))


@job
def demo(
    *settings: Setting,
    out: str = "out/demo",
    preset: Preset = "micro+demo",
    options: Options | None = None,
    config: Config,
) -> None:
    """Run every job on the embedded emoji corpus and write report.html.

    example:
      crem demo --out out/demo

    Args:
        out: folder of the results
    """
    from pipelines.demo.demo import demo

    print(demo(out, config))
