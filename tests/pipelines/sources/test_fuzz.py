"""Files of every container with bytes changed, removed and repeated: an error that names the file, or rows.

A change may cost rows only where it stands: whatever is read has the count that was split, and takes bounded time.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.errors import ConfigError
from pipelines.sources import sources
from tests.pipelines.sources.written import tar

ROWS = [{"id": i, "text": f'a "quoted", text {i}\n☃', "images": ["1.jpg"]} for i in range(60)]
_MOST_BYTES = 64 * 2**20
_MOST_SECONDS = 20.0


def _containers() -> dict[str, bytes]:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    table = pa.Table.from_pylist(ROWS)
    parquet = io.BytesIO()
    pq.write_table(table, parquet, row_group_size=20)
    csv = "id,text\n" + "".join(f'{row["id"]},"a ""quoted"", text\n☃"\n' for row in ROWS)
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(20)]
    captions = [{"id": i, "image_id": i % 20, "caption": "c"} for i in range(60)]
    members = [
        (f"{i}.{e}", d) for i in range(20) for e, d in (("json", b'{"a": 1}'), ("jpg", b"\xff" * 40), ("txt", b"t"))
    ]
    return {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": pa.Codec("zstd").compress(lines, asbytes=True),
        "a.json": json.dumps(ROWS, ensure_ascii=False).encode(),
        "coco.json": json.dumps({"images": images, "annotations": captions}).encode(),
        "a.csv": csv.encode(),
        "a.tsv": csv.replace(",", "\t").encode(),
        "a.tar": tar(members),
        "a.tar.gz": gzip.compress(tar(members)),
        "a.parquet": parquet.getvalue(),
    }


def _mutated(data: bytes, random_: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 8))):
        at, size = random_.randrange(len(changed) or 1), random_.choice((1, 1, 4, 100, 3000))
        kind = random_.randrange(5)
        if kind == 0:
            changed[at : at + size] = random_.randbytes(min(size, len(changed) - at))
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2:
            changed[at:at] = changed[at : at + size]
        elif kind == 3:
            changed[at:at] = random_.choice(
                (b'"', b"\n", b"\0", b"{", b"[" * 2000, b"\xff", b"\\", b",", b"\r", b"NaN")
            )
        else:
            del changed[at:]
    return bytes(changed)


def _read_all(place: str) -> tuple[int, int]:
    """(good, bad) rows; ``sources.read`` itself refuses a range of another count."""
    good = bad = 0
    for part in list(sources.split(sources.find(place), None, 7)):
        for row in sources.read(part):
            good, bad = good + (row.record is not None), bad + bool(row.parse_error)
    return good, bad


def _fuzz(folder: Path, name: str, data: bytes, rounds: int, seed: int) -> Counter[str]:
    random_ = random.Random(f"{name}{seed}")
    outcomes: Counter[str] = Counter()
    path = folder / name
    for round_ in range(rounds):
        path.write_bytes(_mutated(data, random_))
        began = time.monotonic()
        try:
            good, bad = _read_all(str(path))
            outcomes["bad rows" if bad else "rows" if good else "none"] += 1
        except ConfigError as error:
            assert name in str(error) and len(str(error)) < 2000, (name, seed, round_, error)
            outcomes["refused"] += 1
        assert time.monotonic() - began < _MOST_SECONDS, (name, seed, round_)
    return outcomes


@pytest.mark.parametrize("name", _containers())
def test_mutated_files(tmp_path: Path, name: str) -> None:
    assert _fuzz(tmp_path, name, _containers()[name], 20, 0).total() == 20


@pytest.mark.slow
def test_a_thousand_mutated_files_do_not_grow(tmp_path: Path) -> None:
    containers = _containers()
    for name, data in containers.items():  # once before, for what is loaded or cached once
        _fuzz(tmp_path, name, data, 5, 1)
    tracemalloc.start()
    for name, data in containers.items():
        _fuzz(tmp_path, name, data, 100, 2)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < _MOST_BYTES and kept < _MOST_BYTES / 4, (kept, peak)


@pytest.mark.slow
def test_mutated_lance_datasets(tmp_path: Path) -> None:
    random_ = random.Random(5)
    for round_ in range(60):
        place = tmp_path / f"{round_}.lance"
        lance.write_dataset(pa.Table.from_pylist(ROWS), str(place), max_rows_per_file=20)
        files = sorted(path for path in place.rglob("*") if path.is_file())
        path = random_.choice(files)
        path.write_bytes(_mutated(path.read_bytes(), random_))
        try:
            assert sum(_read_all(str(place))) <= len(ROWS)
        except ConfigError as error:
            assert place.name in str(error)
