"""Trains a streaming encoder for a frozen LLaVA-Video: memories of clips, and the choice among them (VideoStreaming,
arXiv 2405.16009; docs/streaming.md).

    python -m tspo_jax.train_streaming --config=configs/streaming_toy.py --config.stage=clip --run_dir=runs/clip
    python -m tspo_jax.train_streaming --config=configs/streaming_toy.py --config.stage=video --config.init=runs/clip

Stage clip learns from one clip and a question about it; stage video from streams of clips, with the selection loss at
first (questions with `evidence`), then mostly by the answer. The encoder is written to RUN_DIR/encoder, which `stream`
takes. Running the same command again resumes from the newest checkpoint, exactly; SIGTERM saves and ends with exit
status 75. Metrics, per step: loss, losses/{answer,selection}, right (answers that would be given in full), found (of
questions with evidence, a clip of it was drawn), grad_norm, learning_rate.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from tspo_jax import config as config_module
from tspo_jax.command_line import entry_point
from tspo_jax.runs.loop import define_flags, run_from_flags
from tspo_jax.streaming import training
from tspo_jax.streaming.config import StreamingTraining


def train(config: StreamingTraining, run_dir: Path, devices: Sequence[jax.Device] | None = None) -> bool:
    """Trains until `config.num_steps` updates are done. Returns False where SIGTERM stopped it before."""
    return training.train(config, run_dir, devices or jax.devices())


if __name__ == "__main__":
    define_flags()
    check = partial(config_module.check_overrides, kind=StreamingTraining)
    entry_point.run(lambda: run_from_flags(StreamingTraining, train), check=check)
