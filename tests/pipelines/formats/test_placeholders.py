"""Marks for images in texts: they become places, or the row is refused; they never stay as words."""

from __future__ import annotations

import pytest

from crem.errors import ItemError
from pipelines.formats.placeholders import place_images, remove_marks
from pipelines.formats.raw_rows import parse_row

A, B, C = "a.jpg", "b.jpg", "c.jpg"


@pytest.mark.parametrize(
    "mark",
    [
        *("<image>", "<|image_1|>", "<image_1>", "<image1>", "<|image|>", "<|image_pad|>", "[IMG]", "[IMAGE]"),
        *("<|vision_start|><|image_pad|><|vision_end|>", "<im_start><image><im_end>", "<image_placeholder>"),
        *("<ImageHere>", "<start_of_image>", "[IMG_1]", "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"),
        *("<image 1>", "<image:1>", "<Image>", "<IMAGE>", "<image/>", "<|img|>", "<|img_1|>", "<image-placeholder>"),
        *("<image_token>", "<image></image>", "<image>a.jpg</image>", "(<image>./</image>)", "<image_soft_token>"),
        *("<img>", "<img/>", "<img></img>", "<img>a b.jpg</img>", "Picture 1: <img>a.jpg</img>", "<img_1>"),
        *("<Img><ImageHere></Img>", "<img><IMG_CONTEXT><IMG_CONTEXT></img>", "[IMG 1]", "[IMG][/IMG]"),
        *("<|begin_of_image|><|image|><|end_of_image|>", "<start_of_image><image_soft_token><end_of_image>"),
        *("<fake_token_around_image><image><fake_token_around_image>", "<image_start><image><image_end>"),
    ],
)
def test_a_mark_before_the_text_leaves_the_clean_text(mark: str) -> None:
    for text in (f"{mark}\nA red box.", f"{mark} A red box.\n", f"{mark}A red box."):
        placed = place_images(text, (A,), "text")
        assert (placed.text, placed.images, placed.image_at) == ("A red box.", (A,), ())


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("one <image> two <image>", (A, B), ("one  two", (A, B), (4, 8))),
        ("<image> one <image> two", (A, B), ("one  two", (A, B), (0, 4))),
        ("<image>\n<image>\nwhich?", (A, B), ("which?", (A, B), ())),
        ("<|image_2|> after <|image_1|>", (A, B), ("after", (B, A), (0, 5))),
        ("<image_0> then <image_1>", (A, B), ("then", (A, B), (0, 4))),
        ("is <|image_1|> in <|image_2|> or is <|image_1|>?", (A, B), ("is  in  or is ?", (A, B, A), (3, 7, 14))),
        ("<|image_2|> and <image>", (A, B), ("and", (B, A), (0, 3))),
        ("<image 2> and <image 1>", (A, B), ("and", (B, A), (0, 3))),
        ("Picture 2: <img>7.jpg</img>or Picture 1: <img>8.jpg</img>", (A, B), ("or", (B, A), (0, 2))),
        ("<image_start><image><image><image_end>x", (A, B), ("x", (A, B), ())),
        ("<b>x</b> [image] <images> <table>", (A,), ("<b>x</b> [image] <images> <table>", (A,), ())),
        ("<image> has an <img> tag", (A,), ("has an <img> tag", (A,), ())),
        ("what does <img> do, and </img>?", (), ("what does <img> do, and </img>?", (), ())),
        ("no mark", (A, B), ("no mark", (A, B), ())),
        ("  no mark ", (A,), ("  no mark ", (A,), ())),
        ("<image>", (A,), (None, (A,), ())),
        (None, (A,), (None, (A,), ())),
    ],
)
def test_marks_become_places_in_their_order(
    text: str | None, images: tuple[str, ...], expected: tuple[str | None, tuple[str, ...], tuple[int, ...]]
) -> None:
    placed = place_images(text, images, "text")
    assert (placed.text, placed.images, placed.image_at) == expected


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("<image>", ()),
        ("<image> <image>", (A,)),
        ("<img> <img>", (A,)),
        ("<Image>", ()),
        ("<img></img>", ()),
        ("<image>", (A, B)),
        ("<|image_1|> <|image_3|>", (A, B)),
        ("<|image_2|>", (A,)),
        ("<|image_1|>", (A, B)),
        ("<image_0> <image_2>", (A, B)),
    ],
)
def test_a_count_that_does_not_match_is_refused(text: str, images: tuple[str, ...]) -> None:
    with pytest.raises(ItemError, match=r"image_count: text has \d image placeholder.*give an image") as error:
        place_images(text, images, "text")
    assert error.value.reason == "image_count"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|image_1|>\nFind it.", "Find it."),
        ("a <|image_1|> b", "a b"),
        ("a\n<|image_1|>\nb", "a\nb"),
        ("a<image>b", "ab"),
        ("Find it. <|image_1|>", "Find it."),
        ("<image>", None),
        ("<imagery> <b> image [img]", "<imagery> <b> image [img]"),
        (None, None),
    ],
)
def test_marks_are_removed_without_a_trace(text: str | None, expected: str | None) -> None:
    assert remove_marks(text) == expected


def test_our_own_rows_place_marks_and_keep_words() -> None:
    row = parse_row(
        {
            "query_text": "compare <image> and <image>",
            "query_images": [A, B],
            "query_instruction": "<|image_1|> Represent it.",
            "target_text": "write <image> into your HTML",
            "negatives": [{"text": "<image>\nn", "images": [C]}],
            "question": "<image>\n<image>\nwhich?",
            "answer": "a",
        },
        key="k",
        source="s",
    )
    assert (row.query.text, row.query.images, row.query.image_at) == ("compare  and", (A, B), (8, 12))
    assert row.query.instruction == "Represent it."
    assert row.target.text == "write <image> into your HTML"
    assert (row.negatives[0].text, row.negatives[0].images) == ("n", (C,))
    assert row.question == "which?"
    with pytest.raises(ItemError, match="image_count"):
        parse_row({"query_text": "<image> <image>", "query_images": [A]}, key="k", source="s")


@pytest.mark.parametrize("question", ["<image>\nwhat <image>?", "<image_2> which?"])
def test_marks_of_a_question_stand_for_the_images_of_the_query(question: str) -> None:
    record = {"query_images": [A], "question": question, "answer": "a"}
    with pytest.raises(ItemError, match="image_count"):
        parse_row(record, key="k", source="s")
    assert parse_row(record | {"question": "<Image>which?"}, key="k", source="s").question == "which?"
