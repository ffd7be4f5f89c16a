"""What the joint step costs: against the contrastive-only step, and against a forward for each loss.

    python -m tests.bench.bench_step [--rows 32] [--repeats 9] [--width 128] [--sides 64 160]

Three ways to train on the same rows, with the same model, optimizer and packing, interleaved in one run:
contrastive-only (queries and targets), joint (the same sequences, with question and answer behind the queries, one
forward), and separate (one contrastive forward and one more of ``[V T U Q A]`` for the LM loss, one update).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image

from crem.checkpoint import build_model
from crem.config import load_config
from crem.data.items import Item, Pair
from crem.train.optim import parameter_groups
from crem.train.step import crem_losses
from tests.bench.timing import environment, interleaved, table

CAPTION = "a small red fox that sits beside a green tree and looks at the animals of the forest"


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
    rows = [row for side in args.sides for row in measure(side, args)]
    print(f"\n{args.rows} rows a step, micro preset at width {args.width}. {environment(args.device)}\n")
    table(["image", "step", "tokens", "ms", "rows/s", "to contrastive only", "to two forwards"], rows)


def measure(side: int, args: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one size of image."""
    config = load_config("micro", [f"model.scratch.hidden_size={args.width}"])
    image_config = config.model.image.model_copy(update={"max_pixels": side**2})
    model_config = config.model.model_copy(update={"image": image_config})
    model, collator = build_model(model_config, texts=[CAPTION, "what is this?", "a fox"] * 8)
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-6)

    image = Image.effect_noise((side, side), 90).convert("RGB")
    joint = [
        Pair(Item(None, [image]), Item(f"{CAPTION} {i}"), (), "what is this?", "a red fox", z=i % 2 == 0, target_key=i)
        for i in range(args.rows)
    ]
    rows = {
        "joint": joint,
        "contrastive": [replace(p, question=None, answer=None) for p in joint],
        "generative": [replace(p, target=None) for p in joint],
    }
    batches = {name: collator.pairs(pairs).to(args.device) for name, pairs in rows.items()}

    def update(*losses: Callable[[], torch.Tensor]) -> Callable[[], Callable[[], None]]:
        def step() -> None:
            for loss in losses:  # backward after each forward: one graph in memory at a time
                loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return lambda: step

    def loss_of(name: str) -> torch.Tensor:
        return crem_losses(model(batches[name]), batches[name], config.loss)[0].total

    seconds = interleaved(
        {
            "contrastive only": update(lambda: loss_of("contrastive")),
            "joint, one forward": update(lambda: loss_of("joint")),
            "both, two forwards": update(lambda: loss_of("contrastive"), lambda: loss_of("generative")),
        },
        args.repeats,
        args.device,
    )
    tokens = {n: int((b.segments >= 0).sum()) for n, b in batches.items()}
    counts = [tokens["contrastive"], tokens["joint"], tokens["contrastive"] + tokens["generative"]]
    least, most = seconds["contrastive only"], seconds["both, two forwards"]
    return [
        [
            f"{side} x {side}",
            name,
            f"{n}",
            f"{t * 1e3:.0f}",
            f"{args.rows / t:.0f}",
            f"{t / least:.2f}",
            f"{t / most:.2f}",
        ]
        for (name, t), n in zip(seconds.items(), counts, strict=True)
    ]


if __name__ == "__main__":
    main()
