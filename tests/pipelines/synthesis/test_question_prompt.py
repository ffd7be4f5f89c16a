"""The prompt: from a file that is named and hashed, filled in with a row, images bounded in size."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from crem.config import SynthesiseConfig
from crem.errors import ConfigError
from pipelines.synthesis.question_prompt import QuestionPrompt, data_url, kinds_of_row
from pipelines.tables.schema import ArrowRow
from tests.pipelines.conftest import encoded, random_image

KINDS = SynthesiseConfig().kinds
SHIPPED = Path("pipelines/synthesis/prompts/grounded-1.yaml")


def query(text: str | None = None, instruction: str | None = None, images: list[int] | None = None) -> ArrowRow:
    return {"text": text, "instruction": instruction, "images": images or [], "image_at": []}


def decoded(url: str) -> Image.Image:
    header, _, payload = url.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))
    assert header == f"data:image/{str(image.format).lower()};base64"
    return image


def test_the_shipped_prompt_is_filled_in() -> None:
    prompt = QuestionPrompt.load("grounded-1", KINDS)
    image = encoded(random_image(1))
    row = query("a $5 {note}", "Find it.", [7, 8])
    system, user = prompt.messages(row, ("count", "text"), lambda i: image, 10**6)
    assert system["role"] == "system" and "only what can be seen" in system["content"]
    *images, text = user["content"]
    assert [part["image_url"]["url"] for part in images] == [data_url(image, 10**6)] * 2
    assert "Write 2 question-and-answer pair(s)" in text["text"]
    assert "1. count: ask how many" in text["text"] and "2. text: ask what is written" in text["text"]
    assert "this task: Find it." in text["text"] and "belongs to it: a $5 {note}" in text["text"]
    bare = prompt.messages(query(images=[7]), ("count",), lambda i: image, 10**6)[1]["content"][-1]["text"]
    assert bare.startswith("Write 1 question") and "$" not in bare


def test_images_inside_the_text_leave_a_mark() -> None:
    row = query("before after", images=[1, 2]) | {"image_at": [6, 12]}
    message = QuestionPrompt.load("grounded-1", KINDS).messages(
        row, ("count",), lambda i: encoded(random_image(i)), 999
    )
    assert "belongs to it: before[image 1] after[image 2]" in message[1]["content"][-1]["text"]


def test_a_prompt_of_the_user(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(SHIPPED.read_text().replace("system: |\n", "system: |\n  Be kind.\n"))
    shipped, prompt = QuestionPrompt.load("grounded-1", KINDS), QuestionPrompt.load(str(mine), KINDS)
    assert (prompt.name, len(prompt.digest)) == ("mine", 16) and prompt.digest != shipped.digest
    assert prompt.system.startswith("Be kind.")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("$kinds\n", "$kindz\n", r"unknown placeholder \$kindz"),
        ("$kinds\n", "5 $ \n", "write \\$\\$"),
        ("system: |", "sistem: |", "sistem"),
        ("kinds:", "kinds: [", "cannot be used"),
    ],
)
def test_a_wrong_prompt_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(SHIPPED.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        QuestionPrompt.load(str(mine), KINDS)


def test_an_unknown_prompt_or_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"neither a shipped prompt \(grounded-1\) nor a file"):
        QuestionPrompt.load("grounded-9", KINDS)
    with pytest.raises(ConfigError, match="'colour', which the prompt 'grounded-1' does not explain"):
        QuestionPrompt.load("grounded-1", ("count", "colour"))


def test_kinds_take_turns_over_the_rows() -> None:
    seen = Counter(kinds_of_row(row_id, KINDS, 1)[0] for row_id in range(-700, 700))
    assert set(seen) == set(KINDS) and set(seen.values()) == {200}
    assert len(set(kinds_of_row(-(2**63), KINDS, len(KINDS)))) == len(KINDS)


def test_large_images_are_reduced_and_small_ones_are_sent_as_they_are() -> None:
    small = encoded(random_image(1, (60, 50)), "JPEG")
    assert base64.b64decode(data_url(small, 3000).partition(",")[2]) == small
    for kind in ("PNG", "JPEG", "WEBP"):
        large = decoded(data_url(encoded(random_image(2, (900, 600)), kind), 90_000))
        assert 80_000 < large.width * large.height <= 90_000 and abs(large.width / large.height - 1.5) < 0.02
    assert decoded(data_url(encoded(random_image(3, (400, 3)), "WEBP"), 10**6)).size == (400, 3)
