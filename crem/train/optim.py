"""DeepSpeed: one configuration from ours, one engine.

On CPU DeepSpeed needs ``DS_ACCELERATOR=cpu`` in the environment before it is imported, and torch's own AdamW, because
its fused CPU optimizer wants a compiler and bf16 hardware; both are set by the job that starts the workers and here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from crem.config import RunConfig
from crem.distributed import world_size

__all__ = ["deepspeed_config", "initialise", "parameter_groups"]


def deepspeed_config(config: RunConfig, ranks: int, device: str) -> dict[str, Any]:
    """DeepSpeed's configuration for ``ranks`` workers on ``device`` ("cpu" or "cuda")."""
    optim, train = config.optim, config.train
    zero: dict[str, Any] = {"stage": train.zero_stage}
    adamw: dict[str, Any] = {"lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": 0.0}
    if device == "cpu":
        adamw["torch_adam"] = True
        # the buckets' defaults reserve gigabytes, which a small machine does not have
        zero |= {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
        if train.zero_stage == 3:
            zero |= {"stage3_prefetch_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 10_000}
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.global_batch // ranks,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": adamw},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": 0.0,
                "warmup_max_lr": optim.lr,
                "warmup_num_steps": max(optim.warmup_steps, 2),
                "warmup_type": "linear",
                "total_num_steps": max(train.steps, optim.warmup_steps + 1, 3),
            },
        },
        # fp32 weights and optimizer, bf16 products: PyTorch's autocast, driven by DeepSpeed
        "torch_autocast": {"enabled": train.precision == "bfloat16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: weight decay applies to matrices, not to gains, biases and embeddings."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(matrix) > 1 and "embed_tokens" not in name else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def initialise(model: nn.Module, config: RunConfig, device: torch.device) -> Any:
    """A ``deepspeed.DeepSpeedEngine`` around the model, with optimizer and learning-rate schedule."""
    import deepspeed

    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, config.optim.weight_decay),
        config=deepspeed_config(config, world_size(), device.type),
        dist_init_required=False,
    )
    return engine
