"""``crem embed`` with other types of vectors, states and memories, through the command; plain numpy is the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crem
from crem.cli import main
from crem.config import load_config
from crem.model.memory import ChorusMemory, MemoryLayout
from pipelines.corpus import work_plan
from pipelines.embedding import embed_run, shard_commit, windows
from pipelines.embedding.embed import embed
from pipelines.embedding.output import EmbedPlan, ShardLedger, read_ledgers
from pipelines.mining.given_vectors import open_vectors, read_piece
from pipelines.tables.schema import EmbeddingStamp
from pipelines.tables.storage import Folder
from pipelines.tables.vector_parts import read_part
from pipelines.tables.vector_types import unit_vectors
from tests.pipelines.conftest import encoded, random_image, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TEXTS = ["a red apple", "food and drink", "animals", "describe it", "what is this?"]
BAD = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """Texts, a bad row, and pictures."""
    folder = tmp_path_factory.mktemp("items")
    rows: list[dict[str, object]] = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    rows.insert(BAD, {"id": 90, "text": " "})
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded(random_image(number)))
        rows.append({"id": 50 + number, "image": f"{number}.png"})
    return write_rows(folder / "items.jsonl", rows)


def run(source: Path, model: str, out: Path, *settings: str) -> int:
    return main(["embed", str(source), "--model", model, "--out", str(out), "embed.max_actors=1", *settings])


def items_of(source: Path) -> list[crem.Item]:
    folder = source.parent
    return [crem.Item(text) for text in TEXTS] + [crem.Item(images=[folder / f"{n}.png"]) for n in range(3)]


def part_of(out: Path) -> pa.Table:
    ledgers = read_ledgers(Folder.at(out))
    return read_part(Folder.at(out), ledgers[0].parts[0].name)


def test_int8_prefix_states_and_memories(
    source: Path, tiny_model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out", crem.load(tiny_model_dir)
    settings = ("embed.vector=int8", "embed.dims=24", "embed.states=true", "embed.memory=int8")
    assert run(source, tiny_model_dir, out, *settings) == 0
    assert main(["verify", str(out)]) == 0
    part = part_of(out)
    items = items_of(source)
    valid = np.arange(9) != BAD
    for name in ("embedding", "scale", "states", "memory"):
        assert part[name].is_valid().to_pylist() == valid.tolist(), name
    assert part["error"][BAD].as_py().startswith("empty_item")

    own = model.embed(items)[:, :24]
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    rows = part.to_pylist()
    for row, vector in zip((row for row in rows if row["error"] is None), own, strict=True):
        assert np.abs(np.array(row["embedding"]) * row["scale"] - vector).max() <= row["scale"] * 0.51
    stamp = EmbeddingStamp.of(part.schema)
    assert stamp is not None and (stamp.dim, stamp.vector, stamp.states_dim, stamp.memory) == (24, "int8", 48, "int8")

    assert part.schema.field("states").type == pa.list_(pa.list_(pa.float16(), 48))
    for item, row in zip(items, (row for row in rows if row["states"] is not None), strict=True):
        states = model.encode_prepared([model.prepare(item)], states=True).states
        assert states is not None
        np.testing.assert_allclose(np.array(row["states"], np.float32), states[0], atol=2e-3)

    layout = MemoryLayout.of(part.schema.metadata)
    memories = [ChorusMemory.from_bytes(layout, row["memory"]) for row in rows if row["memory"] is not None]
    exact = model.remember(items)
    for memory, whole in zip(memories, exact, strict=True):
        spread = np.abs(whole.keys_and_values()).max()
        assert np.abs(memory.keys_and_values() - whole.keys_and_values()).max() < spread / 127
        assert memory.next_position == whole.next_position
    answers = [answer.text for answer in model.answer_memories(memories, ["what?"] * 8, max_new_tokens=6)]
    of_small = model.answer_memories(model.remember(items, dtype="int8"), ["what?"] * 8, max_new_tokens=6)
    assert answers == [answer.text for answer in of_small]

    capsys.readouterr()
    assert run(source, tiny_model_dir, out, *settings) == 0, "a complete run does nothing"
    for other, says in [
        ("embed.vector=fp16", "vector was 'int8' and is 'fp16'"),
        ("embed.dims=32", "dims was 24 and is 32"),
        ("embed.states=false", "states was True and is False"),
        ("embed.memory=bf16", "memory was 'int8' and is 'bf16'"),
    ]:
        assert run(source, tiny_model_dir, out, *settings, other) == 2
        assert says in capsys.readouterr().err
    (given, valid_rows) = read_piece(open_vectors([str(out)]).pieces[0], np.arange(9))
    np.testing.assert_allclose(given[valid], own, atol=0.01)
    assert valid_rows.tolist() == valid.tolist()


@pytest.mark.parametrize("vector", ["fp16", "binary"])
def test_index_and_verify_read_other_types(source: Path, tiny_model_dir: str, tmp_path: Path, vector: str) -> None:
    out, model = tmp_path / "out", crem.load(tiny_model_dir)
    made = embed(
        tiny_model_dir, str(source), str(out), load_config("micro", [f"embed.vector={vector}", "embed.max_actors=1"])
    )
    assert (made.embedded, made.errors) == (8, 1)
    own = model.embed(items_of(source))
    found = unit_vectors(part_of(out))[np.arange(9) != BAD]
    np.testing.assert_allclose(found, own if vector == "fp16" else np.sign(own) / np.sqrt(48), atol=1e-3)
    part = next(out.glob("rows/*.parquet"))
    table = pq.read_table(part)
    plan = EmbedPlan.read(Folder.at(out))
    assert plan is not None and plan.row_bytes == {"fp16": 96, "binary": 6}[vector] and table.num_rows == 9
    assert main(["verify", str(out)]) == 0
    assert main(["index", str(out), "--out", str(tmp_path / "index")]) == 0
    assert main(["search", "animals", "--index", str(tmp_path / "index"), "-k", "1"]) == 0


def test_windows_and_parts_are_bounded_by_what_they_write(
    source: Path, tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = crem.load(tiny_model_dir).remember(["a"], dtype="bf16")[0].layout.size_bytes
    row_bytes = size + 4 * 48
    found: list[int] = []

    class Small(windows.WindowMaker):
        def windows(self, piece: work_plan.Piece) -> Iterator[windows.Window]:
            with pytest.MonkeyPatch.context() as patch:  # in a worker, which other tests have after this
                patch.setattr(windows, "_WINDOW_BYTES", 3 * row_bytes)
                patch.setattr(windows, "_ITEM_BYTES", 1)
                yield from super().windows(piece)

    def in_small_parts(*args: Any, **options: Any) -> ShardLedger:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shard_commit, "PART_BYTES", 2 * row_bytes + 100)
            return shard_commit.commit_shard(*args, **options)

    monkeypatch.setattr("pipelines.embedding.embed_run.WindowMaker", Small)
    monkeypatch.setattr(embed_run, "commit_shard", in_small_parts)
    staged = embed_run.EmbedRun._staged
    monkeypatch.setattr(embed_run.EmbedRun, "_staged", lambda run, c: (found.append(c.rows), staged(run, c)))
    config = load_config("micro", ["embed.memory=bf16", "embed.max_actors=1"])
    embed(tiny_model_dir, str(source), str(tmp_path / "out"), config)
    plan = EmbedPlan.read(Folder.at(tmp_path / "out"))
    assert plan is not None and plan.row_bytes == row_bytes
    assert max(found) == 3 and sum(found) == 9
    (ledger,) = read_ledgers(Folder.at(tmp_path / "out"))
    assert [part.rows for part in ledger.parts] == [2, 2, 2, 2, 1]


def test_what_a_model_cannot_give_is_refused(
    source: Path, tiny_model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings, says in [
        (["embed.dims=64"], "embed.dims=64, and vectors of"),
        (["embed.vector=binary", "embed.dims=20"], "set embed.dims=16"),
    ]:
        assert run(source, tiny_model_dir, tmp_path / "out", *settings) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
