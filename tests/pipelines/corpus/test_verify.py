"""``crem verify``: good tables pass, and each fault that is planted is found and named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.config import load_config
from pipelines.corpus import verify as module
from pipelines.corpus.prepare import prepare
from pipelines.corpus.verify import verify
from pipelines.tables import ray_tasks
from tests.pipelines.conftest import write_nasty_corpus

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    limits = ["prepare.max_text_chars=200", "model.image.max_images_per_item=4"]
    prepare(str(write_nasty_corpus(folder / "nasty")), str(folder / "out"), load_config("micro", limits))
    return folder / "out"


def only(folder: Path) -> Path:
    (part,) = folder.iterdir()
    return part


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Another content under the same name, and in the list of parts as if it had been written so."""
    pq.write_table(change(pq.read_table(path)), path)
    (listed,) = path.parents[1].glob("files-*.parquet")
    files = pq.read_table(listed).to_pylist()
    data = path.read_bytes()
    for file in files:
        if (file["table"], file["name"]) == (path.parent.name, path.name):
            file |= {"bytes": len(data), "checksum": hashlib.blake2b(data, digest_size=16).hexdigest()}
            file["rows"] = pq.read_metadata(path).num_rows
    pq.write_table(pa.Table.from_pylist(files, schema=pq.read_schema(listed)), listed)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))


def edited(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"rows_out": manifest["rows_out"] - 1}))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a dropped row": (
        lambda out: rewrite(only(out / "rows"), lambda t: t.slice(1)),
        "says rows_out = 14 and the tables have 13",
    ),
    "a doubled row": (
        lambda out: rewrite(only(out / "rows"), lambda t: pa.concat_tables([t, t.slice(3, 1)])),
        r"rows/part-000000-\w+\.parquet has the row id -?\d+ 2 times",
    ),
    "a dropped image": (
        lambda out: rewrite(only(out / "images"), lambda t: t.slice(1)),
        r"rows/part-000000-\w+\.parquet names the image -?\d+, which is not there",
    ),
    "a changed image": (
        lambda out: rewrite(
            only(out / "images"),
            lambda t: t.set_column(1, t.schema.field(1), pa.array([b"x", *t["bytes"].to_pylist()[1:]])),
        ),
        r"images/part-000000-\w+\.parquet: the id of image -?\d+ is not the hash of its bytes",
    ),
    "a dropped rejection": (
        lambda out: rewrite(only(out / "rejected"), lambda t: t.slice(1)),
        "says rejected = 28 and the tables have 27",
    ),
    "a flipped byte of an image": (
        lambda out: flipped(only(out / "images")),
        r"images/part-000000-\w+\.parquet is damaged",
    ),
    "a flipped byte of rows": (lambda out: flipped(only(out / "rows")), r"rows/part-000000-\w+\.parquet is damaged"),
    "a missing part": (lambda out: only(out / "images").unlink(), r"images/part-000000-\w+\.parquet is missing"),
    "a foreign part": (
        lambda out: shutil.copy(only(out / "rows"), out / "rows" / "part-000009-other.parquet"),
        r"rows/part-000009-other\.parquet does not belong to the tables",
    ),
    "an edited manifest": (
        lambda out: edited(out / "manifest.json"),
        "manifest.json says rows_out = 13 and the tables",
    ),
    "another list of parts": (
        lambda out: rewrite(only(out / "rejected"), lambda t: t),
        r"files-\w+\.parquet is not the list of parts with which manifest\.json was written",
    ),
}


def test_good_tables_pass(good: Path) -> None:
    found = verify(str(good))
    assert found.faults == ()
    assert (found.parts, found.rows, found.images, found.rejected) == (3, 14, 8, 28)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(good: Path, tmp_path: Path, fault: str) -> None:
    plant, says = FAULTS[fault]
    shutil.copytree(good, tmp_path / "out")
    plant(tmp_path / "out")
    found = verify(str(tmp_path / "out"))

    assert any(re.search(says, line) for line in found.faults), found.faults


def test_the_shuffle_finds_the_same(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(good, tmp_path / "out")
    rewrite(only(tmp_path / "out" / "rows"), lambda t: pa.concat_tables([t, t.slice(3, 2)]))
    rewrite(only(tmp_path / "out" / "images"), lambda t: t.slice(2))
    here = verify(str(tmp_path / "out"))
    monkeypatch.setattr(module, "_HERE_IDS", 0)
    monkeypatch.setattr(ray_tasks, "_IDS_PER_CPU", 3)
    assert verify(str(tmp_path / "out")).faults == here.faults
    assert sum("which is not there" in line for line in here.faults) == 2
