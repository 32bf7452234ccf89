"""Trains TESTA (arXiv 2310.19060), or BLIP as a video model, to find stored videos by what is said of them.

    python -m tspo_jax.train_retriever --config=configs/retriever.py --config.data.captions=FILE.jsonl

The file has a line {"video", "start", "end", "caption"} for each caption (times in seconds, videos of the store).
Running the same command again resumes from the newest checkpoint, exactly; SIGTERM saves and ends with exit status 75.
Metrics, per step: loss = loss/contrast + loss/matching, recall (share of the batch's captions whose video is the likest
of the batch), temperature, grad_norm. At the end RUN_DIR/retriever is a folder for python -m tspo_jax.retrieve --model.
"""

from functools import partial
from pathlib import Path

import jax

from tspo_jax import config as config_module
from tspo_jax.command_line import entry_point
from tspo_jax.retrieval import training
from tspo_jax.retrieval.config import RetrievalConfig
from tspo_jax.runs.loop import define_flags, run_from_flags


def train(config: RetrievalConfig, run_dir: Path) -> bool:
    """Trains until `config.num_steps` updates are done. Returns False where SIGTERM stopped it before."""
    return training.train(config, run_dir, jax.devices())


if __name__ == "__main__":
    define_flags()
    check = partial(config_module.check_overrides, kind=RetrievalConfig)
    entry_point.run(lambda: run_from_flags(RetrievalConfig, train), check=check)
