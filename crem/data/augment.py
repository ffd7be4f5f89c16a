"""Random changes of a training image that leave its meaning alone: a small shift, scale and turn, colour and blur.

A model trained from scratch on few drawings of each concept learns the drawing style along with the concept;
augmentation counters that. Off by default: neither the paper nor VLM2Vec-V2 augments. The change is a pure function of
the generator, which the caller seeds from run, step and row, so a resumed run reads the same images."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

__all__ = ["augmented"]


def augmented(image: Image.Image, strength: float, draw: np.random.Generator) -> Image.Image:
    """``image`` (RGB) changed at random; ``strength`` 1 shifts up to 9 %, scales up to 13 %, turns up to 9 degrees.

    Uncovered background is white.
    """
    if strength <= 0:
        return image
    image = _moved(image, strength, draw)
    for enhancer, spread in ((ImageEnhance.Color, 0.5), (ImageEnhance.Brightness, 0.15), (ImageEnhance.Contrast, 0.25)):
        image = enhancer(image).enhance(1 + strength * draw.uniform(-spread, spread))
    if draw.random() < 0.3 * strength:
        image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0.3, 1.2) * max(image.size) / 96))
    return image


def _moved(image: Image.Image, strength: float, draw: np.random.Generator) -> Image.Image:
    width, height = image.size
    scale = math.exp(strength * draw.uniform(-0.13, 0.13))
    turn = math.radians(strength * draw.uniform(-9, 9))
    shift_x, shift_y = (strength * draw.uniform(-0.09, 0.09) * side for side in (width, height))
    a, b = math.cos(turn) * scale, math.sin(turn) * scale
    # maps a point of the result to a point of the source, around the centre
    x0, y0 = width / 2, height / 2
    matrix = (a, b, x0 - a * x0 - b * y0 + shift_x, -b, a, y0 + b * x0 - a * y0 + shift_y)
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255)
    )
