"""Two-part attention against the dense mask: forward and backward of the joint step over the same rows.

    python -m tests.bench.bench_attention [--rows 32] [--repeats 7] [--width 128] [--sides 64 160]

Layouts, interleaved in one run: all sequences in one row without padding, with two-part attention; the dense mask over
rows packed first-fit, longest sequence first, as long as the longest; and the dense mask with one sequence per row.
Padding is the share of what each runs on: of attention alone for the first, of every layer for the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from crem.data.collator import Batch, Collator
from crem.data.items import TrainingExample
from crem.data.sequence import PreparedSequence
from crem.train.step import train_step
from tests.bench.steps import Accumulating, build, rows
from tests.bench.timing import environment, interleaved, table

TWO_PART, FIRST_FIT, SINGLE = "two-part, one row", "dense mask, first-fit rows", "dense mask, a row each"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=128, help="hidden size; 128 is the micro preset's")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 160], help="a token is 16 x 16 pixels")
    parser.add_argument("--words", type=int, nargs="+", default=[16, 256], help="most words of a text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    lines = [line for side in args.sides for words in args.words for line in measure(side, words, args)]
    print(f"\n{args.rows} rows a step, micro preset at width {args.width}. {environment(args.device)}\n")
    table(["images", "words", "attention", "padding", "ms", "to two-part"], lines)


def measure(side: int, words: int, args: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one size of images and texts."""
    model, collator, config = build(args.width, side, args.device)
    engine = Accumulating(model)
    pairs = rows(args.rows, side, (1, words), answered=0.75)
    batches = {n: b.to(args.device) for n, b in batches_of(pairs, collator).items()}

    def step(batch: Batch) -> Callable[[], Callable[[], object]]:
        return lambda: lambda: train_step(engine, [batch], config.loss)

    seconds = interleaved({n: step(b) for n, b in batches.items()}, args.repeats, args.device)
    least = seconds[TWO_PART]
    return [
        [f"{side} x {side}", f"1-{words}", n, f"{batches[n].padding_share:.0%}", f"{t * 1e3:.0f}", f"{t / least:.2f}"]
        for n, t in seconds.items()
    ]


def batches_of(pairs: list[TrainingExample], collator: Collator) -> dict[str, Batch]:
    """The same sequences in the three layouts; each query has a target and no negatives."""
    queries = [
        collator.prepare(p.query, question=p.question, answer=p.answer, z=p.z and p.answer is not None) for p in pairs
    ]
    sequences = queries + [collator.prepare(p.target) for p in pairs if p.target is not None]
    lengths = [s.tokens for s in sequences]
    everything = list(range(len(sequences)))
    layouts = {TWO_PART: [everything], FIRST_FIT: first_fit(lengths), SINGLE: [[i] for i in everything]}
    return {name: _batch(sequences, layout, pairs, collator) for name, layout in layouts.items()}


def _batch(
    sequences: list[PreparedSequence], layout: list[list[int]], pairs: list[TrainingExample], collator: Collator
) -> Batch:
    number_of = torch.empty(len(sequences), dtype=torch.long)  # sequences are numbered row by row
    number_of[torch.tensor([i for row in layout for i in row])] = torch.arange(len(sequences))
    return replace(
        collator.pad(sequences, layout),
        queries=number_of[: len(pairs)],
        targets=number_of[len(pairs) :],
        query_keys=torch.tensor([p.query_key for p in pairs]),
        target_keys=torch.tensor([p.target_key for p in pairs]),
    )


def first_fit(lengths: list[int]) -> list[list[int]]:
    """Sequences into rows as long as the longest: each, longest first, into the first row with room for it."""
    capacity = max(lengths)
    layout: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(layout))
        if row == len(layout):
            layout.append([])
            room.append(capacity)
        layout[row].append(i)
        room[row] -= lengths[i]
    return layout


if __name__ == "__main__":
    main()
