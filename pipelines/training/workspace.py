"""A node's folder on local disk for one start of the workers: what checkpoints are read from and written to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["close_workspace", "is_node_leader", "open_workspace"]

_LEADER = "leader"


def open_workspace(run: str, node: str, attempt: str) -> Path:
    """Make this start's folder; what earlier, killed starts left is removed.

    Args:
        run: names the run and its output, to which only one process writes at a time.
    """
    key = hashlib.sha256(run.encode()).hexdigest()[:16]
    root = Path(tempfile.gettempdir()) / f"crem-train-{os.getuid()}-{key}" / node[:16]
    root.mkdir(parents=True, exist_ok=True)
    for earlier in root.iterdir():
        if earlier.name != attempt:
            shutil.rmtree(earlier, ignore_errors=True)
    (root / attempt).mkdir(exist_ok=True)
    return root / attempt


def is_node_leader(workspace: Path) -> bool:
    """Whether this process is the first of its node to ask. (Ray's local ranks count by address, and two nodes may have
    the same.)"""
    try:
        (workspace / _LEADER).mkdir()
    except FileExistsError:
        return False
    return True


def close_workspace(workspace: Path) -> None:
    """Remove the folder and those above it if they are empty: the last rank of a node leaves nothing behind."""
    for folder in (workspace / _LEADER, workspace, *workspace.parents[:2]):
        with contextlib.suppress(OSError):
            folder.rmdir()
