"""Texts by ``Crem.embed`` and by sentence-transformers, with the same weights.

    pip install sentence-transformers
    python -m tests.bench.bench_sentence_transformers [--texts 500] [--repeats 3]

sentence-transformers gets the language model of ours and its tokenizer as a text model of its own (``Qwen2Model``) with
mean pooling: it reads neither chorus tokens nor the prompt around a text, so it has fewer tokens a text. Both tokenise,
sort by length and compute in fp32 with one thread on a CPU. It is no dependency of this project.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2Model

import crem
from crem.checkpoint import save_model
from tests.bench.bench_embed import items
from tests.bench.steps import build
from tests.bench.timing import interleaved, table


def text_model(model: crem.Crem, saved: Path, place: Path) -> Any:
    """A ``SentenceTransformer`` with the language model's weights."""
    from sentence_transformers import SentenceTransformer, models

    core = model.model.core.model.language_model
    known = core.config.to_dict()
    config = Qwen2Config(**{name: known[name] for name in Qwen2Config().to_dict() if name in known})
    config.rope_parameters = {"rope_type": "default", "rope_theta": known["rope_parameters"]["rope_theta"]}
    plain = Qwen2Model(config)
    plain.load_state_dict(core.state_dict())
    plain.save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / name).write_bytes((saved / name).read_bytes())
    pooling = models.Pooling(config.hidden_size, pooling_mode="mean")
    return SentenceTransformer(modules=[models.Transformer(str(place), max_seq_length=1024), pooling], device="cpu")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    texts = [row["text"] for row in items(args.texts, 0)]
    with tempfile.TemporaryDirectory(prefix="crem-bench-") as folder:
        saved = Path(folder) / "model"
        built, collator, _ = build(args.width, 224, "cpu")
        save_model(built.eval(), collator, saved)
        ours = crem.load(saved)
        theirs = text_model(ours, saved, Path(folder) / "text")
        tokens = {
            "Crem.embed": sum(ours.prepare(crem.Item(text=text)).tokens for text in texts),
            "sentence-transformers": sum(
                len(ids) for ids in theirs.tokenizer(texts, truncation=True, max_length=1024)["input_ids"]
            ),
        }
        seconds = interleaved(
            {
                "Crem.embed": lambda: lambda: ours.embed(texts),
                "sentence-transformers": lambda: lambda: theirs.encode(texts, batch_size=32, show_progress_bar=False),
            },
            args.repeats,
        )
    lines = [
        [name, str(tokens[name]), f"{s:.1f}", f"{len(texts) / s:.0f}", f"{tokens[name] / s:,.0f}"]
        for name, s in seconds.items()
    ]
    table(["", "tokens", "s of processor", "texts/s", "tokens/s"], lines)


if __name__ == "__main__":
    main()
