"""``embed.output_format=lance``: the rows of the Parquet output as one dataset; what holds for it holds here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from crem.cli import main
from crem.config import load_config
from crem.errors import ConfigError
from pipelines.corpus import work_plan
from pipelines.embedding import embed as embed_module
from pipelines.embedding.embed import embed
from pipelines.embedding.output import read_ledgers
from pipelines.embedding.verify_embeddings import verify_embeddings
from pipelines.mining.given_vectors import open_vectors, read_piece
from pipelines.search.opened_index import VectorIndex
from pipelines.tables.lease import LEASE
from pipelines.tables.storage import Folder
from tests.bench.null_model import load_null_model
from tests.pipelines.conftest import write_rows
from tests.s3_server import S3Server

ROWS, BAD, SHARDS = 60, 7, 4
SETTINGS = ["embed.rows_per_task=6", "embed.keep=[price, tags]", "embed.output_format=lance"]
RICH = ["embed.vector=int8", "embed.states=true", "embed.memory=int8"]
CONFIG = load_config("micro", SETTINGS)

pytestmark = pytest.mark.ray


def items(folder: Path) -> str:
    rows = [
        {"id": i, "text": " " if i == BAD else f"item {i}", "price": i / 2, "tags": ["a", str(i)] if i % 3 else None}
        for i in range(ROWS)
    ]
    return str(write_rows(folder / "items.jsonl", rows))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: str, local_ray: None) -> Path:
    """An output of four shards, of a model that costs nothing."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_plan, "GROUP_PIECES", 3)
        embed(tiny_model_dir, items(folder), str(folder / "out"), CONFIG, load=load_null_model)
    return folder / "out"


def rows_of(out: Path) -> pa.Table:
    return lance.dataset(out / "rows.lance").to_table()


def part_of(out: Path, shard: int) -> Path:
    (part,) = (out / "rows.lance" / "data").glob(f"part-{shard:06d}-0000-*.lance")
    return part


@pytest.mark.slow
def test_the_dataset_has_the_rows_of_the_parquet_output(
    tmp_path: Path, tiny_model_dir: str, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source, command = items(tmp_path), ["--model", tiny_model_dir, *SETTINGS, *RICH]
    assert main(["embed", source, "--out", str(tmp_path / "l"), *command]) == 0
    assert "rows in 60 = embedded 59 + errors 1" in capsys.readouterr().out
    assert main(["embed", source, "--out", str(tmp_path / "p"), *command, "embed.output_format=parquet"]) == 0
    found, expected = rows_of(tmp_path / "l"), pq.read_table(tmp_path / "p" / "rows")
    assert found.schema == expected.schema and found.schema.metadata == expected.schema.metadata
    for name in ("id", "error", "price", "tags", "text"):
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    for name in ("embedding", "scale", "states", "memory"):
        assert found[name].null_count == 1 and found[name].is_null().to_pylist().index(True) == BAD
    steps = [
        np.abs(np.array(one) - np.array(other)).max()
        for one, other in zip(found["embedding"].to_pylist(), expected["embedding"].to_pylist(), strict=True)
        if one is not None
    ]
    assert max(steps) <= 1, "windows are batched otherwise, so that a value may round the other way"
    assert set(pc.binary_length(found["memory"]).drop_null().to_pylist()) == set(
        pc.binary_length(expected["memory"]).drop_null().to_pylist()
    )
    assert not (tmp_path / "l" / "rows").exists() and not (tmp_path / "l" / "_work").exists()
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "l")]) == 0
    assert "1 shards, 1 parts: 60 rows, 59 embedded: all is well" in capsys.readouterr().out
    assert main(["embed", source, "--out", str(tmp_path / "l"), *command, "embed.output_format=parquet"]) == 2
    assert "output_format was 'lance' and is 'parquet'" in capsys.readouterr().err


def flipped(out: Path) -> None:
    part = part_of(out, 2)
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)


def cut(out: Path) -> None:
    part = part_of(out, 2)
    part.write_bytes(part.read_bytes()[:-100])


def missing(out: Path) -> None:
    part_of(out, 2).unlink()


def foreign(out: Path) -> None:
    shutil.copy(part_of(out, 2), out / "rows.lance" / "data" / "part-000009-0000-aaaaaaaa.lance")


def dropped(out: Path) -> None:
    lance.dataset(out / "rows.lance").delete("id = 5")


def doubled(out: Path) -> None:
    dataset = lance.dataset(out / "rows.lance")
    dataset.insert(dataset.to_table(limit=3))


def a_part_twice(out: Path) -> None:
    dataset = lance.dataset(out / "rows.lance")
    fragments = [fragment.metadata for fragment in dataset.get_fragments()]
    lance.LanceDataset.commit(dataset, lance.LanceOperation.Overwrite(dataset.schema, [*fragments, fragments[0]]))


def without_a_part(out: Path) -> None:
    dataset = lance.dataset(out / "rows.lance")
    fragments = [fragment.metadata for fragment in dataset.get_fragments()]
    lance.LanceDataset.commit(dataset, lance.LanceOperation.Overwrite(dataset.schema, fragments[1:]))


def no_version(out: Path) -> None:
    shutil.rmtree(out / "rows.lance" / "_versions")


def a_damaged_version(out: Path) -> None:
    (version,) = (out / "rows.lance" / "_versions").glob("*.manifest")
    version.write_bytes(version.read_bytes()[:20])


def ledger_of_other_rows(out: Path) -> None:
    file = out / "ledger" / "shard-000002.json"
    ledger = json.loads(file.read_text())
    ledger["fragments"][0]["physical_rows"] = 3
    file.write_text(json.dumps(ledger))


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (flipped, "rows.lance/data/part-000002-0000-{0} has other bytes than were written"),
    (cut, "rows.lance/data/part-000002-0000-{0} has other bytes than were written"),
    (missing, "rows.lance/data/part-000002-0000-{0} is missing"),
    (foreign, "rows.lance/data/part-000009-0000-aaaaaaaa.lance belongs to no shard"),
    (dropped, "rows.lance has rows that were deleted by another program"),
    (doubled, "rows.lance has 1 files that belong to no shard"),
    (a_part_twice, "rows.lance has the parts in another order, or twice"),
    (without_a_part, "rows.lance lacks 1 parts, part-000000-0000-"),
    (no_version, "rows.lance is not a dataset that can be read"),
    (a_damaged_version, "rows.lance is not a dataset that can be read"),
    (ledger_of_other_rows, "shard 2 lists other fragments than parts"),
]


def test_verify_finds_every_fault(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(whole)]) == 0
    assert f"{SHARDS} shards, {SHARDS} parts: {ROWS} rows, {ROWS - 1} embedded: all is well" in capsys.readouterr().out
    shutil.copytree(whole, tmp_path / "searched")
    lance.dataset(tmp_path / "searched" / "rows.lance").create_scalar_index("id", "BTREE")
    assert main(["verify", str(tmp_path / "searched")]) == 0, "an index of another program is no fault"
    capsys.readouterr()
    for fault, said in FAULTS:
        out = tmp_path / fault.__name__
        shutil.copytree(whole, out)
        name = part_of(out, 2).name.rpartition("-")[2]
        fault(out)
        assert main(["verify", str(out)]) == 1, fault.__name__
        assert said.format(name) in capsys.readouterr().out, fault.__name__


@pytest.mark.parametrize(
    "fault",
    [flipped, dropped, *(pytest.param(f, marks=pytest.mark.slow) for f, _ in FAULTS if f not in (flipped, dropped))],
)
def test_repair_mends_a_fault(
    fault: Callable[[Path], None], whole: Path, tmp_path: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_plan, "GROUP_PIECES", 3)
    out, source = tmp_path / "out", str(whole.parent / "items.jsonl")
    shutil.copytree(whole, out)
    before = {part.name: part.stat().st_mtime_ns for part in (out / "rows.lance" / "data").iterdir()}
    fault(out)
    embed(tiny_model_dir, source, str(out), CONFIG, load=load_null_model, repair=True)
    after = {part.name: part.stat().st_mtime_ns for part in (out / "rows.lance" / "data").iterdir()}
    assert len(after) == SHARDS and len(before.items() & after.items()) >= SHARDS - 1, (
        "no other shard is embedded again"
    )
    assert rows_of(out).equals(rows_of(whole)) and not verify_embeddings(str(out)).faults
    assert lance.dataset(out / "rows.lance").version == 1, "no version names files that are gone"


def test_a_run_that_was_killed_continues_and_attempts_do_not_mix(
    whole: Path, tmp_path: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_plan, "GROUP_PIECES", 3)
    source, out = str(whole.parent / "items.jsonl"), tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed_module, "commit_dataset", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(tiny_model_dir, source, str(out), CONFIG, load=load_null_model)
    with pytest.raises(ValueError, match="not found"):
        lance.dataset(out / "rows.lance")
    with pytest.raises(ConfigError, match="is an embedding run that was not finished"):
        open_vectors([str(out)])
    lost = out / "rows.lance" / "data" / "part-000001-0000-bbbbbbbb.lance"  # of an attempt that did not get its shard
    shutil.copy(part_of(out, 2), lost)
    manifest = embed(tiny_model_dir, source, str(out), CONFIG, load=load_null_model)
    assert (manifest.resumed, manifest.rows_out) == (ROWS, ROWS) and not lost.exists()
    assert rows_of(out).equals(rows_of(whole))
    assert len(read_ledgers(Folder.at(out))) == SHARDS and not verify_embeddings(str(out)).faults


def test_an_index_and_mine_read_it_and_notice_a_flipped_bit(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(whole), "--out", str(tmp_path / "index"), "index.filters=[price]"]) == 0
    rows = rows_of(whole)
    index = VectorIndex(str(tmp_path / "index"))
    assert index.summary.count == ROWS - 1
    query = np.array([rows["embedding"][12].as_py()], np.float32)
    assert [hit.id for hit in index.search(query, 1)[0]] == [12]
    given = open_vectors([str(whole)])
    assert np.concatenate(given.ids).tolist() == list(range(ROWS))
    vectors, valid = read_piece(given.pieces[0], np.array([3, BAD]))
    assert valid.tolist() == [True, False] and np.allclose(vectors[0], rows["embedding"][3].as_py())

    out = tmp_path / "out"
    shutil.copytree(whole, out)
    flipped(out)
    capsys.readouterr()
    assert main(["index", str(out), "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "rows.lance/data/part-000002-0000-" in said and "(its checksum is" in said and "--repair" in said
    with pytest.raises(ConfigError, match="its checksum is"):
        open_vectors([str(out)])
    assert main(["index", str(whole / "rows.lance"), "--out", str(tmp_path / "other")]) == 2
    assert f"is inside an output of crem embed, whose ledgers say what counts; give {whole}" in capsys.readouterr().err


def test_what_a_lance_dataset_cannot_have_is_refused_at_once(
    whole: Path, tmp_path: Path, tiny_model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(whole.parent / "items.jsonl")
    embedding = ["embed", source, "--model", tiny_model_dir, "--out", str(tmp_path / "o"), "embed.output_format=lance"]
    assert main([*embedding, "--grow"]) == 2
    assert "let crem index follow it" in capsys.readouterr().err
    embedding[1] = str(write_rows(tmp_path / "dots.jsonl", [{"id": 1, "text": "t", "a.b": 1}]))
    assert main([*embedding, "embed.keep=['a.b']"]) == 2
    assert "embed.keep names 'a.b', which no column of a Lance dataset may be called" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


SMALL_SHARDS = """
import sys
from crem.cli import main
from pipelines.corpus import work_plan
work_plan.GROUP_PIECES = 3
raise SystemExit(main(sys.argv[1:]))
"""


def command(*words: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, with shards of three pieces."""
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_SHARDS, *words],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_on_object_storage_after_a_kill(tmp_path: Path, tiny_model_dir: str, s3_env: S3Server) -> None:
    """Driver and workers are killed when one shard is committed; then the command, ``verify`` and ``index``."""
    out = Folder.at(f"s3://{s3_env.bucket}/embedded-in-lance")
    words = ("embed", items(tmp_path), "--model", tiny_model_dir, "--out", out.uri, *SETTINGS)
    job, deadline = command(*words), time.monotonic() + 300
    while not out.child("ledger").files():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0][-2000:]
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert not out.exists("manifest.json") and "_versions" not in out.child("rows.lance").folders()
    lease = out.read_json(LEASE)
    out.write_json(lease | {"heartbeat": lease["heartbeat"] - 1000}, LEASE)  # as if it had been dead for so long
    job = command(*words)
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 0 and f"rows in {ROWS} = embedded {ROWS - 1} + errors 1" in said, said[-2000:]
    options = {"allow_http": "true"}
    rows = lance.dataset(f"{out.uri}/rows.lance", storage_options=options).to_table()
    assert rows["id"].to_pylist() == list(range(ROWS)) and rows["embedding"].null_count == 1
    said, _ = command("verify", out.uri).communicate(timeout=200)  # workers of the Ray of other tests have no keys
    assert f"{SHARDS} shards, {SHARDS} parts: {ROWS} rows, {ROWS - 1} embedded: all is well" in said, said[-2000:]
    job = command("index", out.uri, "--out", str(tmp_path / "index"))
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0 and VectorIndex(str(tmp_path / "index")).summary.count == ROWS - 1, said[-2000:]
