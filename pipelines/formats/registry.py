"""The formats that are known, in the order in which they are tried."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from crem.errors import ConfigError
from pipelines.formats.chat_messages import ChatMessages, SwiftPairs
from pipelines.formats.format import Format
from pipelines.formats.imagefolder import ImageFolder
from pipelines.formats.llava import Llava
from pipelines.formats.mmeb import MmebEval, MmebTrain
from pipelines.formats.own import OwnRows
from pipelines.formats.table import ImageTable, TextTable
from pipelines.formats.webdataset import WebDataset
from pipelines.sources.records import RawRecord

__all__ = ["FORMATS", "format_named", "matching_formats"]

DISTINCT: tuple[Format, ...] = (
    OwnRows(),
    MmebTrain(),
    MmebEval(),
    SwiftPairs(),
    ChatMessages(),
    Llava(),
    WebDataset(),
)
"""Formats with column names of their own. A table that matches two of them is refused."""
FALLBACKS: tuple[Format, ...] = (ImageFolder(), ImageTable(), TextTable())
"""Formats with names that many use, tried one after the other where no distinct one matches."""
FORMATS: tuple[Format, ...] = (*DISTINCT, *FALLBACKS)


def format_named(name: str) -> Format:
    """The format of a name.

    Raises:
        ConfigError: there is none.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    names = [f.name for f in FORMATS]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"no format is named {name!r}; {hint}Known are auto, {', '.join(names)}")


def matching_formats(columns: frozenset[str], records: Sequence[RawRecord]) -> list[Format]:
    """The formats of a table with these columns: one, several distinct ones if it is ambiguous, or none."""
    distinct = [known for known in DISTINCT if known.matches(columns, records)]
    if distinct:
        return distinct
    return [known for known in FALLBACKS if known.matches(columns, records)][:1]
