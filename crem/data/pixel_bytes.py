"""Pixels of a batch as bytes, which become the vision tower's values on the device: an eighth of the transfer.

The values are looked up in the table of ``crem.data.sequence.PixelTable``, and are those of the CPU to the last bit.

Shape suffixes: P patches, C colour channels, N pixels of a patch, V the 256 values of a byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PixelBytes", "moved"]


@dataclass(frozen=True)
class PixelBytes:
    """Of the distinct images of a batch."""

    patches_PCN: Tensor
    """uint8"""
    table_CV: Tensor
    """float32: the value of each byte of each channel"""
    frames: int
    """how often the vision tower reads every patch"""

    def values(self, device: torch.device | str) -> Tensor:
        """float32 [P, C * frames * N] on ``device``."""
        table_CV, patches_PCN = self.table_CV.to(device), moved(self.patches_PCN, device)
        channels = [table_CV[channel][patches_PCN[:, channel].int()] for channel in range(table_CV.shape[0])]
        return torch.stack(channels, 1)[:, :, None].expand(-1, -1, self.frames, -1).flatten(1)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device; to a GPU from pinned memory, so that the copy runs beside what the GPU computes."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
