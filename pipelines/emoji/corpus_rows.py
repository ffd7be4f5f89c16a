"""Rows of the embedded corpus, in the raw corpus format (``pipelines/tables/schema.py``).

Choices, all ours, for a small model that is trained from scratch in minutes:

- Pairs are text -> image, image -> text, and image -> image across the training vendors: every drawing is the query of
  up to three others of its concept, chosen at random. Drawings of many vendors teach the look of a concept rather than
  the styles of two. A query text is the label, the label with tags, or tags alone where no other concept has them all,
  so that the model learns words and not strings; a test query is always the plain label. A target text is mostly the
  label.
- Training pairs have a question about their query (homogeneous turn): all pairs with a drawing as query, and one in
  four with a text, because a question is half of a row's tokens. Half of the questions are about the group, as all of
  the evaluation's are; the others are about label, subgroup, a tag or a description.
- Captions (heterogeneous) have no target, and use the tags that the pairs do not use.
- Test queries and targets are of the vendor that training never sees; only the queries of image -> image are of a
  training vendor. The candidates of a task are its targets in both test splits.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypedDict

from pipelines.emoji.concepts import VENDORS, Concept

__all__ = [
    "CAPTION_QUESTION",
    "GROUP_QUESTION",
    "QUESTIONS",
    "TRAIN_VENDORS",
    "UNSEEN_VENDOR",
    "evaluation_rows",
    "training_rows",
]

UNSEEN_VENDOR = "twemoji"
QUERY_VENDOR = "noto"  # its drawings are the queries of image -> image in the test splits
TRAIN_VENDORS = tuple(vendor for vendor in VENDORS if vendor != UNSEEN_VENDOR)
SOURCE = "emoji"

GROUP_QUESTION = "Which group does it belong to?"
CAPTION_QUESTION = "Describe the picture."
QUESTIONS = {
    "group": (GROUP_QUESTION, "Which group is this in?", "What kind of thing is it?"),
    "subgroup": ("Which subgroup does it belong to?", "Which subgroup is this in?"),
    "label": ("What is this?", "What does it show?", "Name it."),
    "tag": ("Name a tag.", "Which word goes with it?"),
    "describe": ("Describe it.", "Tell me about it."),
}
"""Kind -> wordings; the first is taken in half of the rows of its kind."""

# (text variant, kind of question) of the pairs made from each drawing; None draws a kind other than the group.
NO_QUESTION = "no question"
TEXT_TO_IMAGE = (
    ("label", "group"),
    ("label", NO_QUESTION),
    ("label and tags", NO_QUESTION),
    ("tags", NO_QUESTION),
)
IMAGE_TO_TEXT = (
    ("label", "group"),
    ("label", "group"),
    ("label", "label"),
    ("label", None),
    ("label and tags", "group"),
)
IMAGE_TO_IMAGE = ("group", None, "group")  # one for each other drawing of the concept that is a target
OTHER_KINDS = ("label", "subgroup", "tag", "describe")

MAX_TAGS = 3  # in one text: keeps every text within about 20 tokens


class Row(TypedDict):
    """One row of the raw corpus; an image is named as in ``images.zip``."""

    key: str
    source: str
    task: str
    split: str
    query_text: str | None
    query_images: list[str]
    target_text: str | None
    target_images: list[str]
    question: str | None
    answer: str | None


def training_rows(
    concepts: Sequence[Concept], held_out: Collection[str], seed: int, drawn: Mapping[str, Collection[str]]
) -> Iterator[Row]:
    """Pairs and captions of the concepts that are not held out, drawn by the training vendors.

    Args:
        concepts: all of the corpus, held out or not: tags alone must name one among all of them.
        held_out: codes of the concepts that training must not see.
        seed: fixes the choice of texts, questions and paired drawings.
        drawn: training vendor -> codes of the concepts that it draws.
    """
    words = [frozenset((c.label, *c.tags)) for c in concepts]
    for concept in concepts:
        if concept.hexcode in held_out:
            continue
        vendors = [vendor for vendor in TRAIN_VENDORS if concept.hexcode in drawn[vendor]]
        for vendor in vendors:
            yield from _text_pairs(concept, vendor, words, seed)
            yield from _image_pairs(concept, vendor, [other for other in vendors if other != vendor], seed)
            yield from _captions(concept, vendor, seed)


def evaluation_rows(concepts: Sequence[Concept], held_out: Collection[str]) -> Iterator[Row]:
    """One row per concept and task on the unseen vendor; held-out concepts are a split of their own."""
    for concept in concepts:
        split = "test_concept" if concept.hexcode in held_out else "test_vendor"
        code, image = concept.hexcode, image_name(UNSEEN_VENDOR, concept)
        yield _row(
            f"text_to_image/{UNSEEN_VENDOR}/{code}/label", split, query_text=concept.label, target_images=[image]
        )
        yield _row(
            f"image_to_text/{UNSEEN_VENDOR}/{code}/label",
            split,
            query_images=[image],
            target_text=concept.label,
            question_answer=(GROUP_QUESTION, concept.group),
        )
        yield _row(
            f"image_to_image/{QUERY_VENDOR}-{UNSEEN_VENDOR}/{code}",
            split,
            query_images=[image_name(QUERY_VENDOR, concept)],
            target_images=[image],
        )


def image_name(vendor: str, concept: Concept) -> str:
    """Name of a drawing inside ``images.zip``."""
    return f"{vendor}/{concept.hexcode}.webp"


def _text_pairs(concept: Concept, vendor: str, words: Sequence[frozenset[str]], seed: int) -> Iterator[Row]:
    image = [image_name(vendor, concept)]
    for task, plan in (("text_to_image", TEXT_TO_IMAGE), ("image_to_text", IMAGE_TO_TEXT)):
        for number, (variant, kind) in enumerate(plan, start=1):
            key = f"{task}/{vendor}/{concept.hexcode}/{variant.replace(' ', '_')}/{number}"
            rng = random.Random(f"{seed}/{key}")
            text = _text(concept, variant, words, rng)
            if text is None:
                continue
            turn = None if kind == NO_QUESTION else _turn(concept, kind, rng)
            if task == "text_to_image":
                yield _row(key, query_text=text, target_images=image, question_answer=turn)
            else:
                yield _row(key, query_images=image, target_text=text, question_answer=turn)


def _image_pairs(concept: Concept, vendor: str, others: Sequence[str], seed: int) -> Iterator[Row]:
    image = [image_name(vendor, concept)]
    rng = random.Random(f"{seed}/image_to_image/{vendor}/{concept.hexcode}")
    chosen = rng.sample(others, min(len(IMAGE_TO_IMAGE), len(others)))
    for number, (other, kind) in enumerate(zip(chosen, IMAGE_TO_IMAGE, strict=False), start=1):
        key = f"image_to_image/{vendor}-{other}/{concept.hexcode}/{number}"
        turn = _turn(concept, kind, random.Random(f"{seed}/{key}"))
        yield _row(key, query_images=image, target_images=[image_name(other, concept)], question_answer=turn)


def _captions(concept: Concept, vendor: str, seed: int) -> Iterator[Row]:
    rng = random.Random(f"{seed}/caption/{vendor}/{concept.hexcode}")
    _, tags = _split_tags(concept)
    answers = {"subgroup": f"{concept.label} ({concept.subgroup})"}
    if tags:
        answers["tags"] = f"{concept.label}: {_some(tags, rng)}"
    for name, answer in answers.items():
        key = f"caption/{vendor}/{concept.hexcode}/{name}"
        yield _row(key, query_images=[image_name(vendor, concept)], question_answer=(CAPTION_QUESTION, answer))


def _text(concept: Concept, variant: str, words: Sequence[frozenset[str]], rng: random.Random) -> str | None:
    """The concept in words, or None where it has no text of this variant."""
    if variant == "label":
        return concept.label
    if variant == "label and tags":
        tags, _ = _split_tags(concept)
        return f"{concept.label}: {_some(tags, rng)}" if tags else None
    assert variant == "tags", variant
    return _unambiguous_tags(concept, words, rng)


def _unambiguous_tags(concept: Concept, words: Sequence[frozenset[str]], rng: random.Random) -> str | None:
    """At least two tags that no other concept has all of, as few as possible."""
    if len(concept.tags) < 2:
        return None
    shuffled = rng.sample(concept.tags, len(concept.tags))
    for count in range(min(MAX_TAGS, len(shuffled)), min(2 * MAX_TAGS, len(shuffled)) + 1):
        chosen = frozenset(shuffled[:count])
        if sum(chosen <= others for others in words) == 1:
            return ", ".join(shuffled[:count])
    return None


def _turn(concept: Concept, kind: str | None, rng: random.Random) -> tuple[str, str]:
    """A question of the kind (None: any kind but the group) and its answer."""
    kind = kind or rng.choice(OTHER_KINDS)
    tags, _ = _split_tags(concept)
    if kind in ("tag", "describe") and not tags:
        kind = "subgroup"
    answer = {
        "group": lambda: concept.group,
        "subgroup": lambda: concept.subgroup,
        "label": lambda: concept.label,
        "tag": lambda: rng.choice(tags),
        "describe": lambda: f"{concept.label}: {_some(tags, rng)}",
    }[kind]()
    first, *others = QUESTIONS[kind]
    return (first if rng.random() < 0.5 else rng.choice(others)), answer


def _split_tags(concept: Concept) -> tuple[list[str], list[str]]:
    """Tags for the pairs and tags for the captions, of those that add a word to the label."""
    label_words = set(concept.label.lower().split())
    informative = [tag for tag in concept.tags if not set(tag.lower().split()) <= label_words]
    return informative[::2], informative[1::2]


def _some(tags: Sequence[str], rng: random.Random) -> str:
    return ", ".join(rng.sample(tags, min(MAX_TAGS, len(tags))))


def _row(
    key: str,
    split: str = "train",
    *,
    query_text: str | None = None,
    query_images: Sequence[str] = (),
    target_text: str | None = None,
    target_images: Sequence[str] = (),
    question_answer: tuple[str, str] | None = None,
) -> Row:
    question, answer = question_answer or (None, None)
    return {
        "key": key,
        "source": SOURCE,
        "task": key.partition("/")[0],
        "split": split,
        "query_text": query_text,
        "query_images": list(query_images),
        "target_text": target_text,
        "target_images": list(target_images),
        "question": question,
        "answer": answer,
    }
