"""Trains SwinBERT (arXiv 2111.13196) to say what stretches of stored videos show.

    python -m tspo_jax.train_captioner --config=configs/captioner.py --config.data.captions=FILE.jsonl

The file has a line {"video", "start", "end", "caption"} for each caption (times in seconds, videos of the store). The
words of a caption are hidden in part and told from the video and the words before. --config.mask.kind=straight_through
learns which of the video's tokens need to look at which (the published mask, `released`, learns nothing from captions:
docs/tokens.md).

Running the same command again resumes from the newest checkpoint, exactly; SIGTERM saves and ends with exit status 75.
Metrics, per step: loss, loss/words (nats per hidden token), accuracy (share of hidden tokens that are right),
open_edges (share of the mask that is open), grad_norm, learning_rate. At the end RUN_DIR/captioner is a folder for
python -m tspo_jax.caption --model.
"""

from functools import partial
from pathlib import Path

import jax

from tspo_jax import config as config_module
from tspo_jax.captioning import training
from tspo_jax.captioning.config import CaptioningConfig
from tspo_jax.command_line import entry_point
from tspo_jax.runs.loop import define_flags, run_from_flags


def train(config: CaptioningConfig, run_dir: Path) -> bool:
    """Trains until `config.num_steps` updates are done. Returns False where SIGTERM stopped it before."""
    return training.train(config, run_dir, jax.devices())


if __name__ == "__main__":
    define_flags()
    check = partial(config_module.check_overrides, kind=CaptioningConfig)
    entry_point.run(lambda: run_from_flags(CaptioningConfig, train), check=check)
