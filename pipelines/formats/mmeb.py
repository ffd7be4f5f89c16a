"""MMEB as its publishers write it: training pairs, and evaluation rows with lists of candidates.

Sources: the datasets TIGER-Lab/MMEB-train, TIGER-Lab/MMEB-eval and ziyjiang/MMEB_Test_Instruct (the image tasks of
MMEB-V2), and the code of VLM2Vec that reads them. A sub-dataset is a folder; it becomes the source and the task. Texts
hold ``<|image_1|>`` where the image goes, also where there is no image (the queries of WebQA, which VLM2Vec cleans by
name): such marks are removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crem.errors import ItemError
from pipelines.formats.cells import is_absent, parse_images, parse_text_value
from pipelines.formats.format import Column, Format, RowContext
from pipelines.formats.paths import split_in, subset_of
from pipelines.formats.raw_rows import RawItem, RawRow, placed_item
from pipelines.sources.records import RawRecord

__all__ = ["MmebEval", "MmebTrain"]


class MmebTrain(Format):
    """A query, its positive and perhaps a negative, each a text and the path of an image."""

    name = "mmeb-train"
    title = "training pairs of MMEB (TIGER-Lab)"
    columns = (
        Column("qry", "query text"),
        Column("qry_image_path", "query image"),
        Column("pos_text", "target text"),
        Column("pos_image_path", "target image"),
        Column("neg_text", "text of a negative"),
        Column("neg_image_path", "image of a negative"),
    )
    pairs = True

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return "qry" in columns and not columns.isdisjoint({"pos_text", "pos_image_path"})

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        negatives = _items(record.get("neg_text"), record.get("neg_image_path"), None, "neg")
        return [
            _row(
                context,
                context.split,
                _item(record.get("qry"), record.get("qry_image_path"), None, "qry"),
                _item(record.get("pos_text"), record.get("pos_image_path"), None, "pos"),
                negatives,
            )
        ]

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        row = self.rows(record, context)[0]
        return row.target if context.side == "target" else row.query


class MmebEval(Format):
    """A query and its candidates. Candidate 0 is the answer; the others become negatives."""

    name = "mmeb-eval"
    title = "evaluation rows of MMEB (TIGER-Lab), also the image tasks of MMEB-V2"
    columns = (
        Column("qry_inst", "query instruction"),
        Column("qry_text", "query text"),
        Column("qry_img_path", "query image"),
        Column("tgt_inst", "instruction of target and negatives"),
        Column("tgt_text", "texts of the target and the negatives"),
        Column("tgt_img_path", "images of the target and the negatives"),
    )
    pairs = True

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return not (
            columns.isdisjoint({"qry_text", "qry_img_path"}) or columns.isdisjoint({"tgt_text", "tgt_img_path"})
        )

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        query = _item(record.get("qry_text"), record.get("qry_img_path"), record.get("qry_inst"), "qry")
        candidates = _items(record.get("tgt_text"), record.get("tgt_img_path"), record.get("tgt_inst"), "tgt")
        if not candidates:
            raise ItemError("empty_target", "tgt_text and tgt_img_path are empty; the first candidate is the answer")
        return [_row(context, split_in(record) or "test", query, candidates[0], candidates[1:])]

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        row = self.rows(record, context)[0]
        return row.target if context.side == "target" else row.query


def _row(context: RowContext, split: str, query: RawItem, target: RawItem, negatives: Sequence[RawItem]) -> RawRow:
    subset = subset_of(context.file) or context.source
    return RawRow(
        source=subset,
        key=context.key,
        task=subset,
        split=split,
        query=query,
        target=target,
        negatives=tuple(negative for negative in negatives if not negative.is_empty),
        question=None,
        answer=None,
    )


def _item(text: Any, image: Any, instruction: Any, name: str) -> RawItem:
    return placed_item(
        parse_text_value(text, f"the text of {name}"),
        parse_images(image, f"the image of {name}"),
        parse_text_value(instruction, f"{name}_inst"),
        f"the text of {name}",
        habit=True,
    )


def _items(texts: Any, images: Any, instruction: Any, name: str) -> list[RawItem]:
    """Items of parallel lists; a single value, or a list of one, goes with each value of the other."""
    text_list, image_list = _listed(texts), _listed(images)
    count = max(len(text_list), len(image_list))
    if {len(text_list), len(image_list)} - {0, 1, count}:
        raise ItemError(
            "bad_row", f"{name} has {len(text_list)} texts and {len(image_list)} images; they must be as many"
        )
    text_list, image_list = _stretched(text_list, count), _stretched(image_list, count)
    return [
        _item(text, image, instruction, f"{name}[{i}]")
        for i, (text, image) in enumerate(zip(text_list, image_list, strict=True))
    ]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    return [] if is_absent(value) else [value]


def _stretched(values: list[Any], count: int) -> list[Any]:
    return values if len(values) == count else (values or [None]) * count
