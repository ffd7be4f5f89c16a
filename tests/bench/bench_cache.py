"""Gradient caching: peak memory of a global batch against that of one chunk, and what the second forward costs.

    python -m tests.bench.bench_cache [--batch 1024] [--chunk 32] [--fits 128] [--repeats 5] [--width 128] [--side 64]

Memory: the most that one step holds beyond parameters, their gradients and the collated batch (``live_memory``), of one
chunk alone, of the whole batch in chunks, and of a batch that fits at once. Time: forward and backward of the batch
that fits, at once and in chunks, interleaved.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from crem.data.collator import Batch
from crem.train.step import train_step
from tests.bench.live_memory import peak_bytes
from tests.bench.steps import Accumulating, build, rows
from tests.bench.timing import environment, interleaved, table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--fits", type=int, default=128, help="a batch that fits into memory at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=128, help="hidden size; 128 is the micro preset's")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    model, collator, config = build(args.width, args.side, args.device)
    engine = Accumulating(model)
    pairs = rows(args.batch, args.side, (4, 16))

    def cut(count: int, size: int) -> list[Batch]:
        parts = [pairs[i : i + size] for i in range(0, count, size)]
        return [collator.examples(part).to(args.device) for part in parts]

    def step(chunks: list[Batch]) -> Callable[[], object]:
        return lambda: train_step(engine, chunks, config.loss)

    whole, cached, at_once = cut(args.batch, args.chunk), cut(args.fits, args.chunk), cut(args.fits, args.fits)
    largest = max(whole, key=lambda chunk: chunk.tokens)
    runs = {
        f"{args.chunk} rows, one chunk alone": [largest],
        f"{args.batch:,} rows in chunks of {args.chunk}": whole,
        f"{args.fits} rows at once": at_once,
    }
    held = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    peaks = {name: peak_bytes(step(chunks), held, args.device) for name, chunks in runs.items()}
    least = next(iter(peaks.values()))
    print(f"\nMicro preset at width {args.width}, images {args.side} x {args.side}. {environment(args.device)}\n")
    table(["step", "peak MiB", "to one chunk"], [[n, f"{p / 2**20:.1f}", f"{p / least:.2f}"] for n, p in peaks.items()])

    timed = {"at once": step(at_once), f"in chunks of {args.chunk}": step(cached)}
    seconds = interleaved({n: lambda run=run: run for n, run in timed.items()}, args.repeats, args.device)
    print()
    table(
        [f"{args.fits} rows", "ms/row", "to at once"],
        [[n, f"{t / args.fits * 1e3:.2f}", f"{t / seconds['at once']:.2f}"] for n, t in seconds.items()],
    )


if __name__ == "__main__":
    main()
