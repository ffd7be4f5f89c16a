"""M-RoPE positions of a full, unpruned sequence, computed in numpy while collating.

transformers' ``get_rope_index`` needs the model, loops over samples on the device and refuses a 4-D mask; it is the
oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["rope_positions"]


def rope_positions(
    is_image_T: NDArray[np.bool_], grids: Sequence[tuple[int, int, int]], merge_size: int
) -> NDArray[np.int64]:
    """M-RoPE positions (time, height, width) of one sequence; int64 [3, T] (method.md section 3).

    Text advances all three by one; an image of h x w merged patches fills a plane and advances by max(h, w).

    Args:
        is_image_T: True at vision tokens (not at their start and end marks).
        grids: (t, h, w) in patches, one per image.
        merge_size: patches per token along each side.
    """
    positions = np.empty((3, len(is_image_T)), dtype=np.int64)
    at = here = 0
    for t, h, w in grids:
        rows, columns = h // merge_size, w // merge_size
        start = at + int(np.argmax(is_image_T[at:]))
        positions[:, at:start] = here + np.arange(start - at)
        here += start - at
        plane = np.indices((t, rows, columns)).reshape(3, -1)
        at = start + plane.shape[1]
        assert is_image_T[start:at].all(), "fewer vision tokens than the image grids need"
        positions[:, start:at] = here + plane
        here += max(rows, columns)
    assert not is_image_T[at:].any(), "more vision tokens than image grids"
    positions[:, at:] = here + np.arange(len(is_image_T) - at)
    return positions
