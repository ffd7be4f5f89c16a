"""Compressed against native decoding: time per token and bytes of the cache, over the length of the context.

    python -m tests.bench.bench_decode [--contexts 64 256 1024 1430] [--batch 4] [--new-tokens 16] [--repeats 5]

Both modes decode the same number of tokens from the same prefill, interleaved; the question's prefill counts as
part of the first. K = 16; 1,430 vision and text tokens are the paper's mean context. The model is a random Qwen2-VL
with the 2B model's 12 query and 2 key-value heads, small enough for a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy

import torch
from PIL import Image

from crem.config import load_config
from crem.data.collator import Collator
from crem.data.items import Item
from crem.data.prompts import Segment
from crem.model.build import build_model
from crem.model.generation import Context, decode, prefill
from tests.bench.timing import environment, interleaved, table

MODEL = (
    "{{vocab_size: 4096, hidden_size: {width}, intermediate_size: {ffn}, num_hidden_layers: {layers}, "
    "num_attention_heads: 12, num_key_value_heads: 2, vision_depth: 2, vision_embed_dim: 64, vision_num_heads: 4}}"
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 1024, 1430])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    shape = MODEL.format(width=args.width, ffn=args.width * 4, layers=args.layers)
    limits = "model.image={min_pixels: 256, max_pixels: 262144}"
    config = load_config(
        "micro-base", [f"model.scratch={shape}", "model.chorus_tokens=16", limits, "model.prompt.max_text_tokens=4096"]
    )
    model, collator = build_model(config.model, texts=["a red fox", "what is this?"] * 8)
    model.to(args.device).eval()
    question = [collator.prompts.question("what is this?")] * args.batch

    def decoding(context: Context) -> Callable[[], Callable[[], None]]:
        def prepare() -> Callable[[], None]:
            fresh = deepcopy(context)  # decoding appends to the cache

            def run() -> None:
                steps = list(decode(model, fresh, question, stop_ids=[-1], max_new_tokens=args.new_tokens))
                assert len(steps) == args.new_tokens

            return run

        return prepare

    rows = []
    for length in args.contexts:
        context = prefill(model, collator.items([item_of(length, collator)] * args.batch).to(args.device))
        contexts = {"native": context, "compressed": context.compressed(template_visible=True)}
        seconds = interleaved({n: decoding(c) for n, c in contexts.items()}, args.repeats, args.device)
        ms = {n: t / args.new_tokens * 1e3 for n, t in seconds.items()}
        size = {n: c.item_bytes()[0] for n, c in contexts.items()}
        rows.append(
            [
                f"{length:,}",
                f"{ms['native']:.1f}",
                f"{ms['compressed']:.1f}",
                f"{ms['native'] / ms['compressed']:.2f}",
                f"{size['native'] / 1024:,.0f}",
                f"{size['compressed'] / 1024:,.0f}",
                f"{size['compressed'] / size['native']:.2%}",
            ]
        )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\nbatch {args.batch}, K = 16, {parameters / 1e6:.0f} M parameters. {environment(args.device)}\n")
    table(
        [
            "V + T tokens",
            "native ms/step",
            "compressed ms/step",
            "speed-up",
            "native KiB/item",
            "compressed KiB/item",
            "share",
        ],
        rows,
    )


def item_of(length: int, collator: Collator) -> Item:
    """An item of exactly ``length`` vision and text tokens: an image of half of them, and text."""
    side = 16 * max(1, int((length / 2) ** 0.5))
    image = Image.new("RGB", (side, side), (200, 30, 30))

    def tokens(text: str) -> int:
        segments = collator.prepare(Item(text, [image])).prompt.segments
        return int(((segments == Segment.V) | (segments == Segment.T)).sum())

    text = "~" * (length - tokens("~") + 1)  # a byte that no text in training held: it merges with nothing
    assert tokens(text) == length, (tokens(text), length)
    return Item(text, [image])


if __name__ == "__main__":
    main()
