"""Memory of a training step on one device, from shapes alone: weights, optimizer, activations.

Activations are what autograd keeps of one chunk from the forward to the backward pass, counted tensor by tensor in the
manner of Korthikanti et al. (arXiv 2205.05198), for this model: grouped key-value heads, SwiGLU, RMSNorm in float32,
fused attention (no T x T matrix), a vision tower with quick-GELU, and only answer positions at the LM head. The test
compares the count with what PyTorch really keeps. Optimizer states follow ZeRO (arXiv 1910.02054) as DeepSpeed 0.19
lays them out with float32 weights and autocast. Three parts are estimates, and the report says so: what the backward
pass allocates (``workspace``), the CUDA context with NCCL, and the allocator's fragmentation.

Letters: T text-model tokens of a chunk, P patches, A answer tokens, D and E widths of text model and vision tower, F
feed-forward width, V vocabulary, r bytes of the residual stream, c bytes of products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crem.config import BackboneShape, RunConfig
from crem.forecast.flops import Load

__all__ = ["Activations", "DeviceMemory", "Weights", "activations", "device_memory", "weights_of"]

CONTEXT_BYTES = 1_500_000_000
"""CUDA context, cuBLAS workspaces and NCCL buffers of a process. An estimate."""
PROCESS_BYTES = 1_000_000_000
"""A Ray worker's Python with torch and transformers, on CPU. An estimate."""
FRAGMENTATION = 0.05
"""Share of the allocated memory that PyTorch's allocator holds beside it. An estimate."""
_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce bucket (``reduce_bucket_size``, its default)."""
_CPU_BUCKET = 5_000_000
"""The same on CPU, as ``crem.train.optim`` sets it."""
_LIVE = 1_000_000_000
"""Elements of gathered parameters that ZeRO-3 keeps (``stage3_max_live_parameters``, its default)."""


@dataclass(frozen=True)
class Weights:
    """Parameters of a model, in elements."""

    frozen: int
    frozen_bytes: int
    trained: int
    largest: int


@dataclass(frozen=True)
class Activations:
    """Bytes of one chunk."""

    saved: float
    """kept from the forward to the backward pass, without the batch itself"""
    tables: float
    """rotary tables, a part of ``saved``"""
    recomputed: float
    """one layer's, while it is recomputed; 0 without gradient checkpointing"""
    casts: float
    """half-precision copies of float32 weights beside ``saved``, until the forward pass ends"""
    workspace: float
    """gradients and temporaries of the widest place; an estimate"""

    @property
    def peak(self) -> float:
        """The most that is held at once."""
        return self.saved + max(self.casts, self.recomputed + self.workspace)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device, and in the host's memory for it."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    overhead: float
    host: float

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.overhead


def weights_of(model: Any) -> Weights:
    """Count a model's parameters; they may be on the meta device."""
    parameters = list(model.named_parameters())
    frozen = [p for _, p in parameters if not p.requires_grad]
    trained = [p for _, p in parameters if p.requires_grad]
    return Weights(
        frozen=sum(p.numel() for p in frozen),
        frozen_bytes=sum(p.numel() * p.element_size() for p in frozen),
        trained=sum(p.numel() for p in trained),
        largest=max(p.numel() for _, p in parameters),
    )


def activations(shape: BackboneShape, chunk: Load, config: RunConfig, *, cuda: bool = True) -> Activations:
    """Memory of a chunk's forward and backward pass.

    Args:
        cuda: PyTorch on CPU keeps a dropout mask in the input's dtype, not in a byte, and its autocast leaves LayerNorm
            in half precision.
    """
    layer = _Sizes(shape, chunk, config, cuda)
    text, vision = layer.decoder_layer(), layer.vision_block()
    outside = layer.outside_of_layers()
    autocast = config.train.precision == "bfloat16"
    casts = layer.weight_casts() if autocast else (0, 0)
    workspace = layer.workspace()
    if config.model.gradient_checkpointing:
        saved = shape.num_hidden_layers * layer.r * chunk.tokens * shape.hidden_size
        if layer.full:
            saved += shape.vision_depth * layer.c * chunk.patches * shape.vision_embed_dim
        return Activations(saved + outside + casts[1], layer.rotary_tables(), max(text, vision), casts[0], workspace)
    saved = shape.num_hidden_layers * text + shape.vision_depth * vision
    return Activations(saved + outside + sum(casts), layer.rotary_tables(), 0, 0, workspace)


class _Sizes:
    """Bytes that autograd keeps of the parts of the model."""

    def __init__(self, shape: BackboneShape, chunk: Load, config: RunConfig, cuda: bool):
        self.shape, self.chunk, self.lora = shape, chunk, config.model.lora
        self.full = self.lora is None
        self.autocast = config.train.precision == "bfloat16"
        self.c = 2 if self.autocast else 4
        half_weights = not self.full and config.model.dtype == "bfloat16"
        self.r = 2 if half_weights else 4
        self.norm = 4 if cuda or not self.autocast else 2
        self.mask = 1 if cuda else 4
        self.stage = config.train.zero_stage
        self.kv_width = shape.hidden_size // shape.num_attention_heads * shape.num_key_value_heads
        self.chorus = config.model.chorus_tokens

    def decoder_layer(self) -> float:
        """Two norms, attention, SwiGLU, and the adapters at their linear layers."""
        T, D, F = self.chunk.tokens, self.shape.hidden_size, self.shape.intermediate_size
        A = self.chunk.attended or T
        attention = self.c * A * 2 * (D + self.kv_width) + 4 * A * self.shape.num_attention_heads  # q k v out, sums
        if self.lora is not None:
            return 2 * self._rms_norm() + attention + 3 * self.c * T * F + self._adapters()
        # autocast casts the same input anew for each of q, k, v and of gate, up
        inputs = (3 + 2 if self.autocast else 2) * self.c * T * D + self.c * T * D
        return 2 * self._rms_norm() + attention + inputs + 4 * self.c * T * F

    def _rms_norm(self) -> float:
        """The input in float32, its inverse root mean square, and, where the gain is trained, the normalised input."""
        T, D = self.chunk.tokens, self.shape.hidden_size
        return 4 * T * D + 4 * T + (self.r * T * D if self.full else 0)

    def _adapters(self) -> float:
        assert self.lora is not None
        D, F, T = self.shape.hidden_size, self.shape.intermediate_size, self.chunk.tokens
        shared = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
        own_copy = self.autocast or self.lora.dropout > 0
        inputs = {
            name if own_copy else shared.get(name, name): F if name == "down_proj" else D for name in self._targets
        }
        masks = sum(F if name == "down_proj" else D for name in self._targets) if self.lora.dropout else 0
        return T * (self.c * sum(inputs.values()) + self.mask * masks + self.c * self.lora.r * len(self._targets))

    @property
    def _targets(self) -> tuple[str, ...]:
        return () if self.lora is None else self.lora.targets

    def vision_block(self) -> float:
        """Two norms, attention, quick-GELU; nothing where the tower is frozen, because pixels need no gradient."""
        if not self.full:
            return 0
        P, E = self.chunk.patches, self.shape.vision_embed_dim
        attention = self.c * P * 5 * E + 4 * P * self.shape.vision_num_heads
        return 2 * (self.norm * P * E + 8 * P) + attention + self.c * P * (2 * E + 3 * 4 * E)

    def outside_of_layers(self) -> float:
        """Patch projection, merger, final norm, rotary tables, LM head with its log-softmax."""
        P, A, D = self.chunk.patches, self.chunk.answer_tokens, self.shape.hidden_size
        text = self._rms_norm() + self.rotary_tables() + 2 * self.chunk.tokens
        head = self.c * A * D + 4 * A * self.shape.vocab_size
        pooled = self.chunk.sequences * D * 4
        if not self.full:
            # PEFT writes the chorus rows into a copy of the embedding, which a tied LM head keeps
            kept = self.chorus and self.shape.tie_word_embeddings and self.r == self.c
            return text + head + pooled + self.r * self.shape.vocab_size * D * bool(kept)
        E, patch = self.shape.vision_embed_dim, 3 * 2 * self.shape.patch_size**2
        vision = self.c * P * patch * self.autocast + self.norm * P * E + 8 * P + 3 * self.c * P * E
        return text + head + pooled + vision

    def rotary_tables(self) -> float:
        """Cosines and sines of every position, for all layers of each tower."""
        s = self.shape
        text = 2 * self.r * self.chunk.tokens * (s.hidden_size // s.num_attention_heads)
        return text + self.full * 8 * self.chunk.patches * (s.vision_embed_dim // s.vision_num_heads)

    def weight_casts(self) -> tuple[int, int]:
        """Half-precision copies of float32 matrices: in the layers, and outside of them.

        Under ZeRO-3 DeepSpeed gathers the weights of linear layers in half precision, so that there are none.
        """
        s, D, E = self.shape, self.shape.hidden_size, self.shape.vision_embed_dim
        if self.stage == 3:
            return 0, 0
        if self.lora is not None:
            widths = {"q_proj": 2 * D, "o_proj": 2 * D, "down_proj": s.intermediate_size + D}
            widths |= dict.fromkeys(("k_proj", "v_proj"), D + self.kv_width)
            widths |= dict.fromkeys(("gate_proj", "up_proj"), D + s.intermediate_size)
            adapters = 2 * s.num_hidden_layers * self.lora.r * sum(widths[name] for name in self._targets)
            if self.r == 2:
                return adapters, 0
            layer = D * (2 * D + 2 * self.kv_width) + 3 * D * s.intermediate_size
            return adapters + 2 * s.num_hidden_layers * layer, 2 * s.vocab_size * D
        layer = D * (2 * D + 2 * self.kv_width) + 3 * D * s.intermediate_size
        block = 4 * E * E + 8 * E * E
        merged = E * s.spatial_merge_size**2
        return (
            2 * (s.num_hidden_layers * layer + s.vision_depth * block),
            2 * (s.vocab_size * D + merged * merged + merged * D),
        )

    def workspace(self) -> float:
        """Gradients beside the widest tensors: SwiGLU's three, the vision MLP's two with its input, the logits' two."""
        T, P, A = self.chunk.tokens, self.chunk.patches, self.chunk.answer_tokens
        text = 3 * self.c * T * self.shape.intermediate_size
        vision = self.c * P * (2 * 4 + 3) * self.shape.vision_embed_dim
        logits = (4 + self.c) * A * self.shape.vocab_size
        return max(text, vision, logits)


def device_memory(
    config: RunConfig, weights: Weights, chunk: Activations, ranks: int, *, cuda: bool = True
) -> DeviceMemory:
    """Bytes on each of ``ranks`` devices, laid out as DeepSpeed does."""
    bucket = _BUCKET if cuda else _CPU_BUCKET
    stage, offload = config.train.zero_stage, config.train.offload
    trained, part = 4 * weights.trained, 4 * -(-weights.trained // ranks)
    resident, gradients, master, host = trained + weights.frozen_bytes, trained, 0, 0
    moments = 2 * trained if stage == 0 else 2 * part
    buffers = 0
    if stage in (1, 2):
        master = part  # a copy beside the weights, which are float32 too
        buffers = 4 * bucket
        gradients = part if stage == 2 else trained
    if stage == 3:
        resident, gradients = -(-resident // ranks), part
        # one bucket for each dtype that gradients are reduced in: products' and norms'
        buffers = (4 + 2 * (config.train.precision == "bfloat16")) * bucket
        per_weight = 2 if config.train.precision == "bfloat16" else 4
        buffers += per_weight * min(_LIVE, weights.trained + weights.frozen) + 2 * per_weight * weights.largest
    if offload != "none":
        host = moments + part + gradients
        moments, master, gradients = 0, 0, 4 * weights.largest
    if offload == "all":
        host, resident = host + resident, 0
    # torch's AdamW updates all tensors at once and needs twice their size; the activations are freed by then
    update = 0 if offload != "none" else 2 * part
    working = max(chunk.peak, update)
    overhead = (CONTEXT_BYTES if cuda else PROCESS_BYTES) + int(
        FRAGMENTATION * (resident + gradients + moments + master + buffers + working)
    )
    return DeviceMemory(resident, gradients, moments + master, buffers, working, overhead, host)
