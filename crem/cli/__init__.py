"""The ``crem`` command: the composition root, the one folder of ``crem`` that imports the other packages (lazily)."""

from __future__ import annotations

from crem.cli.entry import main

__all__ = ["main"]
