"""The figures and trends of an ablation as text, for the terminal and for the cells of the page."""

from __future__ import annotations

from pipelines.ablation.ablation_result import AblationResult
from pipelines.ablation.trends import Estimate, Trend

__all__ = ["ablation_table", "points", "verdict"]

_METRICS = ("retrieval", "native", "compressed")


def ablation_table(result: AblationResult) -> str:
    """Our figures with the paper's below, then the trends."""
    lines = [f"{'%':<42}" + "".join(f"{metric:>16}" for metric in _METRICS)]
    for row in result.rows:
        lines.append(f"{row.label:<42}" + "".join(f"{points(row.metrics.get(metric)):>16}" for metric in _METRICS))
        if paper := result.paper.figures.get(row.key):
            lines.append(f"{'  paper':<42}" + "".join(f"{points(paper.get(metric)):>16}" for metric in _METRICS))
    lines.append("")
    for trend in result.trends + result.map_trends:
        paper_points = "" if trend.paper is None else f" (paper {trend.paper:+.1f})"
        ours = f"{trend.ours.mean:+6.2f}{_error(trend.ours)}"
        lines.append(f"{verdict(trend):<34}{ours}{paper_points}  {trend.text}")
    return "\n".join(lines)


def verdict(trend: Trend) -> str:
    """Whether a trend appears, and how sure that is."""
    appears = "appears" if trend.appears else "does not appear"
    if trend.clear is None:
        return f"{appears}, one seed"
    return f"{appears}, {'over' if trend.clear else 'within'} 2 SE"


def points(value: Estimate | float | None) -> str:
    """A figure in percent, with its standard error where it has one."""
    if value is None:
        return "–"
    if isinstance(value, Estimate):
        return f"{value.mean:.1f}{_error(value)}"
    return f"{value:.1f}"


def _error(value: Estimate) -> str:
    return "" if value.se is None else f" ± {value.se:.1f}"
