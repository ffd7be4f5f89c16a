"""The prompt of ``crem synthesise``: a file that a reader can see, filled in with one row.

The file is named by ``synthesise.prompt``; its name and the hash of its bytes go with every answer, so that the data
of two prompts can be told apart. The images come first, as in the model that is trained; where they stand between the
words of the row, its text says so: ``[image 1]``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from crem.data.images import encode_image
from crem.errors import ConfigError
from pipelines.tables.schema import ArrowRow

__all__ = ["Message", "QuestionPrompt", "data_url", "kinds_of_row"]

Message = dict[str, Any]
"""A message of OpenAI's chat format."""

_SHIPPED = Path(__file__).parent / "prompts"


class _TaskLines(BaseModel):
    model_config = ConfigDict(extra="forbid")

    instruction: str
    text: str


class _PromptFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    system: str
    user: str
    task: _TaskLines
    kinds: dict[str, str]


@dataclass(frozen=True)
class QuestionPrompt:
    """A prompt file and its identity."""

    name: str
    """``grounded-1``; of a file of the user's, its name without the suffix."""
    digest: str
    """16 hexadecimal digits of the hash of the file's bytes."""
    system: str
    user: str
    instruction_line: str
    text_line: str
    kinds: dict[str, str]
    """What each kind of question asks for."""

    @classmethod
    def load(cls, name: str, wanted: Sequence[str]) -> QuestionPrompt:
        """The shipped prompt of this name, or the one in this file; ``wanted`` are the kinds to be used.

        Raises:
            ConfigError: there is no such prompt, it is not of the right form, or it does not explain a wanted kind.
        """
        shipped = sorted(path.stem for path in _SHIPPED.glob("*.yaml"))
        path = _SHIPPED / f"{name}.yaml" if name in shipped else Path(name)
        try:
            data = path.read_bytes()
            file = _PromptFile.model_validate(yaml.safe_load(data))
            for text in (file.system, file.user, file.task.instruction, file.task.text):
                _check_template(text)
        except FileNotFoundError:
            raise ConfigError(
                f"synthesise.prompt={name!r} is neither a shipped prompt ({', '.join(shipped)}) nor a file"
            ) from None
        except (OSError, yaml.YAMLError, ValidationError, ValueError) as error:
            raise ConfigError(
                f"the prompt {os.fspath(path)!r} cannot be used: {error}; begin with a copy of "
                f"{_SHIPPED}/grounded-1.yaml"
            ) from error
        if unknown := [kind for kind in wanted if kind not in file.kinds]:
            raise ConfigError(
                f"synthesise.kinds names {unknown[0]!r}, which the prompt {name!r} does not explain; it explains "
                f"{', '.join(file.kinds)}"
            )
        digest = hashlib.blake2b(data, digest_size=8).hexdigest()
        return cls(path.stem, digest, file.system, file.user, file.task.instruction, file.task.text, dict(file.kinds))

    def messages(
        self, query: ArrowRow, kinds: Sequence[str], image: Callable[[int], bytes], max_pixels: int
    ) -> list[Message]:
        """The conversation that asks for one pair of each of ``kinds`` about a query.

        Args:
            query: a value of ``schema.ITEM``.
            image: encoded bytes of an image by its id.
            max_pixels: larger images are reduced to this area.
        """
        text, instruction = _marked_text(query).strip(), (query["instruction"] or "").strip()
        lines = []
        if instruction:
            lines.append(Template(self.instruction_line).substitute(instruction=instruction))
        if text:
            lines.append(Template(self.text_line).substitute(text=text))
        user = Template(self.user).substitute(
            task="\n".join(lines),
            questions=len(kinds),
            kinds="\n".join(f"{number}. {kind}: {self.kinds[kind]}" for number, kind in enumerate(kinds, 1)),
        )
        images = [
            {"type": "image_url", "image_url": {"url": data_url(image(i), max_pixels)}} for i in query["images"] or ()
        ]
        return [
            {"role": "system", "content": self.system.strip()},
            {"role": "user", "content": [*images, {"type": "text", "text": user.strip()}]},
        ]


def kinds_of_row(row_id: int, kinds: Sequence[str], questions: int) -> tuple[str, ...]:
    """The kinds that a row is asked for: they take turns over the rows, and do not depend on the rows' order."""
    return tuple(kinds[(row_id + i) % len(kinds)] for i in range(questions))


def data_url(data: bytes, max_pixels: int) -> str:
    """An encoded image as a ``data:`` URL; as it is where it is small enough, else reduced to ``max_pixels``."""
    with Image.open(io.BytesIO(data)) as image:
        kind = (image.format or "png").lower()
        if image.width * image.height > max_pixels:
            data = encode_image(image.convert("RGB"), max_pixels)[0]
            kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _marked_text(query: ArrowRow) -> str:
    """The text of a query, with a mark at the place of each image that stands inside it."""
    text, begin, pieces = query["text"] or "", 0, []
    for number, end in enumerate(query["image_at"] or (), 1):
        pieces += [text[begin:end], f"[image {number}]"]
        begin = end
    return "".join([*pieces, text[begin:]])


def _check_template(text: str) -> None:
    if not Template(text).is_valid():
        raise ValueError("a $ that is not a placeholder; write $$ for a dollar sign")
    known = {"task", "questions", "kinds", "instruction", "text"}
    if unknown := sorted(set(Template(text).get_identifiers()) - known):
        raise ValueError(f"unknown placeholder ${unknown[0]}; known are {', '.join(sorted(known))}")
