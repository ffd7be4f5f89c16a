"""Where a rank can stand within a step, in their order. Apart, because a watcher needs these names and no torch."""

from __future__ import annotations

__all__ = ["PHASES"]

PHASES = ("waiting for rows", "forward and backward", "validation", "checkpoint")
