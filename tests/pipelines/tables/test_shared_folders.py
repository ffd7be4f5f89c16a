"""A cluster whose nodes do not share the disk: local folders are refused before any work, by every job.

The second node runs in a mount namespace of its own in which the folder is another, empty file system.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from tests.pipelines.conftest import write_rows

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux mount namespaces"),
]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(seen by all nodes, seen by the head alone), each with a corpus."""
    shared, own = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("own")
    for folder in (shared, own):
        write_rows(
            folder / "corpus" / "rows" / "a.parquet", [{"query_text": f"q{i}", "target_text": "t"} for i in range(4)]
        )
        write_rows(folder / "items.parquet", [{"id": i, "text": f"item {i}"} for i in range(4)])
    return shared, own


@pytest.fixture(scope="module")
def apart(folders: tuple[Path, Path]) -> Iterator[LocalCluster]:
    with LocalCluster(nodes=2) as cluster:
        hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(folders[1])]
        cluster.add_node(prefix=hidden)
        yield cluster


def crem(cluster: LocalCluster, *words: str) -> tuple[int, str]:
    done = cluster.run([sys.executable, "-m", "crem.cli", *words], cwd=ROOT, timeout_s=240)
    return done.returncode, done.stdout + done.stderr


def test_local_folders_that_a_node_does_not_see_are_refused(
    apart: LocalCluster, folders: tuple[Path, Path], tiny_model_dir: str
) -> None:
    shared, own = folders
    vectors = str(shared / "vectors")
    code, output = crem(apart, "embed", str(shared / "items.parquet"), "--model", tiny_model_dir, "--out", vectors)
    assert code == 0 and "rows in 4 = embedded 4" in output, output
    for words in (
        ("embed", str(shared / "items.parquet"), "--model", tiny_model_dir, "--out", str(own / "vectors")),
        ("prepare", str(shared / "corpus"), "--out", str(own / "prepared")),
        ("index", vectors, "--out", str(own / "index")),
    ):
        code, output = crem(apart, *words)
        assert code == 2 and "does not see" in output and "s3://" in output, output
        left = Path(words[-1]).iterdir() if Path(words[-1]).exists() else ()
        assert {path.name for path in left} <= {"_crem.json"}, "nothing but the claim"
    for words in (
        ("embed", str(own / "items.parquet"), "--model", tiny_model_dir, "--out", str(shared / "vectors2")),
        ("prepare", str(own / "corpus"), "--out", str(shared / "prepared")),
    ):
        code, output = crem(apart, *words)
        assert code == 2 and "from which its workers would read" in output, output


def test_all_that_workers_read_is_looked_for(
    apart: LocalCluster, folders: tuple[Path, Path], tiny_model_dir: str
) -> None:
    """A shared corpus in ``rows/`` goes on working; a run, a model and tables that a node does not see are refused."""
    shared, own = folders
    tables, model, items = str(shared / "tables"), str(own / "model"), str(shared / "items.parquet")
    code, output = crem(apart, "prepare", str(shared / "corpus"), "--out", tables)
    assert code == 0 and "rows in 4 = out 4" in output, output
    shutil.copytree(tiny_model_dir, model)
    shutil.copytree(tables, own / "tables")
    nowhere = str(shared / "nowhere")
    for words, says in (
        (("embed", items, "--model", model, "--out", nowhere), f"{model}, from which its workers would read"),
        (("train", tables, "--out", str(own / "run"), "--preset", "micro"), f"{own}/run; give --out a path"),
        (("train", str(own / "tables"), "--out", nowhere, "--preset", "micro"), f"{own}/tables/rows, from which"),
    ):
        code, output = crem(apart, *words)
        assert code == 2 and says in output and "Traceback" not in output, output
