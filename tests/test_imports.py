"""Imports run one way, and nothing reaches into the private parts of Ray.

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


def modules() -> list[Path]:
    return sorted(path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py"))


def test_imports_run_one_way() -> None:
    found = [
        violation
        for path in modules()
        for violation in violations(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n" + "\n".join(found)


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
        ("crem/cli/jobs.py", "import ray._private.worker"),
        ("tests/test_x.py", "from ray._private.test_utils import wait_for_condition"),
    ],
)
def test_the_checker_finds(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "crem/cli/jobs.py",
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
