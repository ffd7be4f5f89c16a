"""JSON files that one job writes and others read: each is a typed record, and its fields are the keys on disk."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from crem.errors import ConfigError
from pipelines.tables.storage import Folder

__all__ = ["JsonFile"]

_FORMAT = 1


class JsonFile(BaseModel):
    """A JSON file at the top of a job's folder. Keys that this version does not know are ignored."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    FILE: ClassVar[str]
    """Name of the file."""
    format: int = _FORMAT
    """Version of the layout; a file without this key has version 1."""

    @classmethod
    def read(cls, folder: Folder) -> Self | None:
        """The content of the file, or ``None`` where it is missing, damaged or of another kind.

        Raises:
            ConfigError: access to the file is denied, or a newer crem wrote it.
        """
        content = folder.read_json(cls.FILE)
        version = content.get("format") if isinstance(content, dict) else None
        if isinstance(version, int) and version > _FORMAT:
            raise ConfigError(
                f"{folder.uri}/{cls.FILE} has format {version}; this version reads {_FORMAT}: install a newer crem"
            )
        try:
            return cls.model_validate(content)
        except ValidationError:
            return None

    def write(self, folder: Folder) -> None:
        """Write the file in one piece."""
        folder.write_json(self.model_dump(mode="json"), self.FILE)
