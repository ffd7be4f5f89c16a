"""Settings of a training run: rows, losses, optimizer, workers. Sources are named as in ``crem.config.model``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from crem.config.section import Section

__all__ = ["DataConfig", "LossConfig", "OptimConfig", "TrainConfig"]


class DataConfig(Section):
    """How a step's rows are chosen."""

    retrieval_share: float = Field(0.75, ge=0, le=1)
    """Share of a batch with a query and a target (homogeneous generation turns included); the rest is heterogeneous
    generation data. Source: ours; the paper does not say."""
    augment: float = Field(0.0, ge=0, le=2)
    """Strength of random augmentation of training images (shift, scale, rotation, colour, blur); 0 is none. Source: the
    paper and VLM2Vec-V2 have none."""
    sub_batch: int = Field(0, ge=0)
    """Consecutive rows of one task within a batch (source-homogeneous); 0 mixes tasks freely. VLM2Vec-V2 uses 64."""
    source_temperature: float = Field(1.0, gt=0)
    """Tasks are sampled in proportion to their size to the power of 1 / T: 1 is by size, a large T is uniform. Source:
    multilingual BERT's exponential smoothing; 1 leaves the paper's data as it is."""


class LossConfig(Section):
    """L = alpha_r * L_r + alpha_g * L_g (method.md §4)."""

    temperature: float = Field(0.02, gt=0)
    """tau of InfoNCE. Source: VLM2Vec-V2."""
    symmetric: bool = False
    """Add the target-to-query direction. Source: VLM2Vec-V2 has query-to-target alone."""
    alpha_r: float = Field(1.0, ge=0)
    """Source: ours; the paper does not say."""
    alpha_g: float = Field(1.0, ge=0)
    """Source: ours; the paper does not say."""
    false_negative_margin: float | None = Field(None, ge=0)
    """A negative whose cosine exceeds the target's by more than this counts as a false negative and is masked. ``null``
    masks none. Source: Qwen3-Embedding (arXiv 2506.05176) uses 0.1."""
    compression_probability: float = Field(0.5, ge=0, le=1)
    """p of z ~ Bernoulli(p): how often an answer must come from the chorus tokens alone. Source: ours; the paper
    does not say."""


class OptimConfig(Section):
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


class TrainConfig(Section):
    """Shape and length of the training run."""

    steps: int = Field(5000, ge=1)
    """Source: VLM2Vec-V2."""
    global_batch: int = Field(1024, ge=2)
    """Rows per optimizer step, over all workers. Source: VLM2Vec-V2."""
    chunk_rows: int = Field(0, ge=0)
    """Rows whose activations a worker keeps in memory at once (gradient caching, arXiv 2101.06983); 0 is its full share
    of the batch, without caching. Source: ours."""
    workers: int = Field(8, ge=1)
    """Ray Train workers, one device each. Source: VLM2Vec-V2 (8 H100)."""
    min_workers: int | None = Field(None, ge=1)
    """Makes the run elastic: it continues from its newest checkpoint with as many workers as devices allow, from this
    to ``train.workers``. ``null`` means exactly ``train.workers``. Workers may take every CPU that they fit on: choose
    ``train.cpus_per_worker`` so that some stay free for the tasks that gather rows. Source: ours."""
    resize_every_s: float = Field(60, gt=0)
    """Seconds between an elastic run's checks for more devices. Source: Ray Train's default."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage. Source: ours."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in host memory: AdamW's moments, master weights and gradients (``optimizer``, ZeRO 2
    and 3, arXiv 2101.06840), or the weights as well (``all``, ZeRO 3). Source: ours."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """``bfloat16`` is autocast over float32 master weights. Source: VLM2Vec-V2 (bf16)."""
    compile: bool = False
    """``torch.compile`` the layers: needs a C++ compiler, about half a minute at the first start, and a ZeRO stage
    below 3, whose hooks gather weights within a layer. Source: ours; ``tests.bench.bench_compile``."""
    seed: int = Field(0, ge=0)
    """Fixes the initial weights, the order of rows and every z."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints. Source: VLM2Vec-V2."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints to keep. Source: ours."""
    log_every: int = Field(10, ge=1)
    """Steps between progress lines. Source: ours."""
    max_failures: int = Field(3, ge=-1)
    """Restarts by Ray Train after a worker died; -1 means unlimited. Source: ours (Ray's default is 0)."""
    gpus_per_worker: float = Field(1, ge=0, le=1)
    """0 trains on CPU with gloo; 1 on a GPU with NCCL. Source: VLM2Vec-V2."""
    cpus_per_worker: float = Field(8, gt=0)
    """Logical CPUs that Ray reserves for a worker. Source: ours."""
    threads_per_worker: int = Field(8, ge=1)
    """Torch threads in a worker on CPU. Source: ours."""
    validate_every: int = Field(500, ge=0)
    """Steps between validations on held-out rows; 0 means never. Source: ours, as often as checkpoints."""
    validation_rows: int = Field(256, ge=0)
    """Most rows of a validation. In a table without a split ``validation…`` as many training rows are held out, at most
    a tenth of them; 0 holds none out and does not validate. Source: ours."""
    explosion_factor: float | None = Field(10.0, gt=1)
    """A loss above this times the median of the last 100 steps, after warm-up, ends the run; ``null`` never does.
    Source: ours."""
    hang_timeout_s: float = Field(300, gt=0)
    """A worker that sends no heartbeat for this long, or makes no progress while others wait for it, is named and
    killed. Source: ours; below Ray Train's 10 minutes for a silent worker and the 30 of its process groups."""
    tracker: Literal["none", "mlflow", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl and TensorBoard. MLflow reads MLFLOW_TRACKING_URI and
    MLFLOW_EXPERIMENT_NAME, Weights & Biases WANDB_MODE, WANDB_PROJECT and WANDB_API_KEY. Source: ours."""

    @model_validator(mode="after")
    def _compile_fits_stage(self) -> TrainConfig:
        if self.compile and self.zero_stage == 3:
            raise ValueError("train.compile needs train.zero_stage=2 or less; it is 3")
        return self

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> TrainConfig:
        least = {"none": 0, "optimizer": 2, "all": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"train.offload={self.offload} needs train.zero_stage={least} or more; it is {self.zero_stage}"
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
        """Chunks per step into which each of ``workers`` splits its share of the batch."""
        return self.global_batch // workers // self.chunk_rows if self.chunk_rows else 1
