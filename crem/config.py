"""Typed configuration of every run: one frozen tree, validated once at the edge.

``load_config("micro", ["train.steps=100"])`` reads ``presets/micro.yaml``, applies the overrides and returns a
``RunConfig``. A preset may be short: ``base: 2b`` lays it over another one. Unknown keys are refused with the nearest
known name. This module imports neither torch nor Ray, so that ``crem --help`` and ``--print-config`` are immediate.

Sources of defaults, named at each field: *paper* is arXiv 2602.19091; *VLM2Vec-V2* is that project's public
recipe for the same backbone (Qwen2-VL-2B on 8 H100), used where the paper leaves a value open; *ours* is a choice
of this project.
"""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crem.errors import ConfigError

__all__ = [
    "AblateConfig",
    "BackboneShape",
    "DataConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "GraftConfig",
    "ImageConfig",
    "IndexConfig",
    "LoraSettings",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PrepareConfig",
    "PromptConfig",
    "RunConfig",
    "ServeConfig",
    "TrainConfig",
    "load_config",
    "preset_names",
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PromptConfig(_Section):
    """The compression-based prompt (method.md section 2)."""

    system: str = "You are a helpful assistant."
    """System turn; source: paper. An empty string drops the turn."""
    embedding_instruction: str = "Represent the given content for retrieval."
    """Instruction before the chorus tokens when a row brings none. Source: ours, after VLM2Vec's task instructions."""
    generation_instruction: str = "Describe the content."
    """Instruction after the chorus tokens when the caller gives none. Source: ours."""
    max_text_tokens: int = Field(1024, ge=1)
    """Longer texts are cut at this many tokens, with one warning. Source: ours (VLM2Vec-V2 trains at about 1k)."""
    max_answer_tokens: int = Field(256, ge=1)
    """Training answers are cut at this many tokens. Source: ours."""
    template_visible: bool = True
    """Whether Q and A may see the template tokens before the sample (system turn) when z = 1. Source: open in the
    paper; visible, because they carry nothing of the sample."""


class ImageConfig(_Section):
    """Bounds on images; checked on the header, before pixels are decoded."""

    min_pixels: int = Field(4 * 28 * 28, ge=1)
    """Smaller images are enlarged to this area. Source: VLM2Vec-V2 (4 x 28^2)."""
    max_pixels: int = Field(1280 * 28 * 28, ge=1)
    """Larger images are shrunk to this area. Source: VLM2Vec-V2 (1280 x 28^2)."""
    max_source_pixels: int = Field(64_000_000, ge=1)
    """An encoded image that declares more pixels is refused unread. Source: ours."""
    max_source_bytes: int = Field(32 * 2**20, ge=1)
    """An encoded image with more bytes is refused unread. Source: ours."""
    max_images_per_item: int = Field(16, ge=1)
    """Source: ours."""


class LoraSettings(_Section):
    """Low-rank adaptation through PEFT; the chorus rows stay fully trainable."""

    r: int = Field(16, ge=1)
    """Source: VLM2Vec-V2."""
    alpha: int = Field(64, ge=1)
    """Source: VLM2Vec-V2."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Source: VLM2Vec-V2."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the language model that get an adapter. Source: VLM2Vec-V2."""


class BackboneShape(_Section):
    """A Qwen2-VL of any size, built from scratch (no pretrained weights). Names are transformers' own."""

    vocab_size: int = Field(2048, ge=300)
    hidden_size: int = Field(192, ge=8)
    intermediate_size: int = Field(512, ge=8)
    num_hidden_layers: int = Field(4, ge=1)
    num_attention_heads: int = Field(6, ge=1)
    num_key_value_heads: int = Field(2, ge=1)
    max_position_embeddings: int = Field(4096, ge=64)
    vision_depth: int = Field(3, ge=1)
    vision_embed_dim: int = Field(128, ge=8)
    vision_num_heads: int = Field(4, ge=1)
    patch_size: int = Field(8, ge=2)
    spatial_merge_size: int = Field(2, ge=1)
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> BackboneShape:
        for width, heads, name in (
            (self.hidden_size, self.num_attention_heads, "hidden_size / num_attention_heads"),
            (self.num_attention_heads, self.num_key_value_heads, "num_attention_heads / num_key_value_heads"),
            (self.vision_embed_dim, self.vision_num_heads, "vision_embed_dim / vision_num_heads"),
        ):
            if width % heads:
                raise ValueError(f"{name} = {width} / {heads} is not whole; choose a divisor")
        head_dim = self.hidden_size // self.num_attention_heads
        if head_dim % 2 or (self.vision_embed_dim // self.vision_num_heads) % 4:
            raise ValueError("rotary embedding needs an even text head size and a vision head size divisible by 4")
        return self


class GraftConfig(_Section):
    """The new vision tower of a grafted language model (``crem graft``): 3.7 M parameters as it is here.

    Source: ours; patches and merging are Qwen2-VL's.
    """

    vision_depth: int = Field(6, ge=1)
    vision_embed_dim: int = Field(192, ge=8)
    vision_num_heads: int = Field(3, ge=1)
    patch_size: int = Field(14, ge=2)
    spatial_merge_size: int = Field(2, ge=1)


class ModelConfig(_Section):
    """Which backbone, how many chorus tokens, what is trained."""

    backbone: str | None = "Qwen/Qwen2-VL-2B-Instruct"
    """Checkpoint directory, URI or hub name of a Qwen2-VL; ``null`` builds ``scratch``. Source: paper."""
    scratch: BackboneShape | None = None
    """Shape of a backbone trained from scratch; used where ``backbone`` is null."""
    chorus_tokens: int = Field(16, ge=0, le=256)
    """K. Source: paper, main results. 0 is the baseline without them: the state of an end-of-text token is the
    embedding, as in VLM2Vec."""
    nested_chorus: tuple[int, ...] = ()
    """Chorus counts K' that training draws from, one for each step; any of them can then be chosen at run time. Empty
    is only K, as in the paper. Source: ours, after Matryoshka representations (arXiv 2205.13147)."""
    lora: LoraSettings | None = LoraSettings()
    """``null`` means full fine-tuning. Source: VLM2Vec-V2."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the weights at inference and of frozen weights in training. Source: VLM2Vec-V2 (bf16)."""
    gradient_checkpointing: bool = False
    """Recompute activations of each layer in the backward pass. Source: ours."""
    prompt: PromptConfig = PromptConfig()
    image: ImageConfig = ImageConfig()

    @model_validator(mode="after")
    def _one_backbone(self) -> ModelConfig:
        if (self.backbone is None) == (self.scratch is None):
            raise ValueError("set exactly one of model.backbone (pretrained) and model.scratch (from scratch)")
        return self

    @model_validator(mode="after")
    def _nested_counts(self) -> ModelConfig:
        wrong = [k for k in self.nested_chorus if not 1 <= k <= self.chorus_tokens]
        if wrong or (self.nested_chorus and max(self.nested_chorus) != self.chorus_tokens):
            raise ValueError(
                f"model.nested_chorus={list(self.nested_chorus)} must lie between 1 and model.chorus_tokens="
                f"{self.chorus_tokens} and include it"
            )
        return self

    @property
    def chorus_counts(self) -> tuple[int, ...]:
        """The chorus counts that a model of this configuration can be used with, ascending."""
        return tuple(sorted(set(self.nested_chorus))) or (self.chorus_tokens,)


class PrepareConfig(_Section):
    """Raw corpus to prepared tables."""

    encode_max_pixels: int = Field(1280 * 28 * 28, ge=64)
    """Stored images are shrunk to this area, the most the model will look at. Source: VLM2Vec-V2's pixel bound."""
    max_text_chars: int = Field(100_000, ge=1)
    """A longer text is a rejected row. Source: ours."""
    rows_per_task: int = Field(512, ge=1)
    """Rows per Ray Data task. Source: ours."""


class DataConfig(_Section):
    """Which rows a step takes."""

    retrieval_share: float = Field(0.75, ge=0, le=1)
    """Share of a batch with a query and a target (homogeneous generation turns included); the rest is heterogeneous
    generation data. Source: open in the paper; ours."""
    augment: float = Field(0.0, ge=0, le=2)
    """Strength of random changes of training pictures (shift, scale, turn, colour, blur); 0 is none. Source: the paper
    and VLM2Vec-V2 have none."""
    sub_batch: int = Field(0, ge=0)
    """Consecutive rows of one task within a batch (source-homogeneous); 0 mixes freely. VLM2Vec-V2 uses 64."""
    source_temperature: float = Field(1.0, gt=0)
    """Tasks are sampled in proportion to their size to the power of 1 / T: 1 is by size, large T is evenly. Source:
    multilingual BERT's exponential smoothing; 1 leaves the paper's data as it is."""


class LossConfig(_Section):
    """L = alpha_r * L_r + alpha_g * L_g (method.md section 4)."""

    temperature: float = Field(0.02, gt=0)
    """tau of InfoNCE. Source: VLM2Vec-V2."""
    symmetric: bool = False
    """Also the target-to-query direction. Source: VLM2Vec-V2 is one-sided."""
    alpha_r: float = Field(1.0, ge=0)
    """Source: open in the paper; 1."""
    alpha_g: float = Field(1.0, ge=0)
    """Source: open in the paper; 1."""
    false_negative_margin: float | None = Field(None, ge=0)
    """A negative whose cosine exceeds that of the own target by more than this is taken for a false negative and left
    out. ``null`` keeps it. Source: Qwen3-Embedding (arXiv 2506.05176) uses 0.1."""
    compression_probability: float = Field(0.5, ge=0, le=1)
    """p of z ~ Bernoulli(p): how often answers must come from the chorus tokens alone. Source: open; 0.5."""


class OptimConfig(_Section):
    """AdamW with linear warm-up and linear decay."""

    lr: float = Field(5e-5, gt=0)
    """Peak learning rate. Source: VLM2Vec-V2."""
    warmup_steps: int = Field(100, ge=0)
    """Source: VLM2Vec-V2."""
    weight_decay: float = Field(0.0, ge=0)
    """Source: VLM2Vec-V2 (the Trainer's default)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Source: AdamW's defaults."""
    eps: float = Field(1e-8, gt=0)
    """Source: AdamW's default."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Source: the Trainer's default, as in VLM2Vec-V2."""


class TrainConfig(_Section):
    """Shape and length of the training run."""

    steps: int = Field(5000, ge=1)
    """Source: VLM2Vec-V2."""
    global_batch: int = Field(1024, ge=2)
    """Rows per optimizer step over all workers. Source: VLM2Vec-V2."""
    chunk_rows: int = Field(0, ge=0)
    """Rows of a worker that are in memory with their activations at once (gradient caching, arXiv 2101.06983); 0 is its
    whole share of the batch, without caching. Source: ours."""
    workers: int = Field(8, ge=1)
    """Ray Train workers, one device each. Source: VLM2Vec-V2 (8 H100)."""
    min_workers: int | None = Field(None, ge=1)
    """With it the run is elastic: it goes on with as many workers as there are devices for, from this to
    ``train.workers``, each time from its newest checkpoint. Null is ``train.workers``, no more and no fewer. Workers
    may take every CPU that they fit on: choose ``train.cpus_per_worker`` so that some stay free for the tasks that
    gather rows. Source: ours."""
    resize_every_s: float = Field(60, gt=0)
    """How often an elastic run looks for devices to grow onto. Source: Ray Train's default."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage. Source: ours."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in the host's memory: AdamW's moments, master weights and gradients (``optimizer``, ZeRO 2
    and 3, arXiv 2101.06840), or the weights as well (``all``, ZeRO 3). Source: ours."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """``bfloat16`` is autocast over float32 master weights. Source: VLM2Vec-V2 (bf16)."""
    compile: bool = False
    """``torch.compile`` the layers: needs a C++ compiler and about half a minute at the first start, and not ZeRO 3,
    whose hooks gather weights within a layer. Source: ours; ``tests.bench.bench_compile``."""
    seed: int = Field(0, ge=0)
    """Fixes weights, the order of rows and every z."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints. Source: VLM2Vec-V2."""
    keep_checkpoints: int = Field(2, ge=1)
    """Source: ours."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of progress. Source: ours."""
    max_failures: int = Field(3, ge=-1)
    """Restarts by Ray Train after a worker died; -1 is without end. Source: ours (Ray's default is 0)."""
    gpus_per_worker: float = Field(1, ge=0, le=1)
    """0 trains on CPU with gloo; 1 on a GPU with NCCL. Source: VLM2Vec-V2."""
    cpus_per_worker: float = Field(8, gt=0)
    """Logical CPUs that Ray reserves for a worker. Source: ours."""
    threads_per_worker: int = Field(8, ge=1)
    """Torch threads in a worker on CPU. Source: ours."""
    validate_every: int = Field(500, ge=0)
    """Steps between validations on held-out rows; 0 is never. Source: ours, as often as checkpoints."""
    validation_rows: int = Field(256, ge=0)
    """Most rows of a validation. A table without a split ``validation…`` has as many of its training rows held out, at
    most a tenth of them; 0 holds none out and does not validate. Source: ours."""
    explosion_factor: float | None = Field(10.0, gt=1)
    """A loss above this times the median of the last 100 steps, after warm-up, ends the run; ``null`` lets it go on.
    Source: ours."""
    hang_timeout_s: float = Field(300, gt=0)
    """A worker that gives no sign of life for as long, or stands still while others wait for it, is named and killed.
    Source: ours; below the 10 minutes in which Ray Train gives up a silent worker and the 30 of its process groups."""
    tracker: Literal["none", "mlflow", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl and TensorBoard. MLflow reads MLFLOW_TRACKING_URI and
    MLFLOW_EXPERIMENT_NAME, Weights & Biases WANDB_MODE, WANDB_PROJECT and WANDB_API_KEY. Source: ours."""

    @model_validator(mode="after")
    def _compile_fits_stage(self) -> TrainConfig:
        if self.compile and self.zero_stage == 3:
            raise ValueError("train.compile needs train.zero_stage=2 or less, and it is 3")
        return self

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> TrainConfig:
        least = {"none": 0, "optimizer": 2, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"train.offload={self.offload} needs train.zero_stage={least} or more, and it is {self.zero_stage}"
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        fewest = self.workers if self.min_workers is None else self.min_workers
        if fewest > self.workers:
            raise ValueError(f"train.min_workers={fewest} is above train.workers={self.workers}")
        for workers in range(self.workers, fewest - 1, -1):
            elastic = f" (every number of workers from train.min_workers={fewest})" if workers < self.workers else ""
            if self.global_batch % workers:
                raise ValueError(
                    f"train.global_batch={self.global_batch} must be a multiple of train.workers={workers}{elastic}"
                )
            share = self.global_batch // workers
            if self.chunk_rows and share % self.chunk_rows:
                raise ValueError(
                    f"train.chunk_rows={self.chunk_rows} must divide a worker's share of the batch, "
                    f"train.global_batch / train.workers = {share}{elastic}"
                )
        return self

    def chunks(self, workers: int) -> int:
        """Chunks in which one of ``workers`` goes through its share of a batch."""
        return self.global_batch // workers // self.chunk_rows if self.chunk_rows else 1


class EmbedConfig(_Section):
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


class IndexConfig(_Section):
    """Vector store for search."""

    exact_below: int = Field(100_000, ge=0)
    """Exact (flat) search below this many vectors; an inverted-file index above. Source: the project's brief."""
    bits: Literal[4, 8, 32] = 8
    """Bits per component above the threshold. Source: parts.md's measurement of IVF1024,SQ8 (recall@10 0.980)."""
    probes: int = Field(32, ge=1)
    """Cells visited per query above the threshold. Source: ours."""


class EvaluateConfig(_Section):
    """Precision and answers on the test rows."""

    max_answers: int = Field(400, ge=1)
    """Questions answered per split and mode, an even spread over the rows. Source: ours, for CPU time."""
    max_new_tokens: int = Field(16, ge=1)
    batch_size: int = Field(64, ge=1)
    chorus_tokens: int | None = Field(None, ge=0)
    """K' of a nested model (``model.nested_chorus``); ``null`` is the model's K."""


class AblateConfig(_Section):
    """The paper's Tables 3 and 4 and Figure 4 (``crem ablate``)."""

    chorus_tokens: int = Field(16, ge=1, le=256)
    """K of the model that stands for CREM. Source: paper, main results."""
    chorus_counts: tuple[int, ...] = (1, 4, 8, 16, 32)
    """The K of Table 4, each trained apart, and the K' of the nested model. Source: paper, which also has 64."""
    compression_probability: float = Field(0.5, gt=0, le=1)
    """p of the variants with compression. Source: as ``loss.compression_probability``."""
    parallel: int = Field(1, ge=1)
    """Runs at a time, each a process of its own. Source: ours."""
    map_pictures: int = Field(200, ge=1)
    """Test pictures over which coverage and overlap of the attention maps are averaged. Source: ours."""

    @model_validator(mode="after")
    def _counts(self) -> AblateConfig:
        counts = list(self.chorus_counts)
        if len(set(counts)) != len(counts) or not all(1 <= k <= 256 for k in counts):
            raise ValueError(f"ablate.chorus_counts={counts} must be distinct and between 1 and 256")
        if self.chorus_tokens not in counts:
            raise ValueError(f"ablate.chorus_tokens={self.chorus_tokens} must be one of ablate.chorus_counts={counts}")
        return self


class ServeConfig(_Section):
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


class RunConfig(_Section):
    """Everything that describes a run."""

    preset: str = "2b"
    model: ModelConfig = ModelConfig()
    graft: GraftConfig = GraftConfig()
    prepare: PrepareConfig = PrepareConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    embed: EmbedConfig = EmbedConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    ablate: AblateConfig = AblateConfig()
    serve: ServeConfig = ServeConfig()

    def to_yaml(self) -> str:
        """The complete configuration as YAML; ``load_config`` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(p.name[:-5] for p in resources.files("crem.presets").iterdir() if p.name.endswith(".yaml"))


def load_config(preset: str | os.PathLike[str] = "2b", overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a preset and apply overrides.

    Args:
        preset: name of a shipped preset, or the path of a YAML file of the same shape.
        overrides: ``section.key=value`` strings; values are parsed as YAML (``model.lora=null``).

    Raises:
        ConfigError: unknown preset or key (the nearest known name is given), or a value out of bounds.
    """
    tree = _read_preset(preset)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. train.steps=100")
        try:
            _assign(tree, key.strip(), _read_yaml(_scientific(value), f"override {override!r}"))
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    return _validate(tree)


def _scientific(value: str) -> str:
    """YAML 1.1 reads ``5e-5`` as text; a person who types it means a number."""
    try:
        return repr(float(value)) if "e" in value.lower() else value
    except ValueError:
        return value


def _read_preset(preset: str | os.PathLike[str], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tree of a preset. One that names a ``base`` is laid over it; ``above`` are those that led here."""
    name = os.fspath(preset)
    if name in above:
        raise ConfigError(f"preset {name!r} is its own base: {' -> '.join([*above, name])}; remove one base:")
    file = Path(str(resources.files("crem.presets") / f"{name}.yaml")) if name in preset_names() else Path(name)
    if not file.is_file():
        known = preset_names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        asked = f"base of {above[-1]!r}: " if above else ""
        raise ConfigError(
            f"{asked}unknown preset {name!r}{hint} Known: {', '.join(known)}, or the path of a YAML file."
        )
    try:
        tree = _read_yaml(file.read_text(encoding="utf-8"), str(file)) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: a configuration is a mapping of sections, not a {type(tree).__name__}")
    base = tree.pop("base", None)
    return tree if base is None else _laid_over(_read_preset(str(base), (*above, name)), tree)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a mapping holds each key once; PyYAML by itself takes the last value without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise ConfigError(
                    f"{self.name}, line {line}: key {name!r} is given twice, first in line {lines[name]}; remove one"
                )
            lines[name] = line
        return node


def _read_yaml(text: str, name: str) -> Any:
    """The value of a YAML document; ``name`` is the file or override that errors name."""
    loader = _UniqueKeys(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; any other value, ``null`` too, replaces what is below it."""
    merged = dict(below)
    for key, value in above.items():
        held = merged.get(key)
        merged[key] = _laid_over(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return merged


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    for section in sections:
        below = tree.get(section)
        if below is None:
            below = tree[section] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"override {dotted!r}: {section!r} is a value, not a section")
        tree = below
    tree[leaf] = value


def _validate(tree: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from error


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where or 'config'}: {error['msg']} (got {error['input']!r})"
    siblings = _keys_at(error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), siblings, n=1, cutoff=0.4)
    hint = f"did you mean {'.'.join([*map(str, error['loc'][:-1]), near[0]])!r}?" if near else ""
    return f"unknown key {where!r}; {hint or 'known here: ' + ', '.join(siblings)}"


def _keys_at(path: tuple[Any, ...]) -> list[str]:
    """Field names of the section at ``path``; optional sections are looked through."""
    section: Any = RunConfig
    for part in path:
        if part not in section.model_fields:
            return []
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)
