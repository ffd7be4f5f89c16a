"""An inspection as text for the terminal and as one self-contained page."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from pipelines.corpus.inspection import Inspection, SampledRow
from pipelines.corpus.shown_items import Part, Piece, pieces_of, size_text
from pipelines.formats.raw_rows import RawItem
from pipelines.formats.registry import format_named
from pipelines.reports.pages import data_url, render

__all__ = ["inspection_page", "inspection_text"]

_TEXT = 2_000
"""Characters of a text that the page shows."""


def inspection_text(found: Inspection) -> str:
    """What was found, for the terminal."""
    lines = [
        f"{found.place}",
        f"  format    {_formats(found)}",
        f"  records   {_rows(found)} in {len(found.files):,} files, {size_text(found.size_bytes)}",
        "  columns",
    ]
    width = max((len(column.name) for column in found.columns), default=0)
    for column in found.columns:
        meaning = column.meaning or (f"is it {column.nearest!r}?" if column.nearest else "")
        lines.append(f"    {column.name:<{width}}  {column.use:<8}{'  ' + meaning if meaning else ''}")
    rejected = found.rejected.total()
    lines.append(
        f"  sample    {found.records_checked:,} records give {found.rows_checked:,} rows: "
        f"{found.rows_checked - rejected:,} kept, {rejected:,} rejected"
    )
    for reason, count in found.rejected.most_common():
        key, detail = found.first_rejected[reason]
        lines.append(f"    rejected {count:>6}  {reason}: {key}: {detail}")
    if found.sizes:
        lines.append(f"  images    {len(found.sizes):,} in the sample, {_sizes(found)}")
    for number, sample in enumerate(found.samples, 1):
        lines += ["", f"  row {number}  {sample.row.key}  (split {sample.row.split}, task {sample.row.task})"]
        lines += [f"    {part.name:<10} {_line(part)}" for part in _parts(sample)]
    lines += [f"note: {warning}" for warning in found.warnings]
    return "\n".join(lines)


def inspection_page(found: Inspection) -> str:
    """What was found, with the images of the samples."""
    widths, heights = ([size[axis] for size in found.sizes] for axis in (0, 1))
    return render(
        "inspection.html.j2",
        i={
            "title": found.files.root.name,
            "place": found.place,
            "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "format": " and ".join(found.detection.formats),
            "format_title": _titles(found),
            "rows_text": _rows(found),
            "files": len(found.files),
            "size_text": size_text(found.size_bytes),
            "records_checked": found.records_checked,
            "rows_checked": found.rows_checked,
            "accepted": found.rows_checked - found.rejected.total(),
            "images_checked": len(found.sizes),
            "median_width": round(statistics.median(widths)) if widths else 0,
            "median_height": round(statistics.median(heights)) if heights else 0,
            "notes": found.warnings,
            "columns": [
                {
                    "name": column.name,
                    "use": column.use,
                    "meaning": column.meaning or (f"is it {column.nearest!r}?" if column.nearest else ""),
                    "example": found.examples.get(column.name, ""),
                }
                for column in found.columns
            ],
            "reasons": [
                {"reason": reason, "count": count, "key": key, "detail": detail}
                for reason, count in found.rejected.most_common()
                for key, detail in [found.first_rejected[reason]]
            ],
            "samples": [
                {
                    "key": sample.row.key,
                    "split": sample.row.split,
                    "task": sample.row.task,
                    "parts": list(_parts(sample)),
                }
                for sample in found.samples
            ],
            "ignored": [
                f"{ignored.count:,} {ignored.kind}: {ignored.why} ({', '.join(ignored.names[:8])})"
                for ignored in found.files.ignored
            ],
        },
    )


def _parts(sample: SampledRow) -> Iterator[Part]:
    row = sample.row
    sides = [("query", row.query), ("target", row.target), *(("negative", n) for n in row.negatives[:3])]
    for name, item in sides:
        if not item.is_empty:
            if item.instruction:
                yield Part(f"{name} instruction", (Piece(item.instruction[:_TEXT]),))
            yield Part(name, tuple(_pieces(item, sample)))
    if len(row.negatives) > 3:
        yield Part("", (Piece(f"and {len(row.negatives) - 3} more negatives"),))
    for name, text in (("question", row.question), ("answer", row.answer)):
        if text is not None:
            yield Part(name, (Piece(text[:_TEXT]),))


def _pieces(item: RawItem, sample: SampledRow) -> Iterator[Piece]:
    """Text and images of an item in their order."""
    images = [sample.images[source] for source in item.images]
    alts = [f"{image.name}, {image.width} x {image.height}" for image in images]
    urls = [data_url(image.thumbnail) for image in images]
    return pieces_of(item.text, urls, item.image_at, alts=alts, limit=_TEXT)


def _line(part: Part) -> str:
    text = " ".join(f"[{piece.alt}]" if piece.image else piece.text for piece in part.pieces).replace("\n", "⏎")
    return text if len(text) <= 200 else f"{text[:200]} …"


def _formats(found: Inspection) -> str:
    return f"{' and '.join(found.detection.formats)} ({_titles(found)})"


def _titles(found: Inspection) -> str:
    return ", ".join(format_named(name).title for name in found.detection.formats)


def _rows(found: Inspection) -> str:
    return f"{'' if found.count.exact else 'about '}{found.count.rows:,}"


def _sizes(found: Inspection) -> str:
    areas = sorted(found.sizes, key=lambda size: size[0] * size[1])
    (small, median, large) = (areas[0], areas[len(areas) // 2], areas[-1])
    return f"{small[0]}x{small[1]} to {large[0]}x{large[1]} pixels, median {median[0]}x{median[1]}"
