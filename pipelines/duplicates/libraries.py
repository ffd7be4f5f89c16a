"""The optional libraries of this room, and an error that says how to install them."""

from __future__ import annotations

import importlib
from types import ModuleType

from crem.errors import ConfigError

__all__ = ["library"]


def library(name: str, setting: str) -> ModuleType:
    """The module ``name``, which ``setting`` needs.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{setting} needs the Python package {name!r}, which is not installed ({error}); install it on every node "
            "with: pip install 'crem[curate]'"
        ) from error
