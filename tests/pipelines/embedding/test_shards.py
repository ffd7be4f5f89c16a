"""Windows, shards and ledgers: an interrupted run continues, and what is wrong with an output is found and mended."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crem
from crem.cli import main
from crem.config import load_config
from crem.errors import ConfigError
from crem.model.encoding import batches_by_length
from pipelines.corpus import work_plan
from pipelines.embedding import embed_run, shard_commit, windows
from pipelines.embedding import verify_embeddings as verifying
from pipelines.embedding.attempts import Attempts
from pipelines.embedding.embed import embed
from pipelines.embedding.output import EmbedManifest, EmbedPlan, read_ledgers
from pipelines.embedding.verify_embeddings import repeated_ids, verify_embeddings
from pipelines.embedding.window_embedder import WindowEmbedder
from pipelines.search.embedded_parts import survey
from pipelines.tables import ray_tasks, schema
from pipelines.tables.lease import Lease
from pipelines.tables.storage import Folder, JobKind
from tests.pipelines.conftest import part_of, table, write_rows

ROWS = 60
CONFIG = load_config("micro", ["embed.rows_per_task=6", "embed.batch_size=4"])


def items(folder: Path) -> str:
    rows = [{"id": i, "text": f"item {i} " + "and more " * (i % 7)} for i in range(ROWS)]
    return str(write_rows(folder / "items.jsonl", rows))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: str, local_ray: None) -> Path:
    """An output of four shards."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_plan, "GROUP_PIECES", 3)
        embed(tiny_model_dir, items(folder), str(folder / "out"), CONFIG)
    return folder / "out"


@pytest.mark.ray
def test_parts_hold_all_rows_in_order_with_the_vectors_of_the_model(whole: Path, tiny_model_dir: str) -> None:
    rows = table(whole)
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert pq.read_table(whole / "rows")["id"].to_pylist() == list(range(ROWS)), "nothing else is in the folder"
    own = crem.load(tiny_model_dir).embed([row["text"] for row in rows])
    assert (np.array([row["embedding"] for row in rows]) * own).sum(1).min() > 1 - 1e-5
    manifest = EmbedManifest.read(Folder.at(whole))
    assert manifest is not None and (manifest.shards, manifest.parts, manifest.rows_out) == (4, 4, ROWS)
    assert sorted(path.name for path in (whole / "ledger").iterdir()) == [f"shard-{n:06d}.json" for n in range(4)]
    assert not (whole / "_work").exists()


@pytest.mark.ray
def test_small_windows_and_parts_give_the_same_rows(
    whole: Path, tmp_path: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_commit, "PART_BYTES", 7 * 4 * crem.load(tiny_model_dir).dim)
    maker = windows.WindowMaker
    found: list[int] = []

    class Small(maker):  # type: ignore[misc, valid-type]
        def windows(self, piece: work_plan.Piece) -> Any:
            windows._WINDOW_BYTES = 2500  # in the worker
            return super().windows(piece)

    monkeypatch.setattr("pipelines.embedding.embed_run.WindowMaker", Small)
    staged = embed_run.EmbedRun._staged
    monkeypatch.setattr(embed_run.EmbedRun, "_staged", lambda run, c: (found.append(c.number), staged(run, c)))
    source = str(whole.parent / "items.jsonl")
    embed(tiny_model_dir, source, str(tmp_path / "out"), CONFIG)
    assert max(found) >= 2 and len(found) > 10
    assert [row["id"] for row in table(tmp_path / "out")] == list(range(ROWS))
    one, other = (np.array([row["embedding"] for row in table(place)]) for place in (whole, tmp_path / "out"))
    assert (one * other).sum(1).min() > 1 - 1e-5


@pytest.mark.ray
def test_a_run_that_was_killed_embeds_only_what_is_not_staged(
    whole: Path, tmp_path: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_plan, "GROUP_PIECES", 3)
    source, out = str(whole.parent / "items.jsonl"), tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed_run.EmbedRun, "_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(tiny_model_dir, source, str(out), CONFIG)
    staged = {path.name: path.stat().st_mtime_ns for path in out.rglob("*.arrow")}
    assert len(staged) >= 3 and not (out / "manifest.json").exists()
    with pytest.raises(ConfigError, match="is an embedding run that was not finished"):
        survey(Folder.at(out))
    manifest = embed(tiny_model_dir, source, str(out), CONFIG)
    assert manifest.resumed >= 6 * 3 and manifest.rows_out == ROWS
    assert_same(out, whole)


def assert_same(one: Path, other: Path) -> None:
    """The same rows, and vectors that differ by rounding alone."""
    rows, expected = table(one), table(other)
    found, wanted = (np.array([row.pop("embedding") for row in of]) for of in (rows, expected))
    assert rows == expected and np.abs(found - wanted).max() < 1e-6


def flipped(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)


def shorter(part: Path) -> None:
    table = pq.read_table(part)
    pq.write_table(table.slice(1), part)


def doubled(part: Path) -> None:
    table = pq.read_table(part)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), part)


def of_another_model(part: Path) -> None:
    table = pq.read_table(part)
    stamp = schema.EmbeddingStamp("f" * 16, table["embedding"].type.list_size, "elsewhere")
    pq.write_table(table.replace_schema_metadata(schema.embeddings(stamp).metadata), part)


def rewritten(change: Callable[[pa.Table], pa.Table], **ledger_rows: int) -> Callable[[Path], None]:
    """A part with other rows, of which the checksum in its ledger is right."""

    def rewrite(part: Path) -> None:
        pq.write_table(change(pq.read_table(part)), part)
        (file,) = (path for path in part.parents[1].glob("ledger/*") if part.name in path.read_text())
        ledger = json.loads(file.read_text())
        data = part.read_bytes()
        checksum = hashlib.blake2b(data, digest_size=16).hexdigest()
        ledger["parts"][0] |= {"bytes": len(data), "checksum": checksum, "rows": pq.read_metadata(part).num_rows}
        file.write_text(json.dumps(ledger | ledger_rows))

    return rewrite


def without_its_ledger(part: Path) -> None:
    (part.parents[1] / "ledger" / "shard-000002.json").unlink()


def ledger_cut_short(part: Path) -> None:
    file = part.parents[1] / "ledger" / "shard-000002.json"
    file.write_text(file.read_text()[:100])


def foreign_part(part: Path) -> None:
    shutil.copy(part, part.with_name("part-000009-0000.parquet"))


def half_a_part(part: Path) -> None:
    """As a process that was killed while it wrote leaves it; readers of the folder would stumble over it."""
    part.with_name("part-000002-0000-cccccccc.parquet.1234.partial").write_bytes(part.read_bytes()[:1000])


def foreign_shard(part: Path) -> None:
    """Of another model, with a ledger and a part that fit each other."""
    ledger = json.loads((part.parents[1] / "ledger" / "shard-000002.json").read_text())
    other = ledger | {"shard": 9, "fingerprint": "f" * 16}
    (part.parents[1] / "ledger" / "shard-000009.json").write_text(json.dumps(other))


def swapped(table: pa.Table) -> pa.Table:
    """One row is dropped, and another is there twice."""
    return pa.concat_tables([table.slice(1), table.slice(1, 1)])


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (flipped, "{part} has other bytes than were written"),
    (shorter, "{part} has other bytes than were written"),
    (doubled, "{part} has other bytes than were written"),
    (of_another_model, "{part} has other bytes than were written"),
    (Path.unlink, "{part} is missing"),
    (rewritten(lambda table: table.slice(1)), "shard 2 has 18 rows, and its parts have 17"),
    (rewritten(lambda table: table.slice(1), rows=17), "shard 2: 17 rows are not 18 embedded + 0 failed"),
    (rewritten(lambda table: table.slice(1), rows=17, embedded=17), "rows_out = 60 and the shards have 59"),
    (rewritten(swapped), "1 ids are repeated, and manifest.json says 0"),
    (rewritten(lambda table: table.replace_schema_metadata(None)), "{part} is of model None, and the output of"),
    (without_its_ledger, "shard 2 is missing"),
    (ledger_cut_short, "ledger/shard-000002.json is damaged"),
    (foreign_part, "rows/part-000009-0000.parquet belongs to no shard"),
    (half_a_part, "rows/part-000002-0000-cccccccc.parquet.1234.partial belongs to no shard"),
    (foreign_shard, "shard 9 is of model ffffffffffffffff"),
]


@pytest.mark.ray
def test_verify_finds_every_fault(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(whole)]) == 0
    assert "4 shards, 4 parts: 60 rows, 60 embedded: all is well" in capsys.readouterr().out
    for number, (fault, said) in enumerate(FAULTS):
        out = tmp_path / str(number)
        shutil.copytree(whole, out)
        part = part_of(out, 2)
        fault(part)
        assert main(["verify", str(out)]) != 0, said
        printed = capsys.readouterr()
        assert said.format(part=part.name) in printed.out + printed.err


SLOW = [fault for fault, said in FAULTS[1:] if "repeated" not in said]  # no shard is known to be at fault there


@pytest.mark.ray
@pytest.mark.parametrize("fault", [flipped, *(pytest.param(fault, marks=pytest.mark.slow) for fault in SLOW)])
def test_repair_mends_a_fault_and_nothing_else(
    fault: Callable[[Path], None], whole: Path, tmp_path: Path, tiny_model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_plan, "GROUP_PIECES", 3)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    fault(part_of(out, 2))
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("rows/part-00000[013]-*.parquet")}
    manifest = embed(tiny_model_dir, str(whole.parent / "items.jsonl"), str(out), CONFIG, repair=True)
    assert (manifest.rows_out, manifest.resumed) in ((ROWS, ROWS - 18), (ROWS, ROWS))
    assert len(times) == 3 and all((out / "rows" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert len(list(out.glob("rows/*"))) == 4 and len(list(out.glob("ledger/*"))) == 4
    assert_same(out, whole)
    assert not verify_embeddings(str(out)).faults


@pytest.mark.slow
@pytest.mark.ray
def test_repeated_ids_are_counted_by_shuffles_too(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledgers, folder = read_ledgers(Folder.at(whole)), tmp_path / "out"
    shutil.copytree(whole, folder)
    part = pq.read_table(part_of(folder, 1))
    pq.write_table(pa.concat_tables([part, part.slice(0, 5)]), part_of(folder, 1))
    assert repeated_ids(Folder.at(folder), ledgers) == 5
    monkeypatch.setattr(verifying, "_HERE_IDS", 0)
    monkeypatch.setattr(ray_tasks, "_IDS_PER_CPU", 10)
    assert repeated_ids(Folder.at(folder), ledgers) == 5


@pytest.mark.ray
def test_an_output_of_before_is_read_and_not_continued(whole: Path, tmp_path: Path, tiny_model_dir: str) -> None:
    """Its parts stand beside ``plan.json``."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for part in (out / "rows").iterdir():
        part.rename(out / part.name)
    for file in [*(out / "ledger").iterdir(), out / "plan.json"]:
        found = json.loads(file.read_text().replace("rows/part-", "part-"))
        found.get("settings", {}).pop("output_format", None)
        file.write_text(json.dumps(found))
    assert verify_embeddings(str(out)).faults == () and survey(Folder.at(out)).rows == ROWS
    with pytest.raises(ConfigError, match="is of an older crem, whose parts stand beside plan.json"):
        embed(tiny_model_dir, str(whole.parent / "items.jsonl"), str(out), CONFIG)


@pytest.mark.ray
def test_a_second_job_on_one_output_is_refused(whole: Path, tmp_path: Path, tiny_model_dir: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Folder.at(out).claim(JobKind.EMBED)
    with Lease.take(Folder.at(out), JobKind.EMBED), pytest.raises(ConfigError, match="is in use by"):
        embed(tiny_model_dir, str(whole.parent / "items.jsonl"), str(out), CONFIG)


def test_batches_by_length() -> None:
    assert list(batches_by_length([5, 1, 3, 9, 2], 2, 1000)) == [[1, 4], [2, 0], [3]]
    assert list(batches_by_length([5, 1, 3, 9, 2], 10, 10)) == [[1, 4, 2], [0], [3]]
    assert list(batches_by_length([50], 10, 10)) == [[0]], "one item may have more"
    assert list(batches_by_length([], 10, 10)) == []


def test_a_batch_that_does_not_fit_is_halved(tiny_model_dir: str) -> None:
    model = crem.load(tiny_model_dir)
    plan = EmbedPlan(
        identity="i", fingerprint=model.fingerprint, dim=model.dim, model=tiny_model_dir, source="s", files=1, bytes=1,
        settings={}, row_bytes=4 * model.dim,
    )  # fmt: skip
    stamp = schema.EmbeddingStamp(model.fingerprint, model.dim, tiny_model_dir)
    attempts = Attempts(Folder.at("/nowhere"), "run", 2, 256)
    embedder = WindowEmbedder(Folder.at("/nowhere"), plan, schema.embeddings(stamp), attempts, CONFIG.embed)
    sequences = [model.prepare(f"item {i}") for i in range(9)]
    expected, encode = model.embed(["item 3"])[0], embedder.model.model.encode
    sizes: list[int] = []

    def small(batch: Any) -> Any:
        sizes.append(batch.segments.numel())
        if batch.segments.numel() > 90:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return encode(batch)

    embedder.model.model.encode = small  # type: ignore[method-assign]
    assert np.abs(embedder._encoded(sequences).vectors[3] - expected).max() < 1e-5
    assert max(sizes) > 90 and embedder.batch_tokens <= 128
