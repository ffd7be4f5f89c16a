"""What ``crem index``, ``crem search`` and ``crem answer`` print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from crem.errors import shortened
from pipelines.search.index_dataset import IndexSummary
from pipelines.search.opened_index import Hit

if TYPE_CHECKING:
    from crem.model.answers import Answer

__all__ = ["answer_json", "hit_json", "hit_line", "index_text", "source_line"]


def index_text(summary: IndexSummary) -> str:
    """An index in some lines."""
    recall = "not measured" if summary.recall_at_10 is None else f"{summary.recall_at_10:.4f}"
    kind = summary.index
    if kind != "exact":
        kind += f", {summary.probes} cells a query, {summary.refine} x k vectors compared exactly"
    changes = f"added {summary.added:,}, removed {summary.removed:,}"
    if not summary.added and not summary.removed:
        changes = "no vectors added or removed"
    return "\n".join(
        [
            f"{summary.count:,} vectors of {summary.dim} from {summary.parts} parts ({changes}); "
            f"{summary.skipped:,} rows have none",
            f"version {summary.version}   model {summary.fingerprint}   {kind}",
            f"recall@10 {recall}   built in {summary.build_s:.1f} s, at most "
            f"{summary.peak_memory_bytes / 2**20:,.0f} MiB in this process",
            f"bytes a vector: {summary.bytes_per_vector:,.0f} stored, {summary.index_bytes_per_vector:,.0f} of the "
            "inverted file",
        ]
    )


def hit_line(rank: int, hit: Hit) -> str:
    """A hit for a person to read; long texts are cut, and what a terminal would obey is left out."""
    columns = "".join(f"   {name}={_plain(value)}" for name, value in hit.columns.items())
    return f"{rank:>3}  {hit.score:+.4f}  {_plain(hit.uri or hit.text or hit.id)}{columns}"


def source_line(rank: int, hit: Hit) -> str:
    """A hit as the source of an answer."""
    return f"{hit_line(rank, hit)}   id={_plain(hit.id)}"


def hit_json(rank: int, hit: Hit) -> str:
    """A hit as a line of JSON; values that JSON has no word for become text."""
    return json.dumps(_values(rank, hit), ensure_ascii=False, default=str)


def answer_json(rank: int, hit: Hit, answer: Answer) -> str:
    """An answer and its source as a line of JSON."""
    said = {
        "answer": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "finish_reason": answer.finish_reason,
    }
    return json.dumps(said | {"source": _values(rank, hit)}, ensure_ascii=False, default=str)


def _values(rank: int, hit: Hit) -> dict[str, Any]:
    values = {"rank": rank, "id": hit.id, "score": hit.score, "uri": hit.uri, "text": hit.text}
    return values | ({"columns": hit.columns} if hit.columns else {})


def _plain(value: object) -> str:
    """In one line of characters that can be printed."""
    return shortened(" ".join("".join(c if c.isprintable() else " " for c in str(value)).split()))
