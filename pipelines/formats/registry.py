"""The formats that are known, in the order in which they are tried."""

from __future__ import annotations

from crem.errors import ConfigError
from pipelines.formats.format import Format
from pipelines.formats.own import OwnRows

__all__ = ["FORMATS", "format_named"]

FORMATS: tuple[Format, ...] = (OwnRows(),)


def format_named(name: str) -> Format:
    """The format of a name.

    Raises:
        ConfigError: there is none.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    raise ConfigError(f"no format is named {name!r}; known are {', '.join(f.name for f in FORMATS)}")
