"""Imports run one way, between packages and between the rooms of each; nothing reaches into the private parts of Ray.

A room is a folder of a package, or a module beside the folders. ``ROWS`` orders the rooms; a room imports only rooms of
rows above its own, so there is no circle. CONTRIBUTING.md shows the rows as a picture, which this test keeps true:
``python -m tests.test_imports`` prints it.

Every module is parsed, so that an import inside a function, behind a condition or by ``importlib`` counts like any
other. ``crem/cli/`` is the composition root and may import the jobs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("crem", "pipelines", "serve", "cluster")
COMPOSITION_ROOT = "crem/cli/"
PRIVATE = {"_internal", "_private"}
ALLOWED = {"cluster": "crem.errors"}
"""The one module of a forbidden package that a package may import."""
FORBIDDEN = {
    # The model and its mathematics: no Ray, no HTTP server, no cloud SDK.
    "crem": {
        *{"pipelines", "serve", "cluster", "ray", "tests"},
        *{"fastapi", "starlette", "uvicorn", "s3fs", "boto3", "botocore", "lance", "lancedb"},
    },
    "pipelines": {"serve", "cluster", "tests"},
    "serve": {"pipelines", "cluster", "tests"},
    # Names the others by import string and command line; shares the errors.
    "cluster": {"crem", "pipelines", "serve", "tests"},
    "tests": set(),
}


ROWS = {
    "crem": (
        ("errors",),
        ("config", "distributed", "fetch", "host_memory", "metrics"),
        ("data", "losses"),
        ("model",),
        ("checkpoint", "forecast"),
        ("doctor", "inference", "train"),
        ("cli",),
    ),
    "pipelines": (
        ("tables",),
        ("sources", "emoji", "evaluation", "reports"),
        ("formats", "duplicates"),
        ("corpus",),
        ("embedding", "training", "synthesis"),
        ("search",),
        ("ablation", "mining"),
        ("demo",),
    ),
    "serve": (("engine", "protocol"), ("deployments", "translation"), ("routes",), ("app",)),
    "cluster": (("local", "submit"),),
}
"""Rooms of each package, from those that import no other to those that may import all."""


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import; ``from a import b`` gives ``a.b``, since b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE:
            yield node.lineno, ast.unparse(node)


def violations(source: str, path: str) -> list[str]:
    """What the module at ``path`` (relative to the repository) imports and must not, one line each."""
    package = path.split("/", 1)[0]
    forbidden = set() if path.startswith(COMPOSITION_ROOT) else FORBIDDEN[package]
    found = []
    for line, name in imported(source, package):
        first, *rest = name.split(".")
        if first in forbidden and not f"{name}.".startswith(f"{ALLOWED.get(package)}."):
            found.append(f"{path}:{line}: {package} must not import {name}")
        if first == "ray" and PRIVATE.intersection(rest):
            found.append(f"{path}:{line}: {name} is private to Ray")
    return found


def room_of(name: str) -> tuple[str, str] | None:
    """(package, room) of a dotted module name; None where it is of no room of ours."""
    package, _, below = name.partition(".")
    return (package, below.split(".")[0]) if package in ROWS and below else None


def arrows() -> set[tuple[str, str, str]]:
    """(package, room, room that it imports), within each package."""
    found = set()
    for path in modules():
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if here is None or here[1] == "__init__":
            continue
        for _, name in imported(path.read_text(encoding="utf-8"), here[0]):
            there = room_of(name)
            known = there is not None and there[1] in {room for row in ROWS[here[0]] for room in row}
            if there is not None and there[0] == here[0] and there != here and known:
                found.add((here[0], here[1], there[1]))
    return found


def picture() -> str:
    """The rooms of ``crem`` and ``pipelines`` as a Mermaid chart: rows of rooms, an arrow for each import.

    An arrow that a longer way implies is left out.
    """
    lines = ["```mermaid", "flowchart BT"]
    every = arrows()
    for package in ("crem", "pipelines"):
        lines.append(f"  subgraph {package}")
        direct = {(a, b) for p, a, b in every if p == package}
        lines += [f"    {package}_{room}[{room}]" for row in ROWS[package] for room in row]
        for a, b in sorted(direct):
            if not any(
                (a, via) in direct and reaches(direct, via, b) for via in {y for x, y in direct if x == a} - {b}
            ):
                lines.append(f"    {package}_{a} --> {package}_{b}")
        lines.append("  end")
    return "\n".join([*lines, "```"])


def reaches(direct: set[tuple[str, str]], start: str, goal: str) -> bool:
    return start == goal or any(reaches(direct, b, goal) for a, b in direct if a == start)


def modules() -> list[Path]:
    return sorted(path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py"))


def test_imports_run_one_way() -> None:
    found = [
        violation
        for path in modules()
        for violation in violations(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n" + "\n".join(found)


def test_every_room_has_a_row() -> None:
    for package, rows in ROWS.items():
        names = {p.stem for p in (ROOT / package).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
        assert names - {"__init__", "checkpoints"} == {room for row in rows for room in row}, package


def test_no_room_imports_one_of_its_own_row_or_of_a_later_one() -> None:
    row_of = {(package, room): i for package, rows in ROWS.items() for i, row in enumerate(rows) for room in row}
    backwards = [f"{p}.{a} imports {p}.{b}" for p, a, b in sorted(arrows()) if row_of[p, a] <= row_of[p, b]]
    assert not backwards, "\n" + "\n".join(backwards)


def test_the_picture_of_the_rooms_is_true() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert picture() in contributing, "run python -m tests.test_imports and put what it prints into CONTRIBUTING.md"


def test_every_package_was_looked_at() -> None:
    looked_at = {path.relative_to(ROOT).parts[0] for path in modules()}
    assert looked_at == {*PACKAGES, "tests"}


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without ``__init__.py`` works from a checkout and is missing from an installed wheel."""
    folders = {path.parent for path in modules() if path.relative_to(ROOT).parts[0] in PACKAGES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("crem/losses.py", "import ray"),
        ("crem/losses.py", "def f():\n    from ray.train import report"),
        ("crem/losses.py", "if True:\n    import numpy, pipelines.embedding.embed"),
        ("crem/losses.py", "try:\n    import fastapi\nexcept ImportError:\n    pass"),
        ("crem/model/crem.py", "import importlib\nimportlib.import_module('serve.app')"),
        ("pipelines/embedding/embed.py", "from serve.engine import Engine"),
        ("pipelines/embedding/embed.py", "import serve"),
        ("serve/engine.py", "def f():\n    import pipelines.search.index as index"),
        ("cluster/submit.py", "from crem import Item"),
        ("cluster/submit.py", "from crem.config import load_config"),
        ("cluster/submit.py", "import pipelines"),
        ("pipelines/embedding/embed.py", "from tests.conftest import tiny_config"),
        ("pipelines/embedding/embed.py", "from ray.data._internal.plan import ExecutionPlan"),
        ("pipelines/embedding/embed.py", "from ray import _private"),
        ("serve/app.py", "import ray\nray._private.services.get_node_ip_address()"),
        ("crem/cli/model_jobs.py", "import ray._private.worker"),
        ("tests/test_x.py", "from ray._private.test_utils import wait_for_condition"),
    ],
)
def test_the_checker_finds(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "crem/cli/model_jobs.py",
            "def f():\n    from pipelines.training import train\n    import serve.app, cluster.submit, ray",
        ),
        ("crem/model/crem.py", "from . import chorus\nfrom ..serve import x\nimport torch"),
        ("crem/a.py", "import raytracer, serveless"),
        ("crem/a.py", "'import ray'  # import ray"),
        ("pipelines/embedding/embed.py", "import crem\nimport ray.data\nfrom ray import serve"),
        ("pipelines/embedding/embed.py", "self._private = 1\nx._internal.y"),
        ("serve/app.py", "from ray import serve\nfrom crem.config import ServeConfig"),
        ("cluster/submit.py", "from crem.errors import CremError"),
        ("cluster/manifest.py", "IMPORT_PATH = 'serve.app:application'"),
        ("tests/test_x.py", "import crem, serve.app, pipelines.training.train, cluster.local, ray"),
    ],
)
def test_the_checker_allows(path: str, source: str) -> None:
    assert violations(source, path) == []


if __name__ == "__main__":
    print(picture())  # noqa: T201
