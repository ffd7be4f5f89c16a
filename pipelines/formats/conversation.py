"""Turns of a conversation about images to rows: one generation turn a row, with what came before as its query.

The images of a turn that begins or ends with them precede the text. Where they stand between the words, the lines up to
the last image belong to the query, which keeps their places, and the lines after it are the question. If no line
follows, the question repeats the turn and says ``image 1`` for the first image. A first question without an image is
its own query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crem.errors import ItemError
from pipelines.formats.cells import is_absent, is_blank, listed, parse_images, parse_text_value
from pipelines.formats.format import RowContext
from pipelines.formats.placeholders import MARK, ImageName, Parts, count_marks, joined, paths_in_marks, placed
from pipelines.formats.raw_rows import RawItem, RawRow
from pipelines.sources.records import RawRecord

__all__ = ["Turn", "conversation_item", "conversation_rows", "read_turns", "refuse_other_media"]

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_NO_ITEM = RawItem(None, (), None)


@dataclass(frozen=True)
class Turn:
    """What one side says, with marks where images stand."""

    role: str
    """``user``, ``assistant`` or ``system``."""
    text: str


def read_turns(value: Any, column: str, images: Sequence[ImageName]) -> tuple[list[Turn], tuple[ImageName, ...]]:
    """The turns of ``conversations`` (``from``, ``value``) or ``messages`` (``role``, ``content``), and all images.

    Content may be a list of parts, as in OpenAI's API; an image part without data is the one of ``images`` that its
    ``index`` says, or the next. Without ``images``, paths in marks are the images (Qwen-VL). Turns of one role that
    follow each other are one.

    Raises:
        ItemError: ``bad_row``, ``image_count`` or ``unsupported_media``.
    """
    value = listed(value)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(turn, dict) for turn in value):
        raise ItemError("bad_row", f"{column} is {repr(value)[:60]}; it must be a list of turns")
    contents = [turn.get("value", turn.get("content")) for turn in value]
    shown = _Shown(images, contents, column)
    turns: list[Turn] = []
    for number, (turn, content) in enumerate(zip(value, contents, strict=True)):
        name = turn.get("from", turn.get("role"))
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise ItemError("bad_row", f"{column}[{number}] is by {name!r}; known are {', '.join(_ROLES)}")
        text = shown.text_of(content, f"{column}[{number}]")
        if turns and turns[-1].role == role:
            text = "\n".join(filter(None, (turns.pop().text, text)))
        turns.append(Turn(role, text))
    return turns, shown.all()


class _Shown:
    """The images of a conversation, in the order in which its turns show them."""

    def __init__(self, images: Sequence[ImageName], contents: Sequence[Any], column: str):
        self._images = images
        parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
        named = {_index(part, len(images), column) for part in parts if _is_image(part)}
        self._waiting = [image for i, image in enumerate(images) if i not in named]
        """Those that no part names by its number."""
        self._found: list[ImageName] = []

    def text_of(self, content: Any, where: str) -> str:
        """A turn's text, with a mark for each image of its parts."""
        if not isinstance(content, list | tuple):
            return self._said(content, where)
        pieces = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind == "text":
                pieces.append(self._said(part.get("text") if isinstance(part, dict) else part, where))
            elif _is_image(part):
                self._found += self._images_of(part, where)
                pieces.append(MARK)
            else:
                raise ItemError(
                    "unsupported_media", f"{where} has a part of type {kind!r}; only text and images are read"
                )
        return "\n".join(pieces)

    def all(self) -> tuple[ImageName, ...]:
        """Those that were shown, and then those that no part shows."""
        return (*self._found, *self._waiting)

    def _said(self, value: Any, where: str) -> str:
        text = parse_text_value(value, where) or ""
        if not self._images:
            self._found += [name for name in paths_in_marks(text) if name not in self._found]
        return text

    def _images_of(self, part: dict[str, Any], where: str) -> Sequence[ImageName]:
        """What the part holds; else the image of its number; else the next one."""
        if inline := parse_images({k: v for k, v in part.items() if k not in _NOT_THE_IMAGE}, where):
            return inline
        if (index := _index(part, len(self._images), where)) is not None:
            return [self._images[index]]
        if not self._waiting:
            raise ItemError("image_count", f"{where} shows an image that the row does not hold; give it in images")
        return [self._waiting.pop(0)]


_NOT_THE_IMAGE = frozenset(
    {"type", "text", "index", "id", "uuid", "detail", "alt", "mime_type", "media_type", "cache_control"}
    | {"min_pixels", "max_pixels", "resized_height", "resized_width", "width", "height"}
)
"""Keys of an image part beside the image."""


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url", "input_image")


def _index(part: dict[str, Any], images: int, where: str) -> int | None:
    """Which of the row's images a part shows, from 0; ``None`` where it does not say."""
    value = part.get("index")
    if is_absent(value) or not images:
        return None
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, bool) or not isinstance(number, int):
        raise ItemError("bad_row", f"{where} shows an image by the index {value!r}; it must be a whole number, from 0")
    if not 0 <= number < images:
        raise ItemError(
            "image_count", f"{where} shows image {number}, and the row holds {images}, counted from 0; give that image"
        )
    return number


def refuse_other_media(record: RawRecord, columns: Sequence[str]) -> None:
    """Raise ``ItemError("unsupported_media")`` if a row holds video or sound, without which it says something else."""
    for column in columns:
        if record.get(column) and not is_blank(listed(record[column])):
            raise ItemError("unsupported_media", f"{column} is {repr(record[column])[:60]}; only images are read")


def conversation_rows(turns: Sequence[Turn], images: tuple[ImageName, ...], context: RowContext) -> list[RawRow]:
    """A row for each turn that is answered; one that is not is a row without an answer, which is then rejected.

    Raises:
        ItemError: ``image_count``, or ``missing_question`` where no turn is the user's.
    """
    parts = _placed_turns(turns, images)
    asked = [i for i, turn in enumerate(turns) if turn.role == "user"]
    if not asked:
        raise ItemError("missing_question", "no turn is by human or user; there is nothing to answer")
    rows = []
    for number, i in enumerate(asked):
        answered = i + 1 < len(turns) and turns[i + 1].role == "assistant"
        answer = turns[i + 1].text.strip() or None if answered else None
        shown, question = _question(parts[i])
        query = joined([*_history(turns, parts, i), *shown] or [question or ""], images)
        alone = question is None and answer is not None  # an image and what it shows: a pair, not a question
        rows.append(
            RawRow(
                source=context.source,
                key=context.key if len(asked) == 1 else f"{context.key}/{number + 1}",
                task=context.source,
                split=context.split,
                query=RawItem(query.text, query.images, None, query.image_at),
                target=RawItem(answer, (), None) if alone else _NO_ITEM,
                negatives=(),
                question=question,
                answer=None if alone else answer,
            )
        )
    return rows


def conversation_item(turns: Sequence[Turn], images: tuple[ImageName, ...], context: RowContext) -> RawItem:
    """What the user says first, with its images; the first answer for the side ``target``. Raises as above."""
    parts = _placed_turns(turns, images)
    role = "assistant" if context.side == "target" else "user"
    first = next((i for i, turn in enumerate(turns) if turn.role == role), None)
    if first is None:
        raise ItemError("empty_item", f"no turn is by the {role}")
    text = joined(parts[first], images)
    return RawItem(text.text, text.images, None, text.image_at)


def _placed_turns(turns: Sequence[Turn], images: tuple[ImageName, ...]) -> list[Parts]:
    """The parts of each turn. Images without any mark stand before what the user says first."""
    asking = [i for i, turn in enumerate(turns) if turn.role != "assistant"]
    if images and any(count_marks(turn.text, bare=False) for turn in turns if turn.role == "assistant"):
        raise ItemError("image_count", "an answer holds an image placeholder; an answer is text")
    parts: list[Parts] = [[turn.text] for turn in turns]
    for i, found in zip(asking, placed([turns[i].text for i in asking], len(images), "the conversation"), strict=True):
        parts[i] = found
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is not None and not any(isinstance(part, int) for turn in parts for part in turn):
        parts[first] = [*range(len(images)), *parts[first]]
    return parts


def _history(turns: Sequence[Turn], parts: Sequence[Parts], end: int) -> Parts:
    """The turns before ``end``, a line each that says whose it is."""
    lines: Parts = []
    for turn, said in zip(turns[:end], parts, strict=False):
        name = "" if turn.role == "system" else f"{turn.role}: "
        leading = _leading(said)
        lines += [*_images(said[:leading]), name, *_trimmed(said[leading:]), "\n"]
    return lines


def _question(said: Parts) -> tuple[Parts, str | None]:
    """What of a turn belongs to the query, and its question."""
    words = [i for i, part in enumerate(said) if isinstance(part, str) and part.strip()]
    if not words or not _images(said[words[0] : words[-1]]):  # images only before the words, or after them
        return [*_images(said)], "".join(part for part in said if isinstance(part, str)).strip() or None
    last = max(i for i, part in enumerate(said) if isinstance(part, int))
    line, _, following = "".join(part for part in said[last + 1 :] if isinstance(part, str)).partition("\n")
    if following.strip():
        return [*said[: last + 1], line], following.strip()
    return said, _named(said)


def _named(said: Parts) -> str:
    """The words of a turn, with the name of each image where it stands."""
    text = ""
    for part in said:
        piece = part if isinstance(part, str) else f"image {part + 1}"
        touching = text[-1:].isalnum() and piece[:1].isalnum()
        text += f" {piece}" if touching else piece
    return text.strip()


def _images(said: Parts) -> list[int]:
    return [part for part in said if isinstance(part, int)]


def _leading(said: Parts) -> int:
    """How many parts precede the first word."""
    for i, part in enumerate(said):
        if isinstance(part, str) and part.strip():
            return i
    return len(said)


def _trimmed(said: Parts) -> Parts:
    """Without the blanks before its first and after its last word."""
    said = list(said)
    if said and isinstance(said[0], str):
        said[0] = said[0].lstrip()
    if said and isinstance(said[-1], str):
        said[-1] = said[-1].rstrip()
    return said
