"""DeepSpeed: one configuration from ours, one engine.

On CPU DeepSpeed needs ``DS_ACCELERATOR=cpu`` in the environment before it is imported, and torch's own AdamW, because
its fused CPU optimizer wants a compiler and bf16 hardware; both are set by the job that starts the workers and here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from crem.config import RunConfig
from crem.distributed import world_size
from crem.model.backbone import compile_layers
from crem.model.crem import CremModel

__all__ = ["deepspeed_config", "initialise", "learning_rate_share", "parameter_groups"]


def deepspeed_config(config: RunConfig, ranks: int, device: str) -> dict[str, Any]:
    """DeepSpeed's configuration for ``ranks`` workers on ``device`` ("cpu" or "cuda")."""
    optim, train = config.optim, config.train
    zero: dict[str, Any] = {"stage": train.zero_stage}
    # pinned memory lets copies overlap with computation, which only a GPU does
    host = {"device": "cpu", "pin_memory": device != "cpu"}
    if train.offload != "none":
        zero["offload_optimizer"] = host
    if train.offload == "all":
        zero["offload_param"] = host
    # torch's AdamW everywhere: DeepSpeed's own is compiled at the first start, with a CUDA toolkit of torch's version
    adamw: dict[str, Any] = {"lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": 0.0}
    adamw["torch_adam"] = True
    if device == "cpu":
        # the buckets' defaults reserve gigabytes, which a small machine does not have
        zero |= {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
        if train.zero_stage == 3:
            zero |= {"stage3_prefetch_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 10_000}
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.global_batch // ranks // train.chunks(ranks),
        "gradient_accumulation_steps": train.chunks(ranks),
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": adamw},
        # fp32 weights and optimizer, bf16 products: PyTorch's autocast, driven by DeepSpeed
        "torch_autocast": {"enabled": train.precision == "bfloat16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def learning_rate_share(step: int, warmup_steps: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up from 0, then linear decay to 0 after the last step.

    Source: transformers' linear schedule, which VLM2Vec-V2 trains with. (DeepSpeed's WarmupDecayLR stays at 0 for the
    first two steps and knows no schedule without warm-up.)
    """
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


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


def initialise(model: CremModel, config: RunConfig, device: torch.device) -> Any:
    """A ``deepspeed.DeepSpeedEngine`` around the model, with optimizer and learning-rate schedule."""
    import deepspeed
    import deepspeed.ops

    # On CPU DeepSpeed would compile a shared-memory reduction that only its inference calls. A process that is killed
    # while it compiles leaves torch's lock file behind, and every later start on that machine waits for it forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config.train.compile:
        compile_layers(model.core)
    warmup_steps, steps = config.optim.warmup_steps, config.train.steps
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, config.optim.weight_decay),
        config=deepspeed_config(config, world_size(), device.type),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: learning_rate_share(step, warmup_steps, steps)),
        dist_init_required=False,
    )
    return engine
