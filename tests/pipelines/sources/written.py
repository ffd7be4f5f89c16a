"""Writes small corpora, and reads any corpus back through the sources."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.sources import sources
from pipelines.sources.records import RawRecord, RowRange, SourceRow


def write(folder: Path, files: dict[str, bytes]) -> str:
    """The files in a folder; returns its path."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def tar(members: Sequence[tuple[str, bytes | None]], style: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of files; ``None`` makes a folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=style) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data or b"")
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            archive.addfile(info, io.BytesIO(data or b""))
    return out.getvalue()


def ranges_of(place: str, rows: int = 3) -> list[RowRange]:
    return list(sources.split(sources.find(place), None, rows))


def rows_of(place: str, rows: int = 3) -> list[SourceRow]:
    """Every row, read range by range; each range must give as many as it says."""
    return [row for part in ranges_of(place, rows) for row in sources.read(part)]


def records_of(place: str, rows: int = 3) -> list[RawRecord | None]:
    return [row.record for row in rows_of(place, rows)]
