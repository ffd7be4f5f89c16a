"""An embedding output with a damaged part: named, and repaired by embedding again; through the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.conftest import part_of, table, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def crem(*words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "crem.cli", *words], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zeros_in_the_middle(data: bytes) -> bytes:
    """The footer stays, the columns do not."""
    return data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :]


def one_bit(data: bytes) -> bytes:
    at = len(data) // 3
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [half, zeros_in_the_middle, one_bit])
def test_a_damaged_part_is_named_and_embedded_again(tmp_path: Path, tiny_model_dir: str, damage) -> None:  # type: ignore[no-untyped-def]
    write_rows(tmp_path / "items.parquet", [{"id": i, "text": f"item {i}"} for i in range(600)])
    embed = ("embed", str(tmp_path / "items.parquet"), "--model", tiny_model_dir, "--out", str(tmp_path / "vectors"))
    code, output = crem(*embed)
    assert code == 0, output
    before = table(tmp_path / "vectors")
    part = part_of(tmp_path / "vectors", 0)
    part.write_bytes(damage(part.read_bytes()))
    code, output = crem("index", str(tmp_path / "vectors"), "--out", str(tmp_path / "index"))
    assert code == 2 and f"{part.name} cannot be read" in output and "--repair" in output, output
    assert "bug in crem" not in output
    assert crem("verify", str(tmp_path / "vectors"))[0] == 1
    code, output = crem(*embed, "--repair")
    assert code == 0 and f"{part.name} has" in output and "rows in 600 = embedded 600" in output, output
    assert table(tmp_path / "vectors") == before


def test_a_damaged_index_or_plan_is_named_and_a_missing_part_is_missed(tmp_path: Path, tiny_model_dir: str) -> None:
    write_rows(tmp_path / "items.parquet", [{"id": i, "text": f"item {i}"} for i in range(600)])
    vectors, index = tmp_path / "vectors", tmp_path / "index"
    embed = ("embed", str(tmp_path / "items.parquet"), "--model", tiny_model_dir, "--out", str(vectors))
    indexing = ("index", str(vectors), "--out", str(index))
    search = ("search", "item 5", "--index", str(index), "-k", "1")
    assert crem(*embed)[0] == 0 and crem(*indexing)[0] == 0

    def refused(words: tuple[str, ...], says: str) -> None:
        code, output = crem(*words)
        assert code == 2 and says in output and "Traceback" not in output, output

    (rows,) = (index / "vectors.lance" / "data").iterdir()
    whole = rows.read_bytes()
    for damage in (half, zeros_in_the_middle):
        rows.write_bytes(damage(whole))
        refused(search, f"the index {str(index)!r} is damaged: ")
    rows.write_bytes(whole)
    assert crem(*search)[0] == 0
    part = part_of(vectors, 0)
    part.rename(tmp_path / "part")
    refused(indexing, f"{part} cannot be read")
    (tmp_path / "part").rename(part)
    (vectors / "plan.json").write_text("{")
    refused(embed, f"{vectors}/plan.json is damaged, or of an older crem; give --fresh")
    assert part.exists(), "the refusal costs no part"
