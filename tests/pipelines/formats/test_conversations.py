"""Conversations as LLaVA, ShareGPT-4V, OpenAI and ms-swift write them."""

from __future__ import annotations

from typing import Any

import pytest

from crem.errors import ItemError
from pipelines.formats.raw_rows import RawItem, check_row
from tests.pipelines.formats.reading import item_of, reader_of, reason_of, row_of, rows_of

A, B = "coco/train2017/000000033471.jpg", "gqa/images/2.jpg"


def turns(*said: str) -> list[dict[str, str]]:
    """Alternating turns of LLaVA."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


def llava(*said: str, **more: Any) -> dict[str, Any]:
    return {"id": "000000033471", **more, "conversations": turns(*said)}


def test_a_question_about_one_image() -> None:
    name, (row,) = rows_of(llava("<image>\nWhat is it?", "A bus.", image=A), "llava_v1_5_mix665k.json")
    assert name == "llava"
    assert (row.query, row.question, row.answer) == (RawItem(None, (A,), None), "What is it?", "A bus.")
    assert (row.target.is_empty, row.source, row.split, row.key) == (True, "corpus", "train", "k")
    check_row(row, max_text_chars=100, max_images=1)
    for first in ("What is it?\n<image>", "What is it?", "<image> What is it? ", "<|image_1|>\nWhat is it?"):
        assert row_of(llava(first, "A bus.", image=A)) == row, first
    assert row_of(llava("<image>\nWhat is it?", "A bus.", image=[A])) == row


def test_every_turn_is_a_row_with_those_before_as_its_text() -> None:
    conversation = llava("<image>\nWhat is it?", "A bus.", "Which colour?", "Red.\n", "Where?", "In town.", image=A)
    _, rows = rows_of(conversation)
    assert [(row.key, row.question, row.answer) for row in rows] == [
        ("k/1", "What is it?", "A bus."),
        ("k/2", "Which colour?", "Red."),
        ("k/3", "Where?", "In town."),
    ]
    assert [row.query.text for row in rows] == [
        None,
        "user: What is it?\nassistant: A bus.",
        "user: What is it?\nassistant: A bus.\nuser: Which colour?\nassistant: Red.",
    ]
    assert all((row.query.images, row.query.image_at) == ((A,), ()) for row in rows)


def test_images_between_the_words_keep_their_places() -> None:
    row = row_of(llava("Image 1: <image>\nImage 2: <image>\nWhat differs?", "All.", image=[A, B]))
    assert row.query == RawItem("Image 1: \nImage 2:", (A, B), None, (9, 18))
    assert row.question == "What differs?"
    row = row_of(llava("Is <image> in <image>?", "No.", image=[A, B]))
    assert row.query == RawItem("Is  in ?", (A, B), None, (3, 7))
    assert row.question == "Is image 1 in image 2?"
    row = row_of(llava("Is<image>in <image>?", "No.", image=[A, B]))
    assert row.question == "Is image 1 in image 2?"
    row = row_of(llava("<image>\n<image>\nWhat differs?", "All.", image=[A, B]))
    assert (row.query, row.question) == (RawItem(None, (A, B), None), "What differs?")
    _, rows = rows_of(llava("<image>\nWhat?", "A bus.", "And <image>?", "A cat.", image=[A, B]))
    assert (rows[0].query.images, rows[1].query.images) == ((A,), (A, B))
    history = "user: What?\nassistant: A bus.\n"
    assert (rows[1].query.text, rows[1].query.image_at) == (history + "And ?", (0, len(history) + 4))
    assert rows[1].question == "And image 2?"


def test_a_conversation_without_an_image() -> None:
    row = row_of(llava("Who are you?", "A model; see <image> in HTML."))
    assert (row.question, row.answer) == ("Who are you?", "A model; see <image> in HTML.")
    assert row.query == RawItem("Who are you?", (), None)


def test_an_image_and_what_it_shows_make_a_pair() -> None:
    row = row_of(llava("<image>", "A bus in town.", image=A))
    assert (row.query.images, row.target.text, row.question, row.answer) == ((A,), "A bus in town.", None, None)


def test_system_turns_and_a_first_turn_by_the_model_are_context() -> None:
    conversation = [
        {"from": "system", "value": "Be brief."},
        {"from": "gpt", "value": "Hello."},
        *turns("What?", "A bus."),
    ]
    row = row_of({"id": 1, "image": A, "conversations": conversation})
    assert row.query == RawItem("Be brief.\nassistant: Hello.", (A,), None, (len("Be brief.\nassistant: Hello."),))
    assert (row.question, row.answer) == ("What?", "A bus.")
    assert row_of(llava("<image>What?", "A bus.", image=A, system="Be brief.")).query.text == "Be brief."


def test_a_turn_without_an_answer_is_a_row_that_is_rejected() -> None:
    _, (first, last) = rows_of(llava("What?", "A bus.", "Why?"))
    check_row(first, max_text_chars=100, max_images=1)
    assert (last.key, last.question, last.answer) == ("k/2", "Why?", None)
    with pytest.raises(ItemError, match="missing_answer"):
        check_row(last, max_text_chars=100, max_images=1)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (llava("<image>\nWhat?", "A bus."), "image_count"),
        (llava("<image>\nWhat?", "A bus.", image=""), "image_count"),
        (llava("<image>\n<image>\nWhat?", "A bus.", image=A), "image_count"),
        (llava("<image>\nWhat?", "A bus.", image=[A, B]), "image_count"),
        (llava("<image>\nWhat?", "See <image>.", image=A), "image_count"),
        (llava("<video>\nWhat?", "A bus.", video="a.mp4"), "unsupported_media"),
        ({"id": 1, "conversations": []}, "bad_row"),
        ({"id": 1, "conversations": None}, "bad_row"),
        ({"id": 1, "conversations": "What?"}, "bad_row"),
        ({"id": 1, "conversations": [{"from": "owl", "value": "hoo"}]}, "bad_row"),
        ({"id": 1, "conversations": [{"from": "gpt", "value": "hi"}]}, "missing_question"),
    ],
)
def test_what_is_no_conversation_is_rejected(record: dict[str, Any], reason: str) -> None:
    assert reason_of(record) == reason


def test_messages_of_openai() -> None:
    content = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "What is it?"},
    ]
    name, (row,) = rows_of(
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A bus."}]}
    )
    assert (name, row.query.images, row.question, row.answer) == (
        *("messages", ("data:image/png;base64,AAAA",), "What is it?", "A bus."),
    )
    parts = [{"type": "text", "text": "Is"}, {"type": "image"}, {"type": "text", "text": "here?"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "No."}], "images": [A]}
    row = row_of(record)
    assert (row.query, row.question) == (RawItem("Is", (A,), None, (2,)), "here?")
    assert reason_of({**record, "images": []}) == "image_count"
    assert reason_of({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}) == "unsupported_media"


SWIFT = {
    "messages": [{"role": "user", "content": "<image>sentence1"}],
    "images": ["/some/images.jpg"],
    "positive_messages": [[{"role": "user", "content": "<image>sentence2"}]],
    "positive_images": [["/some/positive_images.jpg"]],
    "negative_messages": [
        [{"role": "user", "content": "<image><image>sentence3"}],
        [{"role": "user", "content": "<image>sentence4"}],
    ],
    "negative_images": [["/some/negative_images1.jpg", "/some/negative_images2.jpg"], ["/some/negative_images3.jpg"]],
}
"""The example of ms-swift's guide "Embedding Training"."""


def test_parts_show_images_by_their_index_or_their_order() -> None:
    def images_of(*parts: dict[str, Any]) -> tuple[Any, ...]:
        said = [
            {"role": "user", "content": [*parts, {"type": "text", "text": "which?"}]},
            {"role": "assistant", "content": "a"},
        ]
        return row_of({"messages": said, "images": ["red.png", "blue.png"]}).query.images

    def part(**more: Any) -> dict[str, Any]:
        return {"type": "image", "text": None, **more}

    assert images_of(part(index=1), part(index=0)) == ("blue.png", "red.png")
    assert images_of(part(index=1.0), part(index=None)) == ("blue.png", "red.png")
    assert images_of(part(), part(index=float("nan"))) == ("red.png", "blue.png")
    assert images_of(part(index=0), part(index=1), part(index=0)) == ("red.png", "blue.png", "red.png")
    for index, reason in ((2, "image_count"), (-1, "image_count"), ("b", "bad_row"), (True, "bad_row")):
        with pytest.raises(ItemError, match=f"{reason}.*image"):
            images_of(part(index=index), part(index=0))


def test_images_of_parts_are_read_under_any_plain_name() -> None:
    def said(part: dict[str, Any]) -> dict[str, Any]:
        content = [{"type": "image", **part}, {"type": "text", "text": "which?"}]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}

    for part in (
        {"data": "a.png"},
        {"Path": "a.png", "min_pixels": 9},
        {"image_url": {"url": "a.png", "detail": "low"}},
    ):
        assert row_of(said(part)).query.images == ("a.png",)
    assert reason_of(said({"blob": "a.png"})) == "bad_row"


def test_paths_in_the_marks_of_qwen_are_the_images() -> None:
    said = ("Picture 1: <img>a.jpg</img>\nPicture 2: <img>b c.jpg</img>\nWhich is red?", "The first.")
    assert row_of(llava(*said)).query.images == ("a.jpg", "b c.jpg")
    assert row_of(llava(*said)).question == "Which is red?"
    assert row_of(llava(*said, image=["x.jpg", "y.jpg"])).query.images == ("x.jpg", "y.jpg")
    assert reason_of(llava(*said, image="x.jpg")) == "image_count"


def test_words_of_html_are_no_marks() -> None:
    row = row_of(llava("How do I close <img>?", "Write <img> alone."))
    assert (row.question, row.answer) == ("How do I close <img>?", "Write <img> alone.")
    row = row_of(llava("<image>\nWrite the page.", "<b><img></b>", image="a.jpg"))
    assert (row.query.images, row.target.text or row.answer) == (("a.jpg",), "<b><img></b>")


def test_pairs_of_ms_swift() -> None:
    name, (row,) = rows_of(SWIFT)
    assert name == "ms-swift"
    assert row.query == RawItem("sentence1", ("/some/images.jpg",), None)
    assert row.target == RawItem("sentence2", ("/some/positive_images.jpg",), None)
    assert row.negatives == (
        RawItem("sentence3", ("/some/negative_images1.jpg", "/some/negative_images2.jpg"), None),
        RawItem("sentence4", ("/some/negative_images3.jpg",), None),
    )
    anchor = {"messages": [{"role": "system", "content": "Instruction"}, {"role": "user", "content": "Anchor"}]}
    row = row_of({**anchor, "positive_messages": [[{"role": "user", "content": "P"}]]})
    assert (row.query, row.target.text) == (RawItem("Anchor", (), "Instruction"), "P")
    assert item_of(SWIFT, side="target").text == "sentence2"
    two = {**anchor, "positive_messages": [[{"role": "user", "content": text}] for text in "PR"]}
    assert [(row.key, row.target.text) for row in rows_of(two)[1]] == [("k/1", "P"), ("k/2", "R")]


def test_a_label_says_whether_a_row_is_a_pair() -> None:
    assert row_of({**SWIFT, "label": 0.8}).target.text == "sentence2"
    assert row_of({**SWIFT, "label": 1}).target.text == "sentence2"
    assert reason_of({**SWIFT, "label": 0}) == "not_a_pair"
    for label, reason in (("0", "not_a_pair"), ("0.0", "not_a_pair"), ("False", "not_a_pair"), ("unlike", "bad_row")):
        assert reason_of({**SWIFT, "label": label}) == reason
    for alike in ("1", "0.9", "true", True, " ", None, float("nan")):
        assert row_of({**SWIFT, "label": alike}).target.text == "sentence2"
    assert reason_of({**SWIFT, "positive_images": [[]]}) == "image_count"
    assert reason_of({**SWIFT, "negative_images": [["/some/negative_images1.jpg"]]}) == "image_count"
    assert reason_of({**SWIFT, "videos": ["a.mp4"]}) == "unsupported_media"


@pytest.mark.parametrize("nothing", [None, float("nan"), " ", [], [None], [""], [[]], {"path": None}, False])
def test_media_and_negatives_that_are_not_there_reject_no_row(nothing: Any) -> None:
    for name in ("video", "videos", "audio"):
        assert row_of(llava("<image>\nWhat?", "A bus.", image=A, **{name: nothing})).answer == "A bus."
        assert row_of({**SWIFT, name: nothing}).target.text == "sentence2"
    if nothing is not False and not isinstance(nothing, dict):
        assert row_of({**SWIFT, "negative_messages": nothing, "negative_images": None}).negatives == ()


def test_a_negative_that_is_not_there_leaves_the_others() -> None:
    there = [{"role": "user", "content": "n"}]
    record = {**SWIFT, "negative_messages": [None, there, []], "negative_images": None}
    assert [negative.text for negative in row_of(record).negatives] == ["n"]


def test_rows_of_one_file_may_lack_the_negatives_or_the_positive() -> None:
    chat = {"messages": turns_of_chat("What?", "A bus.")}
    reader = reader_of([SWIFT, chat])
    assert reader.detection.formats == ("ms-swift",)


def turns_of_chat(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def test_the_item_of_a_conversation_is_what_is_asked_first() -> None:
    record = llava("<image>\nWhat is it?", "A bus.", "Which colour?", "Red.", image=A)
    assert item_of(record) == RawItem("What is it?", (A,), None)
    assert item_of(record, side="target") == RawItem("A bus.", (), None)


def test_conversations_in_an_image_folder_name_their_files_from_the_metadata() -> None:
    record = llava("<image>\nWhat is it?", "A bus.", file_name="1.jpg")
    name, (row,) = rows_of(record, "train/metadata.jsonl")
    assert (name, row.query.images, row.question, row.answer) == ("llava", ("train/1.jpg",), "What is it?", "A bus.")
    assert row_of({**record, "image": A}, "train/metadata.jsonl").query.images == (A,)
    assert item_of(record, "train/metadata.csv").images == ("train/1.jpg",)
    both = llava("<image> or <image>?", "The first.", file_names=["1.jpg", "../b/2.jpg"])
    assert row_of(both, "a/metadata.jsonl").query.images == ("a/1.jpg", "b/2.jpg")
    assert row_of({**both, "image": [None], "first_file_name": None}, "metadata.jsonl").query.images[0] == "1.jpg"
    assert reason_of({**record, "file_name": None}) == "image_count"
    chat = {"file_name": "1.jpg", "messages": turns_of_chat("<image>What is it?", "A bus.")}
    name, (row,) = rows_of(chat, "train/metadata.jsonl")
    assert (name, row.query.images, row.answer) == ("messages", ("train/1.jpg",), "A bus.")


def test_pairs_in_an_image_folder_name_their_files_from_the_metadata() -> None:
    sides = {f"{side}messages": [turns_of_chat("<image>")] for side in ("positive_", "negative_")}
    files = {"file_name": "1.jpg", "positive_file_name": "2.jpg", "negative_file_name": "3.jpg"}
    name, (row,) = rows_of({"messages": turns_of_chat("<image>like this"), **sides, **files}, "a/metadata.jsonl")
    assert (name, row.query.images, row.target.images) == ("ms-swift", ("a/1.jpg",), ("a/2.jpg",))
    assert [negative.images for negative in row.negatives] == [("a/3.jpg",)]
    name, (row,) = rows_of({"file_name": "1.jpg", "target_file_name": "2.jpg", "query_text": "like"}, "a/metadata.csv")
    assert (name, row.query, row.target.images) == ("crem", RawItem("like", ("a/1.jpg",), None), ("a/2.jpg",))
    inline = {"query_images": ["3.jpg"], "file_name": "1.jpg", "target_text": "t"}
    assert row_of(inline, "a/metadata.csv").query.images == ("3.jpg",)
