"""What the outputs of ``crem embed`` cost, in time and bytes, and what rounding takes from them.

    python -m tests.bench.bench_outputs [--concepts 400] [--answers 100] [--repeats 5]

Pictures of the embedded corpus's unseen vendor, and the labels of their concepts as queries; crem-micro, or
``--model``. Time is that of the model with and without states and memories, and of making the columns, interleaved.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

import crem
from crem.checkpoint import describe
from crem.config import load_config
from crem.model.memory import ChorusMemory
from pipelines.embedding.result_columns import OutputTypes, ResultColumns
from pipelines.emoji import corpus_path
from pipelines.emoji.corpus_rows import GROUP_QUESTION, UNSEEN_VENDOR
from pipelines.sources.image_reader import ImageReader
from pipelines.tables import schema
from pipelines.tables.storage import Folder
from pipelines.tables.vector_types import prefix_of, stored_vectors, unit_vectors
from tests.bench.timing import environment, interleaved, table

OUTPUTS: dict[str, list[str]] = {
    "fp32": [],
    "fp16": ["embed.vector=fp16"],
    "int8": ["embed.vector=int8"],
    "binary": ["embed.vector=binary"],
    "fp32, half of the dimensions": ["embed.dims=half"],
    "int8, half of the dimensions": ["embed.vector=int8", "embed.dims=half"],
    "fp32 and states": ["embed.states=true"],
    "fp32 and a memory in bf16": ["embed.memory=bf16"],
    "fp32 and a memory in int8": ["embed.memory=int8"],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--concepts", type=int, default=400)
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="crem-micro")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        torch.set_num_threads(1)

    model = crem.load(args.model, device=args.device)
    items, labels = corpus(args.concepts)
    print(f"\n{len(items)} pictures, dim {model.dim}, K = {model.chorus_tokens}. {environment(args.device)}\n")
    images, queries = model.embed(items), model.embed(labels)
    types = {name: output_types(args.model, model, settings) for name, settings in OUTPUTS.items()}
    seconds = times(model, items[: args.answers], types, args.repeats, args.device)
    exact = ranking(queries @ images.T)
    rows = []
    for name, of in types.items():
        scores = prefix_of(queries, of.stamp.dim) @ rounded(images, of).T
        found = ranking(scores)
        row_bytes = schema.row_bytes(schema.embeddings(of.stamp, of.memory))
        rows.append(
            [
                name,
                f"{row_bytes:,}",
                f"{100 * (found[:, 0] == np.arange(len(items))).mean():.1f} %",
                f"{100 * recall(found, exact):.1f} %",
                f"{100 * (seconds[name] / seconds['fp32'] - 1):+.1f} %",
            ]
        )
    table(["output", "bytes an item", "Precision@1", "recall@10 of fp32's", "time"], rows)
    print()
    answers(model, items[: args.answers])


def corpus(count: int) -> tuple[list[crem.Item], list[str]]:
    """An even spread of the drawings of the unseen vendor, and their labels."""
    with open(os.path.join(corpus_path(), "concepts.csv"), encoding="utf-8") as file:
        concepts = list(csv.DictReader(file))
    concepts = concepts[:: max(1, len(concepts) // count)][:count]
    reader = ImageReader.of(Folder.at(corpus_path()), load_config("micro", []).model.image)
    items = [crem.Item(images=[reader.read(f"{UNSEEN_VENDOR}/{c['hexcode']}.webp")]) for c in concepts]
    return items, [c["label"] for c in concepts]


def output_types(place: str, model: crem.Crem, settings: list[str]) -> OutputTypes:
    halved = [setting.replace("=half", f"={model.dim // 2}") for setting in settings]
    return OutputTypes.of(load_config("micro", halved).embed, describe(place), place)


def rounded(vectors: NDArray[np.float32], of: OutputTypes) -> NDArray[np.float32]:
    """As they come back from a part."""
    valid = np.ones(len(vectors), np.bool_)
    columns = stored_vectors(prefix_of(vectors, of.stamp.dim), of.stamp.vector, valid)
    return unit_vectors(pa.table(columns))


def ranking(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """The best first, of each query."""
    return np.argsort(-scores, axis=1, kind="stable")


def recall(found: NDArray[np.int64], exact: NDArray[np.int64], k: int = 10) -> float:
    return float(np.mean([len(set(a[:k]) & set(b[:k])) / k for a, b in zip(found, exact, strict=True)]))


def times(
    model: crem.Crem, items: list[crem.Item], types: dict[str, OutputTypes], repeats: int, device: str
) -> dict[str, float]:
    """Seconds of the model and of making the columns."""
    sequences = [model.prepare(item) for item in items]
    valid = np.ones(len(items), np.bool_)

    def run(of: OutputTypes) -> Callable[[], Any]:
        results = ResultColumns(schema.embeddings(of.stamp, of.memory))
        return lambda: results.columns(results.encode(model, sequences, batch_size=64), valid)

    return interleaved({name: lambda of=of: run(of) for name, of in types.items()}, repeats, device)  # type: ignore[misc]


def answers(model: crem.Crem, items: list[crem.Item]) -> None:
    """Answers from stored memories against those from the pictures, and errors of int8 by the sharing of its scales."""
    own = model.generate_compressed(items, GROUP_QUESTION, max_new_tokens=16)
    exact = model.remember(items)
    rows = []
    for dtype in ("fp32", "bf16", "int8"):
        memories = model.remember(items, dtype=dtype)  # type: ignore[arg-type]
        got = [a.text for a in model.answer_memories(memories, [GROUP_QUESTION] * len(items), max_new_tokens=16)]
        same = np.mean([a == b for a, b in zip(got, own, strict=True)])
        errors = [error_of(m.keys_and_values(), e) for m, e in zip(memories, exact, strict=True)]
        largest, relative = np.max([e[0] for e in errors]), np.mean([e[1] for e in errors])
        size = memories[0].layout.size_bytes
        rows.append([dtype, f"{size:,}", f"{100 * same:.0f} %", f"{largest:.3f}", f"{100 * relative:.2f} %"])
    table(["memory", "bytes", "same answers", "largest error", "relative error (RMS)"], rows)
    print()
    shared = {
        "keys and values by token": (-1, -1),
        "keys and values by channel": (-2, -2),
        "keys by channel, values by token": (-2, -1),
        "keys by token, values by channel": (-1, -2),
    }
    table(
        ["scales of int8", "relative error of keys", "of values"],
        [[name, *(f"{100 * e:.2f} %" for e in by_axis(exact, axes))] for name, axes in shared.items()],
    )


def error_of(found: NDArray[np.float32], memory: ChorusMemory) -> tuple[float, float]:
    """The largest error, and the root mean square over that of the numbers."""
    exact = memory.keys_and_values()
    return float(np.abs(found - exact).max()), float(np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean()))


def by_axis(memories: list[ChorusMemory], axes: tuple[int, int]) -> list[float]:
    """Relative errors of keys and of values where scales are shared along an axis of [L, H, K, W]."""
    both = np.stack([memory.keys_and_values() for memory in memories])
    errors = []
    for place, axis in enumerate(axes):
        exact = both[:, :, place]
        scale = np.abs(exact).max(axis, keepdims=True) / 127
        errors.append(float(np.sqrt(((np.rint(exact / scale) * scale - exact) ** 2).mean() / (exact**2).mean())))
    return errors


if __name__ == "__main__":
    main()
