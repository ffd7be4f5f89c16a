"""One item has one vector, whichever way it is embedded: by the library, by the batch job, by the server.

The contract in float32 is a cosine of at least 1 - 1e-5; in bfloat16 of at least 1 - 1e-3, which padding and neighbours
use up in part, because its products are rounded to 8 bits.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

import crem
from crem.config import load_config
from crem.data.collator import Batch
from crem.data.sequence import PreparedSequence
from crem.model.chorus import pool
from pipelines.embedding.embed import embed
from pipelines.embedding.embed_run import EmbedRun
from tests.pipelines.conftest import encoded, random_image

Vectors = NDArray[np.float32]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Texts of all lengths, pictures of several sizes, both together, an instruction of its own."""
    (folder / "images").mkdir(parents=True)
    for number in range(4):
        image = random_image(number).resize((40 + 60 * number, 30 + 10 * number))
        (folder / "images" / f"{number}.png").write_bytes(encoded(image))
    sentence = "a red apple on the table beside two green pears and a glass of cold water"
    texts = [sentence[: 4 + 5 * number] for number in range(15)] + ["ünïcode 漢字 🍎 " * 40]
    items: list[dict[str, Any]] = [{"text": text} for text in texts]
    items += [{"image": f"{number}.png"} for number in range(4)]
    items += [{"text": texts[number], "images": [f"{number}.png", "0.png"]} for number in range(1, 3)]
    items += [{"text": "an apple", "image": "1.png", "instruction": "Find it."}]
    return [{"id": number, **item} for number, item in enumerate(items)]


def items_of(table: list[dict[str, Any]], folder: Path) -> list[crem.Item]:
    return [
        crem.Item(
            text=row.get("text"),
            images=[folder / "images" / name for name in row.get("images", [row["image"]] if "image" in row else [])],
            instruction=row.get("instruction"),
        )
        for row in table
    ]


@torch.inference_mode()
def in_one_row(model: crem.Crem, sequences: list[PreparedSequence]) -> Vectors:
    """All sequences in one row without padding, the form of training."""
    batch: Batch = model.collator.pad(sequences, [list(range(len(sequences)))])
    hidden_BTD, _ = model.model.encode(batch.to(model.device))
    return pool(hidden_BTD, batch.segments, batch.chorus_tokens).float().numpy()


def ways_of_the_library(model: crem.Crem, items: list[crem.Item]) -> dict[str, Vectors]:
    sequences = [model.prepare(item) for item in items]
    return {
        "alone": np.concatenate([model.embed([item]) for item in items]),
        "batches of 5": model.embed(items, batch_size=5),
        "by tokens": model.embed_prepared(sequences, batch_size=64, batch_tokens=200),
        "padded, in the order given": np.concatenate([model.embed_prepared(sequences[:9]), model.embed(items[9:])]),
        "one row": in_one_row(model, sequences),
    }


def least_cosine(ways: dict[str, Vectors]) -> dict[str, float]:
    reference = ways["alone"].astype(np.float64)
    return {name: float((reference * found).sum(1).min()) for name, found in ways.items() if name != "alone"}


def stored(out: Path) -> Vectors:
    table = pq.read_table(parts(out), columns=["id", "embedding", "error"]).sort_by("id")
    assert table["error"].null_count == len(table)
    return np.array(table["embedding"].to_pylist(), np.float32)


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("rows/part-*.parquet"))


@pytest.fixture
def ray_of_four() -> Iterator[None]:
    import ray
    from ray import serve

    ray.init(address="local", num_cpus=8, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    yield
    serve.shutdown()
    ray.shutdown()


def content(item: crem.Item) -> list[dict[str, Any]]:
    pictures = [
        {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode()},
        }
        for image in item.images
    ]
    return [*pictures, *([{"type": "text", "text": item.text}] if item.text else [])]


def served(url: str, item: crem.Item) -> list[float]:
    body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": content(item)}]}
    if item.instruction:
        body["instruction"] = item.instruction
    answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60)
    answer.raise_for_status()
    vector: list[float] = answer.json()["data"][0]["embedding"]
    return vector


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_batches_do_not_change_a_vector(tiny_model_dir: str, tmp_path: Path, dtype: torch.dtype, bound: float) -> None:
    items = items_of(rows(tmp_path), tmp_path)
    found = least_cosine(ways_of_the_library(crem.load(tiny_model_dir, dtype=dtype), items))
    assert min(found.values()) >= 1 - bound, found


@pytest.mark.slow
@pytest.mark.ray
def test_all_ways_give_one_vector(
    tiny_model_dir: str, tmp_path: Path, ray_of_four: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = rows(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, table)))
    items = items_of(table, tmp_path)
    model = crem.load(tiny_model_dir)
    ways = ways_of_the_library(model, items)

    def job(name: str, *settings: str) -> Path:
        out = tmp_path / name
        config = load_config("micro", ["embed.rows_per_task=2", "embed.batch_size=5", *settings])
        embed(tiny_model_dir, str(tmp_path / "rows.jsonl"), str(out), config)
        return out

    one = job("one", "embed.max_actors=1")
    ways["job, one model"] = stored(one)
    four = job("four", "embed.min_actors=4", "embed.max_actors=4", "embed.cpus_per_task=0.5")
    ways["job, four models"] = stored(four)

    staged = EmbedRun._staged

    def interrupted(run: EmbedRun, *counts: Any) -> None:
        staged(run, *counts)
        if len(run._missing[0]) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EmbedRun, "_staged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job("resumed", "embed.max_actors=1")
    assert not parts(tmp_path / "resumed")
    ways["job, resumed"] = stored(job("resumed", "embed.max_actors=1"))

    from serve import app

    url = app.run(tiny_model_dir, load_config("micro", ["serve.port=0", "serve.max_replicas=1"]))
    ways["server, alone"] = np.array([served(url, item) for item in items], np.float32)
    with ThreadPoolExecutor(len(items)) as pool_of_clients:
        ways["server, all at once"] = np.array(list(pool_of_clients.map(lambda item: served(url, item), items)))
    texts = [item.text for item in items[:16]]
    listed = httpx.post(f"{url}/v1/embeddings", json={"model": "model", "input": texts}, timeout=60).json()
    ways["server, a list"] = np.concatenate(
        [np.array([one["embedding"] for one in listed["data"]], np.float32), ways["alone"][16:]]
    )

    found = least_cosine(ways)
    assert min(found.values()) >= 1 - 1e-5, found
