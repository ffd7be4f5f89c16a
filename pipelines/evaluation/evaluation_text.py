"""The figures of an evaluation as lines of text, for the terminal."""

from __future__ import annotations

from pipelines.evaluation.evaluation_result import EvaluationResult

__all__ = ["evaluation_table"]


def evaluation_table(result: EvaluationResult) -> str:
    """Retrieval by task and split, answers by split, and the keys and values that an item keeps."""
    lines = [f"{'task':<18}{'split':<15}{'P@1':>8}{'P@10':>8}{'chance':>9}{'queries':>9}{'of':>7}"]
    for task, by_split in result.retrieval.items():
        for split, f in by_split.items():
            lines.append(
                f"{task:<18}{split:<15}{f.precision_at_1:>8.1%}{f.precision_at_10:>8.1%}"
                f"{f.chance_at_1:>9.2%}{f.queries:>9}{f.candidates:>7}"
            )
    for split, mean in result.retrieval_mean.items():
        lines.append(f"{'mean of tasks':<18}{split:<15}{mean.precision_at_1:>8.1%}{'':>8}{mean.chance_at_1:>9.2%}")
    if result.answers:
        lines.append(f"\n{'answers':<18}{'native':>10}{'compressed':>12}{'commonest':>11}{'questions':>11}")
        for split, a in result.answers.items():
            compressed = "–" if a.compressed is None else f"{a.compressed:.1%}"
            lines.append(f"{split:<18}{a.native:>10.1%}{compressed:>12}{a.commonest:>11.1%}{a.questions:>11}")
    if (cache := result.cache) is not None:
        kept = f"\nkeys and values kept per item: {cache.native_bytes / 1024:.1f} KiB natively"
        if cache.compressed_bytes is not None:
            kept += f", {cache.compressed_bytes / 1024:.1f} KiB compressed ({cache.ratio:.1%})"
        lines.append(kept)
    return "\n".join(lines)
