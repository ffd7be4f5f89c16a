"""A small real corpus that a tiny model can learn: coloured shapes, drawn here."""

from __future__ import annotations

import io
import json
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle")


def draw(colour: str, shape: str, size: int) -> bytes:
    """PNG of a shape; ``size`` makes several drawings of the same thing."""
    image = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(image)
    box = (32 - size, 32 - size, 32 + size, 32 + size)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(32, box[1]), (box[2], box[3]), (box[0], box[3])], fill=COLOURS[colour])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_corpus(folder: Path) -> str:
    """Raw corpus of 12 things, three drawings of each; the third, of a size between, is for testing."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for colour, shape in product(COLOURS, SHAPES):
        for size, split in ((14, "train"), (20, "train"), (17, "test_size")):
            name = f"{colour}-{shape}-{size}.png"
            (folder / "images" / name).write_bytes(draw(colour, shape, size))
            turn = {"question": "Which colour is it?", "answer": colour}
            text = f"{colour} {shape}"
            rows.append(
                {"key": f"t2i/{name}", "task": "t2i", "split": split, "query_text": text, "target_images": [name]}
            )
            rows.append(
                {
                    "key": f"i2t/{name}",
                    "task": "i2t",
                    "split": split,
                    "query_images": [name],
                    "target_text": text,
                    **turn,
                }
            )
            if split == "train":
                caption = {"question": "Describe it.", "answer": f"a {text}"}
                rows.append(
                    {"key": f"cap/{name}", "task": "caption", "split": split, "query_images": [name], **caption}
                )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)
