"""The wheel: what package-data names exists, and every data file in the packages is named."""

from __future__ import annotations

import glob
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE_DATA: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
    "package-data"
]


def matched(package: str, pattern: str) -> set[str]:
    """Files of a package, relative to it, that a glob names; ``**`` takes files too, as in setuptools."""
    found = glob.glob(pattern, root_dir=ROOT / package, recursive=True)
    return {name for name in found if (ROOT / package / name).is_file()}


@pytest.mark.parametrize("package", PACKAGE_DATA)
def test_every_glob_matches_a_file(package: str) -> None:
    assert [pattern for pattern in PACKAGE_DATA[package] if not matched(package, pattern)] == []


@pytest.mark.parametrize("package", PACKAGE_DATA)
def test_every_data_file_is_packaged(package: str) -> None:
    """But for what people read in the repository: pages, pictures, results of the ablation."""
    named = {name for pattern in PACKAGE_DATA[package] for name in matched(package, pattern)}
    files = [path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*") if path.is_file()]
    data = [f for f in files if f.suffix not in {".py", ".pyc", ".md", ".png"} and "results" not in f.parts]
    assert sorted({f.as_posix() for f in data} - named) == []
