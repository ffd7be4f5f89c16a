"""A training step with compiled layers (``train.compile``) against one without: ``-m tests.bench.bench_compile``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from crem.model.backbone import compile_layers
from crem.train.step import train_step
from tests.bench.steps import Accumulating, build, rows
from tests.bench.timing import environment, interleaved, table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{environment(args.device)} bf16, {args.rows} rows of a 64 x 64 image and a caption, both losses.\n")
    results = []
    for width in args.width:
        steps = {
            name: _step(width, args.rows, args.device, compiled=name == "compiled") for name in ("eager", "compiled")
        }
        seconds = interleaved(steps, args.repeats, args.device)
        eager, compiled = seconds["eager"], seconds["compiled"]
        results.append([width, f"{1000 * eager:.0f}", f"{1000 * compiled:.0f}", f"{eager / compiled:.2f}"])
    table(["hidden size", "eager, ms", "compiled, ms", "eager / compiled"], results)


def _step(width: int, count: int, device: str, *, compiled: bool) -> Callable[[], Callable[[], object]]:
    model, collator, config = build(width, 64, device)
    batch = collator.examples(rows(count, 64, (2, 8), answered=0.5))
    if compiled:
        compile_layers(model.core)
    engine = Accumulating(model)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16):
            train_step(engine, [batch], config.loss, device=device)

    return lambda: run


if __name__ == "__main__":
    main()
