"""What re-ranking by MaxSim over the chorus states gains in Precision@1 against the cosine, and what it costs.

    python -m tests.bench.bench_rerank --index out/emoji/index [--queries 1594]

The index is of the embedded corpus, with states. Labels, and drawings of another vendor, look for the drawing of their
concept by the vendor that training never saw, among all of that vendor. Gained and lost are queries whose first hit
turned right, or wrong. Time is that of whole searches, embedding of the query included.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

import crem
from crem.config import load_config
from pipelines.emoji import corpus_path
from pipelines.emoji.corpus_rows import QUERY_VENDOR, UNSEEN_VENDOR
from pipelines.search.late_interaction import max_sim
from pipelines.search.opened_index import VectorIndex
from pipelines.search.recall import vectors_of
from pipelines.search.search import Query, find, model_of
from pipelines.sources.image_reader import ImageReader
from pipelines.tables.storage import Folder
from tests.bench.timing import environment, table

CANDIDATES = (10, 100)
TIMED = 50


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--index", required=True)
    parser.add_argument("--queries", type=int, default=10_000)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    opened = VectorIndex(args.index)
    opened.require("states")
    model = model_of(opened, opened.summary.model)
    labels = concepts()
    where = f"uri LIKE '{UNSEEN_VENDOR}/%'"
    everything = opened.search(np.zeros((1, opened.summary.dim), np.float32), opened.summary.count, where)[0]
    candidates = [hit for hit in everything if code_of(hit.uri) in labels]
    codes = [code_of(hit.uri) for hit in candidates]
    rows = [hit.row for hit in candidates]
    vectors = np.array(opened.column(rows, "embedding"), np.float32)
    states = np.stack([vectors_of(value.values) for value in opened.column(rows, "states")])
    chosen = sorted(set(np.linspace(0, len(codes) - 1, min(args.queries, len(codes))).astype(int).tolist()))
    print(
        f"\n{len(chosen)} queries of each kind, {len(codes)} candidates, {states.shape[1]} states of {states.shape[2]}."
    )
    print(environment("cpu") + "\n")

    reader = ImageReader.of(Folder.at(corpus_path()), load_config("micro").model.image)
    kinds = {
        "label": [crem.Item(labels[codes[at]]) for at in chosen],
        f"drawing of {QUERY_VENDOR}": [
            crem.Item(images=[reader.read(f"{QUERY_VENDOR}/{codes[at]}.webp")]) for at in chosen
        ],
    }
    found = []
    for kind, items in kinds.items():
        encoded = model.encode_prepared([model.prepare(item) for item in items], states=True)
        assert encoded.states is not None
        cosine = encoded.vectors @ vectors.T
        late = np.stack([max_sim(query, states) for query in encoded.states])
        plain = first(cosine, cosine, 1) == chosen
        found.append([kind, "cosine", percent(plain), "", ""])
        for count in (*CANDIDATES, len(codes)):
            again = first(cosine, late, count) == chosen
            gained, lost = int((again & ~plain).sum()), int((plain & ~again).sum())
            found.append([kind, f"MaxSim of the best {count:,}", percent(again), gained, lost])
    table(["query", "order by", "Precision@1", "gained", "lost"], found)
    print()
    seconds = times(opened, model, [labels[codes[at]] for at in chosen[:TIMED]], where)
    table(["a search of ten", "median"], [[name, f"{1000 * s:.1f} ms"] for name, s in seconds.items()])


def concepts() -> dict[str, str]:
    """Labels by code."""
    with open(os.path.join(corpus_path(), "concepts.csv"), encoding="utf-8") as file:
        return {concept["hexcode"]: concept["label"] for concept in csv.DictReader(file)}


def code_of(uri: str | None) -> str:
    return os.path.basename(uri or "").partition(".")[0]


def first(scores: np.ndarray, again: np.ndarray, count: int) -> np.ndarray:
    """The first candidate of each query by ``again``, among the best by ``scores``."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    order = np.take_along_axis(again, best, axis=1).argmax(1)
    return np.take_along_axis(best, order[:, None], axis=1)[:, 0]


def percent(right: np.ndarray) -> str:
    return f"{100 * right.mean():.1f} %"


def times(opened: VectorIndex, model: crem.Crem, texts: list[str], where: str) -> dict[str, float]:
    """Median seconds of a search, both ways by turns."""
    query = Query("", k=10, where=where)
    ways = {"cosine": query, "with --rerank": replace(query, rerank=True)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for text in texts:
        for name, way in ways.items():
            start = time.perf_counter()
            find(opened, model, replace(way, text=text))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


if __name__ == "__main__":
    main()
