"""A corpus that grows: what is new is embedded, what is gone counts no more, and readers see one state or the next."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.config import load_config
from crem.errors import ConfigError
from pipelines.embedding import grow as growing
from pipelines.embedding.embed import embed
from pipelines.embedding.grow import gone_ranges
from pipelines.embedding.input_files import PRESENT, compare
from pipelines.embedding.live_parts import Growth, LivePart, live_parts
from pipelines.embedding.output import EmbedManifest
from pipelines.embedding.verify_embeddings import verify_embeddings
from pipelines.search.index import build
from pipelines.sources.source_files import FILES
from pipelines.tables.manifest import PartFile
from pipelines.tables.storage import Folder
from tests.bench.null_model import load_null_model
from tests.pipelines.conftest import write_rows

CONFIG = load_config("micro", ["embed.rows_per_task=7"])


def test_ranges_of_files_become_ranges_of_parts() -> None:
    def ranges(*of: tuple[int, int]) -> list[tuple[int, int, int]]:
        first, rows = np.array(of, np.int64).reshape(-1, 2).T
        found = gone_ranges(np.array([10, 5, 10]), first, rows)
        return [(int(p), int(f), int(r)) for p, f, r in zip(*found, strict=True)]

    assert ranges() == []
    assert ranges((3, 0)) == [], "a file without rows"
    assert ranges((12, 2), (0, 3), (3, 2)) == [(0, 0, 5), (1, 2, 2)], "neighbours are one range"
    assert ranges((8, 10)) == [(0, 8, 2), (1, 0, 5), (2, 0, 3)], "a file in three parts"
    assert ranges((0, 25)) == [(0, 0, 10), (1, 0, 5), (2, 0, 10)]
    random = np.random.default_rng(0)
    gone = random.random(1000) < 0.3
    part_rows = np.array([300, 1, 500, 199])
    first = np.flatnonzero(gone)
    found = np.zeros(1000, bool)
    begins = np.cumsum(part_rows) - part_rows
    for part, start, count in zip(*gone_ranges(part_rows, first, np.ones_like(first)), strict=True):
        assert start + count <= part_rows[part]
        found[begins[part] + start : begins[part] + start + count] = True
    assert (found == gone).all()


def test_inputs_are_compared_by_name_size_and_version() -> None:
    columns = {"name": list("abcd"), "size": [1, 2, 3, 4], "version": ["v"] * 4, "container": ["jsonl"] * 4}
    before = pa.table({**columns, "generation": [0] * 4, "first": [0, 5, 6, 6], "rows": [5, 1, 0, 9]}, PRESENT)
    now = pa.table(
        {"name": list("eabd"), "size": [9, 1, 2, 5], "version": ["v", "v", "w", "v"], "container": ["jsonl"] * 4}, FILES
    )
    found = compare(before, now)
    assert found.new["name"].to_pylist() == ["b", "d", "e"] and found.changed == 2
    assert found.kept["name"].to_pylist() == ["a"] and found.gone["name"].to_pylist() == ["b", "c", "d"]
    assert found.gone.schema == PRESENT and found.new.schema == FILES


def test_rows_that_are_gone_are_left_out_of_a_table() -> None:
    part = LivePart(PartFile(table="t", name="p", rows=10, bytes=1, checksum="c"), np.array([[1, 2], [8, 2]]))
    assert part.rows == 6 and part.keep(pa.table({"n": range(10)}))["n"].to_pylist() == [0, 3, 4, 5, 6, 7]
    assert part.keep(pa.table({"n": [2, 3, 4]}), first=2)["n"].to_pylist() == [3, 4]
    assert part.state != LivePart(part.file).state == "c"


def rows_of(out: Path) -> list[tuple[int, str | None, tuple[float, ...] | None]]:
    """Of the rows that count, in the order of ids."""
    found = []
    for part in live_parts(Folder.at(out)):
        for row in part.keep(pq.read_table(out / part.file.name)).to_pylist():
            found.append((row["id"], row["error"], row["embedding"] and tuple(row["embedding"])))
    return sorted(found)


def write(folder: Path, name: str, ids: range, *, text: str = "item") -> None:
    bad = {"text": " "}
    write_rows(folder / name, [{"id": i, "text": f"{text} {i}"} | (bad if i % 10 == 3 else {}) for i in ids])


@pytest.mark.ray
@pytest.mark.slow
def test_a_corpus_grows_and_shrinks(
    tmp_path: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    items, out = tmp_path / "items", tmp_path / "out"
    items.mkdir()
    for number in range(4):
        write(items, f"{number}.jsonl", range(10 * number, 10 * number + 10))

    def run(place: Path, **how: bool) -> EmbedManifest:
        return embed(tiny_model_dir, str(items), str(place), CONFIG, load=load_null_model, **how)

    first = run(out, grow=True)
    assert (first.rows_in, first.embedded, first.gone) == (40, 36, 0)
    write(items, "1.jsonl", range(10, 20), text="changed")
    write(items, "4.jsonl", range(40, 50))
    (items / "2.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"begun from other input.*--grow"):
        run(out)
    before = rows_of(out)

    with monkeypatch.context() as patch:  # killed between the vectors and the commit

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(growing.Growing, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            run(out, grow=True)
    assert rows_of(out) == before and not verify_embeddings(str(out)).faults, "readers see the state before"
    grown = run(out, grow=True)
    assert (grown.rows_in, grown.embedded, grown.failed, grown.gone) == (40, 36, {"empty_item": 4}, 20)
    assert grown.resumed == 40, "both generations were embedded already"
    checked = verify_embeddings(str(out))
    assert not checked.faults and (checked.rows, checked.gone, checked.repeated_ids) == (40, 20, 0)

    indexed = build(str(out), str(tmp_path / "index"), CONFIG)
    assert (indexed.count, indexed.skipped) == (36, 4)

    fresh = tmp_path / "fresh"
    run(fresh)
    assert rows_of(out) == rows_of(fresh)
    again = run(out, grow=True)
    assert (again.rows_in, again.resumed) == (40, 40) == (run(out).rows_in, 40), "nothing to do"
    state = Growth.read(Folder.at(out))
    assert state is not None and [g.gone for g in state.generations] == [20, 0]

    part = next((out / "generation-000001" / "rows").glob("part-*"))
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)
    (fault,) = verify_embeddings(str(out)).faults
    assert fault.startswith("generation-000001/rows/part-000000")
    repaired = run(out, grow=True, repair=True)
    assert (repaired.rows_in, repaired.gone) == (40, 20) and rows_of(out) == rows_of(fresh)
    assert not verify_embeddings(str(out)).faults

    (items / "0.jsonl").unlink()  # nothing new
    shrunk = run(out, grow=True)
    indexed = build(str(out), str(tmp_path / "index"), CONFIG)
    assert (indexed.count, indexed.added, indexed.removed) == (27, 27, 36), "two parts: one lost rows, one was repaired"
    assert (shrunk.rows_in, shrunk.embedded, shrunk.gone) == (30, 27, 30) and not verify_embeddings(str(out)).faults
    (out / state.gone_file).parent.joinpath("gone-000003.parquet").unlink()
    with pytest.raises(ConfigError, match="list of rows that are gone, cannot be read"):
        live_parts(Folder.at(out))
    shutil.rmtree(items / "nowhere", ignore_errors=True)
    assert run(out, fresh=True).rows_in == 30 and not (out / "generation-000001").exists()
