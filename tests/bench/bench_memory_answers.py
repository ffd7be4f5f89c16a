"""Answers from an index's stored memories against answers from the pictures: the time to the first token, and whether
they agree.

    python -m tests.bench.bench_memory_answers --index out/emoji/index [--questions 100]

The index is of the embedded corpus, with memories. An even spread of the drawings of the vendor that training never
saw, each asked one of five questions. Every way answers about the same drawing by turns; the clock runs from a stored
memory, or from the bytes of the picture, to the first piece of text; it is the CPU time of one thread. Finding the item
is left out of both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

import crem
from crem.config import load_config
from crem.model.answers import Answer
from crem.model.memory import ChorusMemory, MemoryLayout
from pipelines.emoji import corpus_path
from pipelines.emoji.corpus_rows import QUESTIONS, UNSEEN_VENDOR
from pipelines.search.memory_answers import memories_of_hits
from pipelines.search.opened_index import VectorIndex
from pipelines.search.search import model_of
from pipelines.sources.image_reader import ImageReader
from pipelines.tables.storage import Folder
from tests.bench.timing import environment, table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Answers from memories against answers from the pictures.")
    parser.add_argument("--index", required=True)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=16)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    opened = VectorIndex(args.index)
    opened.require("memory")
    model = model_of(opened, opened.summary.model)
    where = f"uri LIKE '{UNSEEN_VENDOR}/%'"
    everything = opened.search(np.zeros((1, opened.summary.dim), np.float32), opened.summary.count, where)[0]
    everything.sort(key=lambda hit: hit.uri or "")
    hits = [everything[at] for at in np.linspace(0, len(everything) - 1, args.questions).astype(int)]
    questions = [list(QUESTIONS.values())[at % len(QUESTIONS)][0] for at in range(len(hits))]
    reader = ImageReader.of(Folder.at(corpus_path()), load_config("micro").model.image)
    pictures = [reader.read(hit.uri or "") for hit in hits]
    layout = MemoryLayout.of(opened.schema.metadata)
    stored = [memory.to_bytes() for memory in memories_of_hits(opened, hits)]
    print(f"\n{len(hits)} questions, memories of {layout.size_bytes:,} bytes ({layout.dtype}). {environment('cpu')}\n")

    def from_memory(at: int) -> Iterator[str | Answer]:
        memory = ChorusMemory.from_bytes(layout, stored[at])
        return model.stream_memory(memory, questions[at], max_new_tokens=args.max_tokens)

    def from_picture(at: int, *, compressed: bool) -> Iterator[str | Answer]:
        item = crem.Item(images=[pictures[at]])
        return model.stream(item, questions[at], compressed=compressed, max_new_tokens=args.max_tokens)

    ways: dict[str, Callable[[int], Iterator[str | Answer]]] = {
        "stored memory": from_memory,
        "picture, compressed": lambda at: from_picture(at, compressed=True),
        "picture, native": lambda at: from_picture(at, compressed=False),
    }
    texts: dict[str, list[str]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        list(way(0))  # the template's keys and values are computed once
    for at in range(len(hits)):
        for name, way in ways.items():
            start = time.process_time()
            pieces = way(at)
            next(pieces)
            seconds[name].append(time.process_time() - start)
            answer = list(pieces)[-1]
            assert isinstance(answer, Answer), answer
            texts[name].append(answer.text)
    native = statistics.median(seconds["picture, native"])
    rows = []
    for name in ways:
        median = statistics.median(seconds[name])
        same = [np.mean([a == b for a, b in zip(texts[name], texts[other], strict=True)]) for other in list(ways)[1:]]
        rows.append([name, f"{1000 * median:.1f} ms", f"{median / native:.2f}", *(f"{100 * s:.0f} %" for s in same)])
    table(["answers from", "first token", "to native", "same as compressed", "same as native"], rows)


if __name__ == "__main__":
    main()
