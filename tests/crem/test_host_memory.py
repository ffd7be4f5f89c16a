"""Free memory: the machine's and the container's, whichever is less."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from crem.host_memory import available_bytes

MIB = 1 << 20


def cgroup(folder: Path, version: int, limit: str, used: int, stat: str = "") -> Path:
    inner = folder if version == 2 else folder / "memory"
    inner.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (inner / name).write_text(f"{value}\n")
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(tmp_path: Path, version: int) -> None:
    assert available_bytes(cgroup(tmp_path, version, str(30 * MIB), 20 * MIB)) == 10 * MIB
    assert available_bytes(cgroup(tmp_path, version, str(30 * MIB), 40 * MIB)) == 0
    prefix = "total_" if version == 1 else ""
    stat = f"{prefix}inactive_file {3 * MIB}\n{prefix}active_file {4 * MIB}\nshmem {5 * MIB}"
    assert available_bytes(cgroup(tmp_path, version, str(30 * MIB), 20 * MIB, stat)) == 17 * MIB, "page cache is free"


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "no number"])
@pytest.mark.parametrize("version", [1, 2])
def test_without_a_limit_it_is_the_machines(
    tmp_path: Path, version: int, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = psutil.virtual_memory()._replace(available=7 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert available_bytes(tmp_path / "none") == 7 * MIB
    assert available_bytes(cgroup(tmp_path, version, limit, 20 * MIB)) == 7 * MIB
