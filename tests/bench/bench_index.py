"""The index of many vectors, exact and as an inverted file: recall@10 against exact search, latency, build, bytes.

    python -m tests.bench.bench_index --vectors out/emoji/vectors [--rows 100000 1000000] [--quantisers IVF_RQ IVF_PQ]

Vectors are drawn around real ones, which ``crem embed`` wrote: a mixture of two of them, w to (1 - w) with w up to a
half, and noise. Queries are drawn alike and are not in the index. Build and search are the code of ``crem index`` and
``crem search`` with their default settings; a query comes alone, after a round that is not counted. A hit counts if it
scores as high as the tenth of the exact ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crem.config import load_config
from pipelines.search.embedded_parts import rows_of_part, survey
from pipelines.search.index import build
from pipelines.search.index_dataset import IndexSummary
from pipelines.search.opened_index import VectorIndex
from pipelines.search.recall import RECALL_AT, vectors_of
from pipelines.tables import schema
from pipelines.tables.storage import Folder
from tests.bench.timing import environment, table

PART_ROWS = 100_000
NOISE = 0.02
EPSILON = 1e-5
"""By which float32 sums in different orders differ."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The index of many vectors.")
    parser.add_argument("--vectors", required=True, help="an output of crem embed")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--quantisers", nargs="+", default=["IVF_RQ"], choices=["IVF_RQ", "IVF_PQ"])
    parser.add_argument("--folder", default=None, help="for 2 kB a row")
    args = parser.parse_args(argv)

    embedded = survey(Folder.at(args.vectors))
    real = np.concatenate(
        [vectors_of(b.column(0)) for part in embedded.parts for b in rows_of_part(embedded.folder, part, ["embedding"])]
    )
    print(f"\nDrawn around {len(real):,} vectors of {real.shape[1]} dimensions. {environment('cpu')}\n")
    found = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            place = Path(folder)
            write_vectors(place / "vectors", real, rows, embedded.stamp)
            queries = next(drawn(real, args.queries, seed=1))
            least = tenth_scores(place / "vectors", queries)
            for name in ("exact", *args.quantisers):
                how = [f"index.exact_below={rows + 1}"]
                if name != "exact":
                    how = [f"index.exact_below={rows}", f"index.quantiser={name}"]
                config = load_config("micro", [*how, "index.recall_sample=0"])
                out = str(place / f"index-{name}")
                summary = build(str(place / "vectors"), out, config)
                found.append(measured(VectorIndex(out), summary, queries, least))
    table(
        [
            "vectors",
            "index",
            "recall@10",
            "median ms",
            "95 % ms",
            "built in s",
            "bytes a vector",
            "and of the inverted file",
        ],
        found,
    )


def drawn(real: NDArray[np.float32], count: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """Unit vectors around real ones, up to ``PART_ROWS`` at a time."""
    random = np.random.default_rng(seed)
    for start in range(0, count, PART_ROWS):
        size = min(PART_ROWS, count - start)
        first, second = (real[random.integers(0, len(real), size)] for _ in range(2))
        share = random.uniform(0, 0.5, (size, 1)).astype(np.float32)
        noise = random.normal(0, NOISE, first.shape).astype(np.float32)
        vectors = (1 - share) * first + share * second + noise
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_vectors(folder: Path, real: NDArray[np.float32], rows: int, stamp: schema.EmbeddingStamp) -> None:
    """Parts as ``crem embed`` writes them."""
    folder.mkdir()
    stamp = schema.EmbeddingStamp(stamp.fingerprint, stamp.dim, stamp.model, stamp.chorus_tokens)
    first = 0
    for number, vectors in enumerate(drawn(real, rows, seed=0)):
        count = len(vectors)
        columns = {
            "id": pa.array(np.arange(first, first + count)),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
            **{name: pa.nulls(count, pa.string()) for name in ("error", "uri", "text")},
        }
        of = schema.embeddings(stamp)
        pq.write_table(pa.table([columns[name] for name in of.names], schema=of), folder / f"part-{number:06d}.parquet")
        first += count


def tenth_scores(folder: Path, queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """The tenth of the exact scores of each query."""
    best = np.full((len(queries), RECALL_AT), -np.inf, np.float32)
    for part in sorted(folder.iterdir()):
        vectors = vectors_of(pq.read_table(part, columns=["embedding"])["embedding"].combine_chunks())
        scores = np.concatenate([best, queries @ vectors.T], axis=1)
        best = np.partition(scores, -RECALL_AT, axis=1)[:, -RECALL_AT:]
    tenth: NDArray[np.float32] = best.min(1)
    return tenth


def measured(
    opened: VectorIndex, summary: IndexSummary, queries: NDArray[np.float32], least: NDArray[np.float32]
) -> list[object]:
    """A row of the table."""
    seconds, right = [], 0
    for counted in (False, True):
        for query, tenth in zip(queries, least, strict=True):
            start = time.perf_counter()
            hits = opened.search(query[None], RECALL_AT)[0]
            if counted:
                seconds.append(time.perf_counter() - start)
                right += sum(hit.score >= tenth - EPSILON for hit in hits)
    kind = (
        summary.index if summary.index == "exact" else f"{summary.index}, {summary.probes} cells, {summary.refine} x k"
    )
    return [
        f"{summary.count:,}",
        kind,
        f"{right / (len(queries) * RECALL_AT):.4f}",
        f"{1000 * np.median(seconds):.1f}",
        f"{1000 * np.percentile(seconds, 95):.1f}",
        f"{summary.build_s:.1f}",
        f"{summary.bytes_per_vector:,.0f}",
        f"{summary.index_bytes_per_vector:,.0f}",
    ]


if __name__ == "__main__":
    main()
