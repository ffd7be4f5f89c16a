"""The training job: Ray Train and DeepSpeed, and what keeps a run alive, watched and understood."""
