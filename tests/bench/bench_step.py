"""What the joint step costs: against the contrastive-only step, and against a forward for each loss.

    python -m tests.bench.bench_step [--rows 32] [--repeats 9] [--width 128] [--sides 64 160]

Ways to train on the same rows, with the same model, optimizer and layout, interleaved in one run: contrastive-only
(queries and targets); contrastive on the very sequences of the joint step, question and answer included, with L_r
alone; joint (one forward for both losses); and separate (a contrastive forward and one more of ``[V T U Q A]`` for the
LM loss, one update).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from crem.losses import joint_loss, lm_loss
from crem.train.optim import parameter_groups
from crem.train.step import retrieval_of
from tests.bench.steps import build, rows
from tests.bench.timing import environment, interleaved, table

CONTRASTIVE, EQUAL, JOINT = "contrastive only", "contrastive, joint's sequences", "joint, one forward"
SEPARATE = "both, two forwards"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=32, help="retrieval rows a step, each with a question")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--width", type=int, default=128, help="hidden size; 128 is the micro preset's")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[64, 160], help="image sides; a token is 16 x 16 pixels"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    lines = [line for side in args.sides for line in measure(side, args)]
    print(f"\n{args.rows} rows a step, micro preset at width {args.width}. {environment(args.device)}\n")
    header = [
        "image",
        "step",
        "tokens",
        "ms",
        "rows/s",
        "to contrastive only",
        "to joint's sequences",
        "to two forwards",
    ]
    table(header, lines)


def measure(side: int, args: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one size of image."""
    model, collator, config = build(args.width, side, args.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-6)
    joint = [replace(p, query=replace(p.query, text=None), answer="a red fox") for p in rows(args.rows, side, (16, 18))]
    pairs = {
        JOINT: joint,
        CONTRASTIVE: [replace(p, question=None, answer=None) for p in joint],
        "generative": [replace(p, target=None) for p in joint],
    }
    batches = {name: collator.examples(some).to(args.device) for name, some in pairs.items()}

    def loss(name: str, *, retrieval_only: bool = False) -> Tensor:
        batch = batches[name]
        out = model(batch, embed_only=retrieval_only)
        retrieval = retrieval_of(out.embeddings, [batch], config.loss).loss
        return joint_loss(retrieval, lm_loss(out.lm_loss_sum, int(batch.answer_tokens)), config.loss)

    def update(*losses: Callable[[], Tensor]) -> Callable[[], Callable[[], None]]:
        def step() -> None:
            for one in losses:  # backward after each forward: one graph in memory at a time
                one().backward()
            optimizer.step()
            optimizer.zero_grad()

        return lambda: step

    seconds = interleaved(
        {
            CONTRASTIVE: update(lambda: loss(CONTRASTIVE, retrieval_only=True)),
            EQUAL: update(lambda: loss(JOINT, retrieval_only=True)),
            JOINT: update(lambda: loss(JOINT)),
            SEPARATE: update(lambda: loss(CONTRASTIVE, retrieval_only=True), lambda: loss("generative")),
        },
        args.repeats,
        args.device,
    )
    tokens = {name: batch.tokens for name, batch in batches.items()}
    counts = [tokens[CONTRASTIVE], tokens[JOINT], tokens[JOINT], tokens[CONTRASTIVE] + tokens["generative"]]
    return [
        [
            f"{side} x {side}",
            name,
            f"{count}",
            f"{t * 1e3:.0f}",
            f"{args.rows / t:.0f}",
            *(f"{t / seconds[other]:.2f}" for other in (CONTRASTIVE, EQUAL, SEPARATE)),
        ]
        for (name, t), count in zip(seconds.items(), counts, strict=True)
    ]


if __name__ == "__main__":
    main()
