"""From a trained DeepSpeed engine to a checkpoint of the model, under every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crem.checkpoint import save_model
from crem.data.collator import Collator
from crem.distributed import rank

__all__ = ["export", "full_state_dict"]


def export(engine: Any, collator: Collator, folder: str | Path) -> str:
    """Write the model's checkpoint on rank 0; every rank must call. Returns the fingerprint on rank 0, "" elsewhere."""
    weights = full_state_dict(engine)
    return save_model(engine.module, collator, folder, state_dict=weights) if rank() == 0 else ""


def full_state_dict(engine: Any) -> dict[str, Tensor]:
    """Unpartitioned weights of the module on the CPU of rank 0; an empty dict on the other ranks.

    Partitioned parameters (ZeRO-3) are gathered one by one, so a device never holds more than one of them in full.
    """
    import deepspeed

    weights: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters(remove_duplicate=False):
            partitioned = [parameter] if hasattr(parameter, "ds_id") else []
            with deepspeed.zero.GatheredParameters(partitioned):
                if rank() == 0:
                    weights[name] = parameter.detach().cpu().clone()
        if rank() == 0:
            buffers = dict(engine.module.named_buffers())
            persistent = set(engine.module.state_dict()) - set(weights)
            weights |= {name: buffers[name].cpu().clone() for name in persistent if name in buffers}
    return weights
