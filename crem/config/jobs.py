"""Settings of the jobs around training, one section each. Sources are named as in ``crem.config.model``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from crem.config.section import Section

__all__ = [
    "AblateConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "GraftConfig",
    "IndexConfig",
    "PrepareConfig",
    "ServeConfig",
]


class GraftConfig(Section):
    """The new vision tower of a grafted language model (``crem graft``): 3.7 M parameters as it is here.

    Source: ours; patches and merging are Qwen2-VL's.
    """

    vision_depth: int = Field(6, ge=1)
    vision_embed_dim: int = Field(192, ge=8)
    vision_num_heads: int = Field(3, ge=1)
    patch_size: int = Field(14, ge=2)
    spatial_merge_size: int = Field(2, ge=1)


class PrepareConfig(Section):
    """Raw corpus to prepared tables."""

    encode_max_pixels: int = Field(1280 * 28 * 28, ge=64)
    """Stored images are shrunk to this area, the most the model will look at. Source: VLM2Vec-V2's pixel bound."""
    max_text_chars: int = Field(100_000, ge=1)
    """A longer text is a rejected row. Source: ours."""
    rows_per_task: int = Field(512, ge=1)
    """Rows per Ray Data task. Source: ours."""


class EmbedConfig(Section):
    """Batch embedding with a Ray Data actor pool."""

    batch_size: int = Field(64, ge=1)
    """Items per forward. Source: ours."""
    min_actors: int = Field(1, ge=1)
    max_actors: int = Field(8, ge=1)
    """Models held at once; the pool scales between the two. Source: ours."""
    cpus_per_actor: float = Field(1, gt=0)
    gpus_per_actor: float = Field(0, ge=0)
    """1 on a GPU cluster. Source: ours."""
    threads_per_actor: int = Field(1, ge=1)
    chorus_tokens: int | None = Field(None, ge=0)
    """K' of a nested model (``model.nested_chorus``); ``null`` is the model's K."""

    @model_validator(mode="after")
    def _bounds(self) -> EmbedConfig:
        if self.max_actors < self.min_actors:
            raise ValueError(f"embed.max_actors={self.max_actors} is below embed.min_actors={self.min_actors}")
        return self


class IndexConfig(Section):
    """Vector store for search."""

    exact_below: int = Field(100_000, ge=0)
    """Exact (flat) search below this many vectors; an inverted-file index above. Source: the project's brief."""
    bits: Literal[4, 8, 32] = 8
    """Bits per component above the threshold. Source: parts.md's measurement of IVF1024,SQ8 (recall@10 0.980)."""
    probes: int = Field(32, ge=1)
    """Cells visited per query above the threshold. Source: ours."""


class EvaluateConfig(Section):
    """Precision and answers on the test rows."""

    max_answers: int = Field(400, ge=1)
    """Questions answered per split and mode, an even spread over the rows. Source: ours, for CPU time."""
    max_new_tokens: int = Field(16, ge=1)
    batch_size: int = Field(64, ge=1)
    chorus_tokens: int | None = Field(None, ge=0)
    """K' of a nested model (``model.nested_chorus``); ``null`` is the model's K."""


class AblateConfig(Section):
    """The paper's Tables 3 and 4 and Figure 4 (``crem ablate``)."""

    chorus_tokens: int = Field(16, ge=1, le=256)
    """K of the model that stands for CREM. Source: paper, main results."""
    chorus_counts: tuple[int, ...] = (1, 4, 8, 16, 32)
    """The K of Table 4, each trained apart, and the K' of the nested model. Source: paper, which also has 64."""
    compression_probability: float = Field(0.5, gt=0, le=1)
    """p of the variants with compression. Source: as ``loss.compression_probability``."""
    parallel: int = Field(1, ge=1)
    """Runs at a time, each a process of its own. Source: ours."""
    map_images: int = Field(200, ge=1)
    """Test images over which coverage and overlap of the attention maps are averaged. Source: ours."""

    @model_validator(mode="after")
    def _counts(self) -> AblateConfig:
        counts = list(self.chorus_counts)
        if len(set(counts)) != len(counts) or not all(1 <= k <= 256 for k in counts):
            raise ValueError(f"ablate.chorus_counts={counts} must be distinct and between 1 and 256")
        if self.chorus_tokens not in counts:
            raise ValueError(f"ablate.chorus_tokens={self.chorus_tokens} must be one of ablate.chorus_counts={counts}")
        return self


class ServeConfig(Section):
    """Online serving with Ray Serve."""

    host: str = "127.0.0.1"
    """Loopback unless told otherwise."""
    port: int = Field(8000, ge=0, le=65535)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    target_ongoing_requests: int = Field(16, ge=1)
    max_ongoing_requests: int = Field(32, ge=1)
    max_queued_requests: int = Field(256, ge=-1)
    """Beyond it a request is answered 429. Source: ours."""
    cpus_per_replica: float = Field(1, gt=0)
    gpus_per_replica: float = Field(0, ge=0)
    threads_per_replica: int = Field(1, ge=1)
    chorus_tokens: int | None = Field(None, ge=0)
    """K' of a nested model (``model.nested_chorus``); ``null`` is the model's K."""
    max_batch_size: int = Field(32, ge=1)
    batch_wait_s: float = Field(0.01, ge=0)
    """Longest wait for a batch to fill. Source: ours."""
    max_new_tokens: int = Field(512, ge=1)
    """Upper bound of ``max_tokens`` of a request."""
    max_request_bytes: int = Field(32 * 2**20, ge=1024)
    """A larger request body is refused with 413."""
    max_inputs: int = Field(256, ge=1)
    """Most items in one embeddings request."""
