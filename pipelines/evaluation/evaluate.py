"""``crem evaluate``: does it find, does it answer, and what does it keep.

- **Retrieval**: Precision@1 and @10 of every task (direction) over the test splits, and their mean with equal weight
  for every task, as MMEB's score is of its datasets. The candidates of a task are the distinct targets of all its test
  rows, so chance is 1 and 10 over their number. A candidate that scores as high as the target counts against it.
- **Answers**: exact match of the questions of the test rows, natively and from the compressed context, beside the share
  that always naming the commonest answer would get. A model without chorus tokens has no compressed context.
- **Cache**: bytes of keys and values that an item keeps in both modes.

The work is spread over a Ray Data actor pool; each actor holds one model, as in ``crem embed``. ``evaluate_loaded``
does the same in this process, without Ray. ``evaluate.chorus_tokens`` chooses K' of a nested model.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from crem.config import EvaluateConfig, RunConfig
from pipelines.tables import session
from pipelines.tables.models import load_model
from pipelines.tables.prepared import PreparedRows, item_of, read_rows, require_readable_tables
from pipelines.tables.storage import Folder

if TYPE_CHECKING:
    import crem

__all__ = ["evaluate", "evaluate_loaded", "table"]

log = logging.getLogger(__name__)

KIND = "evaluate"
RESULT = "evaluation.json"
_EXAMPLES = 12
_LOG_EVERY_S = 5.0


def evaluate(model: str, prepared: str, out: str, config: RunConfig) -> dict[str, Any]:
    """Evaluate the checkpoint ``model`` on the test splits of prepared tables, and write ``evaluation.json``.

    Returns:
        ``model``, ``fingerprint``, ``chorus_tokens``, ``retrieval[task][split]``, ``retrieval_mean[split]``,
        ``answers[split]``, ``cache`` and ``examples``.

    Raises:
        ConfigError: no test rows, or a chorus count that the model was not trained with. CheckpointError: the model
            cannot be loaded.
    """
    rows = read_rows(prepared, split_prefix="test")
    target = Folder.at(out)
    target.claim(KIND)
    session.connect()
    require_readable_tables(prepared)
    session.require_readable_model(model)
    session.require(
        f"evaluating with {config.embed.min_actors} actors",
        cpus=config.embed.min_actors * config.embed.cpus_per_actor,
        gpus=config.embed.min_actors * config.embed.gpus_per_actor,
        remedy="lower embed.min_actors, embed.cpus_per_actor or embed.gpus_per_actor",
    )
    with session.remote_errors():
        used = _describe(model, config)
    work = _work(rows, config)
    log.info("%d contents to embed and questions to answer with %d chorus tokens", len(work), used["chorus_tokens"])
    result = {"model": model, "chorus_tokens": used["chorus_tokens"]}
    result |= _result(rows, config, _run(model, prepared, len(work), config))
    target.write_json(result, RESULT)
    return result


def evaluate_loaded(model: crem.Crem, rows: PreparedRows, config: RunConfig) -> dict[str, Any]:
    """As ``evaluate``, of a loaded model on rows that were read, in this process; nothing is written."""
    done = _do(model, rows, _work(rows, config), config.evaluate)
    return {"chorus_tokens": model.chorus_tokens, **_result(rows, config, done)}


def _describe(model: str, config: RunConfig) -> dict[str, Any]:
    """What the checkpoint is, asked where it will run: a wrong chorus count fails before any work."""
    from crem.checkpoint import describe

    task = ray.remote(num_cpus=config.embed.cpus_per_actor, num_gpus=config.embed.gpus_per_actor)(describe)
    used: dict[str, Any] = ray.get(task.remote(model, config.evaluate.chorus_tokens))
    return used


def _result(rows: PreparedRows, config: RunConfig, done: list[dict[str, Any]]) -> dict[str, Any]:
    """All figures, from the results of ``_work`` in its order."""
    retrieval = _Retrieval.of(rows)
    questions = _questions(rows, config.evaluate.max_answers)
    vectors = np.array([r["embedding"] for r in done[: len(retrieval.contents)]], dtype=np.float32)
    answers = [r["answers"] for r in done[len(retrieval.contents) :]]
    ranks = retrieval.ranks(vectors)
    precision = _precision(retrieval, ranks)
    return {
        "fingerprint": done[0]["fingerprint"],
        "retrieval": precision,
        "retrieval_mean": _mean(precision),
        "answers": _exact_match(rows, questions, answers),
        "cache": _cache(answers),
        "examples": {
            "retrieval": _retrieval_examples(rows, retrieval, vectors, ranks),
            "answers": _answer_examples(rows, questions, answers),
        },
    }


@dataclass
class _Retrieval:
    """Queries and candidate pools of every task, as numbers of distinct contents."""

    contents: list[tuple[int, str]]
    """(row, side) where each distinct content is found first"""
    queries: dict[str, NDArray[np.int64]]
    """content of each query, by task"""
    targets: dict[str, NDArray[np.int64]]
    splits: dict[str, list[str]]
    rows: dict[str, list[int]]

    @classmethod
    def of(cls, rows: PreparedRows) -> _Retrieval:
        numbers: dict[str, int] = {}
        made = cls([], {}, {}, {}, {})
        lists: dict[str, list[tuple[int, int, str, int]]] = {}
        for at, row in enumerate(rows.table.select(["task", "split", "query", "target"]).to_pylist()):
            if row["target"] is None:
                continue
            pair = []
            for side in ("query", "target"):
                key = repr(row[side])
                if key not in numbers:
                    numbers[key] = len(made.contents)
                    made.contents.append((at, side))
                pair.append(numbers[key])
            lists.setdefault(row["task"] or "retrieval", []).append((*pair, row["split"], at))
        for task, entries in sorted(lists.items()):
            queries, targets, splits, places = zip(*entries, strict=True)
            made.queries[task], made.targets[task] = np.array(queries), np.array(targets)
            made.splits[task], made.rows[task] = list(splits), list(places)
        return made

    def pool(self, task: str) -> NDArray[np.int64]:
        """Distinct candidates of a task."""
        return np.unique(self.targets[task])

    def ranks(self, vectors: NDArray[np.float32]) -> dict[str, NDArray[np.int64]]:
        """How many candidates score at least as high as each query's target, itself excluded; 0 is a hit."""
        out = {}
        for task, queries in self.queries.items():
            pool = self.pool(task)
            own = np.searchsorted(pool, self.targets[task])
            ranks = np.empty(len(queries), dtype=np.int64)
            for start in range(0, len(queries), 1024):
                scores = vectors[queries[start : start + 1024]] @ vectors[pool].T
                here = own[start : start + 1024]
                best = scores[np.arange(len(here)), here][:, None]
                ranks[start : start + 1024] = (~(scores < best)).sum(1) - 1  # NaN counts against the model
            out[task] = ranks
        return out


def _precision(retrieval: _Retrieval, ranks: dict[str, NDArray[np.int64]]) -> dict[str, dict[str, dict[str, float]]]:
    out: dict[str, dict[str, dict[str, float]]] = {}
    for task, found in ranks.items():
        candidates = len(retrieval.pool(task))
        splits = np.array(retrieval.splits[task])
        out[task] = {}
        for split in [*sorted(set(retrieval.splits[task])), "all"]:
            some = found if split == "all" else found[splits == split]
            out[task][split] = {
                "precision_at_1": float((some == 0).mean()),
                "precision_at_10": float((some < 10).mean()),
                "chance_at_1": 1 / candidates,
                "chance_at_10": min(1.0, 10 / candidates),
                "queries": len(some),
                "candidates": candidates,
            }
    return out


def _mean(precision: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Precision@1 by split, every task (direction) with equal weight; chance in the same way."""
    out = {}
    for split in sorted({s for splits in precision.values() for s in splits}):
        some = [splits[split] for splits in precision.values() if split in splits]
        names = ("precision_at_1", "chance_at_1")
        out[split] = {n: float(np.mean([f[n] for f in some])) for n in names} | {"directions": len(some)}
    return out


def _questions(rows: PreparedRows, most: int) -> list[int]:
    """Rows with a question and an answer, at most ``most`` per split, spread evenly."""
    by_split: dict[str, list[int]] = {}
    for at, row in enumerate(rows.table.select(["split", "question", "answer"]).to_pylist()):
        if row["question"] and row["answer"]:
            by_split.setdefault(row["split"], []).append(at)
    chosen = []
    for places in by_split.values():
        step = max(1.0, len(places) / most)
        chosen += [places[int(i * step)] for i in range(min(most, len(places)))]
    return chosen


def _right(answer: str | None, expected: str) -> bool:
    return answer is not None and answer.strip().casefold() == expected.strip().casefold()


def _exact_match(rows: PreparedRows, questions: list[int], answers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    taken = rows.table.select(["split", "answer"]).take(pa.array(questions, pa.int64())).to_pylist()
    out: dict[str, dict[str, Any]] = {}
    for split in [*sorted({row["split"] for row in taken}), "all"]:
        some = [(r, a) for r, a in zip(taken, answers, strict=True) if split in ("all", r["split"])]
        if some:
            commonest, count = Counter(r["answer"] for r, _ in some).most_common(1)[0]
            out[split] = {
                **{mode: _share_right(some, mode) for mode in ("native", "compressed")},
                "commonest": count / len(some),
                "commonest_answer": commonest,
                "questions": len(some),
            }
    return out


def _share_right(some: list[tuple[dict[str, Any], dict[str, Any]]], mode: str) -> float | None:
    if any(answer[mode] is None for _, answer in some):
        return None
    return sum(_right(answer[mode], row["answer"]) for row, answer in some) / len(some)


def _cache(answers: list[dict[str, Any]]) -> dict[str, float | None]:
    if not answers:
        return {}
    native = float(np.mean([a["native_bytes"] for a in answers]))
    if answers[0]["compressed_bytes"] is None:
        return {"native_bytes": native, "compressed_bytes": None, "ratio": None}
    compressed = float(np.mean([a["compressed_bytes"] for a in answers]))
    return {"native_bytes": native, "compressed_bytes": compressed, "ratio": compressed / native}


def _retrieval_examples(
    rows: PreparedRows, retrieval: _Retrieval, vectors: NDArray[np.float32], ranks: dict[str, NDArray[np.int64]]
) -> list[dict[str, Any]]:
    """An even spread of queries of every task with their five best candidates, right or wrong as they come."""
    examples = []
    for task, queries in retrieval.queries.items():
        pool = retrieval.pool(task)
        for at in np.linspace(0, len(queries) - 1, min(_EXAMPLES, len(queries))).astype(int):
            scores = vectors[pool] @ vectors[queries[at]]
            best = pool[np.argsort(-scores, kind="stable")[:5]]
            examples.append(
                {
                    "task": task,
                    "split": retrieval.splits[task][at],
                    "query": _content(rows, *retrieval.contents[queries[at]]),
                    "target": _content(rows, *retrieval.contents[retrieval.targets[task][at]]),
                    "top": [
                        {**_content(rows, *retrieval.contents[c]), "right": bool(c == retrieval.targets[task][at])}
                        for c in best
                    ],
                    "rank": int(ranks[task][at]) + 1,
                }
            )
    return examples


def _answer_examples(rows: PreparedRows, questions: list[int], answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    chosen = np.linspace(0, len(questions) - 1, min(2 * _EXAMPLES, len(questions))).astype(int)
    return [
        {
            **{k: rows.table.column(k)[questions[i]].as_py() for k in ("split", "question", "answer")},
            "query": _content(rows, questions[i], "query"),
            "native": answers[i]["native"],
            "compressed": answers[i]["compressed"],
            "native_right": _right(answers[i]["native"], rows.table.column("answer")[questions[i]].as_py()),
            "compressed_right": _right(answers[i]["compressed"], rows.table.column("answer")[questions[i]].as_py()),
        }
        for i in chosen
    ]


def _content(rows: PreparedRows, row: int, side: str) -> dict[str, Any]:
    value = rows.table.column(side)[row].as_py()
    return {"text": value["text"], "images": list(value["images"] or ())}


def _work(rows: PreparedRows, config: RunConfig) -> list[tuple[int, str, bool]]:
    """What is to be done, the same on every actor: (row, side, ask) for contents to embed, then questions to answer."""
    contents = [(row, side, False) for row, side in _Retrieval.of(rows).contents]
    return contents + [(row, "query", True) for row in _questions(rows, config.evaluate.max_answers)]


def _run(model: str, prepared: str, count: int, config: RunConfig) -> list[dict[str, Any]]:
    """Results of ``_work``, in its order."""
    settings, size = config.embed, 4 * config.evaluate.batch_size
    chunks = [{"start": start} for start in range(0, count, size)]
    most = min(settings.max_actors, len(chunks))
    dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        _Evaluator,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=min(settings.min_actors, most), max_size=most),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
        fn_constructor_args=(model, prepared, size, config),
    )
    by_start: dict[int, list[dict[str, Any]]] = {}
    said = time.monotonic()
    with session.remote_errors():
        for start, results in session.results(dataset):
            by_start[start] = results
            if (done := sum(map(len, by_start.values()))) == count or time.monotonic() - said > _LOG_EVERY_S:
                said = time.monotonic()
                log.info("%d of %d contents and questions", done, count)
    return [result for start in sorted(by_start) for result in by_start[start]]


class _Evaluator:
    """One actor: embeds contents, and answers questions in both modes."""

    def __init__(self, model: str, prepared: str, size: int, config: RunConfig):
        self._model = load_model(model, config.embed.threads_per_actor, config.evaluate.chorus_tokens)
        self._rows = read_rows(prepared, split_prefix="test")
        self._work = _work(self._rows, config)
        self._size = size
        self._config = config.evaluate

    def __call__(self, batch: pa.Table) -> pa.Table:
        starts = batch.column("start").to_pylist()
        return pa.Table.from_pylist([session.attempt(partial(self._chunk, start)) for start in starts])

    def _chunk(self, start: int) -> tuple[int, list[dict[str, Any]]]:
        return start, _do(self._model, self._rows, self._work[start : start + self._size], self._config)


def _do(
    model: crem.Crem, rows: PreparedRows, work: list[tuple[int, str, bool]], config: EvaluateConfig
) -> list[dict[str, Any]]:
    """One result for each piece of ``work``: a vector, or the answers of both modes."""
    items = [item_of(rows.table.column(side)[row].as_py(), rows.image) for row, side, _ in work]
    results: list[dict[str, Any]] = [{"fingerprint": model.fingerprint} for _ in work]
    contents = [i for i, (_, _, ask) in enumerate(work) if not ask]
    vectors = model.embed([items[i] for i in contents], batch_size=config.batch_size)
    for i, vector in zip(contents, vectors, strict=True):
        results[i]["embedding"] = vector
    asked = [i for i, (_, _, ask) in enumerate(work) if ask]
    prompts = [rows.table.column("question")[work[i][0]].as_py() for i in asked]
    for i in asked:
        results[i]["answers"] = {"compressed": None, "compressed_bytes": None}
    for mode in ("native", "compressed") if model.chorus_tokens else ("native",):
        answers = model.answer(
            [items[i] for i in asked],
            prompts,
            compressed=mode == "compressed",
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
        for i, answer in zip(asked, answers, strict=True):
            results[i]["answers"] |= {mode: answer.text, f"{mode}_bytes": answer.cache_bytes}
    return results


def table(result: dict[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f"{'task':<18}{'split':<15}{'P@1':>8}{'P@10':>8}{'chance':>9}{'queries':>9}{'of':>7}"]
    for task, splits in result["retrieval"].items():
        for split, f in splits.items():
            lines.append(
                f"{task:<18}{split:<15}{f['precision_at_1']:>8.1%}{f['precision_at_10']:>8.1%}"
                f"{f['chance_at_1']:>9.2%}{f['queries']:>9}{f['candidates']:>7}"
            )
    for split, mean in result["retrieval_mean"].items():
        p, chance = mean["precision_at_1"], mean["chance_at_1"]
        lines.append(f"{'mean of tasks':<18}{split:<15}{p:>8.1%}{'':>8}{chance:>9.2%}")
    if result["answers"]:
        lines.append(f"\n{'answers':<18}{'native':>10}{'compressed':>12}{'commonest':>11}{'questions':>11}")
        for split, f in result["answers"].items():
            compressed = "–" if f["compressed"] is None else f"{f['compressed']:.1%}"
            lines.append(f"{split:<18}{f['native']:>10.1%}{compressed:>12}{f['commonest']:>11.1%}{f['questions']:>11}")
        cache = result["cache"]
        kept = f"\nkeys and values kept per item: {cache['native_bytes'] / 1024:.1f} KiB natively"
        if cache["ratio"] is not None:
            kept += f", {cache['compressed_bytes'] / 1024:.1f} KiB compressed ({cache['ratio']:.1%})"
        lines.append(kept)
    return "\n".join(lines)
