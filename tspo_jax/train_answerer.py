"""Trains the answering Video-MLLM by temporal preference optimisation (TPO, arXiv 2501.13919): DPO + SFT on pairs.

    python -m tspo_jax.train_answerer --config=configs/tpo_llava_video_7b.py [--config.preference.beta=0.1 ...]

The pairs come from build_pairs, or any file of TPO's form. A pair is one sequence [video, prompt | chosen | rejected];
its frames are encoded once. LoRA adapters of the language model are trained, or, with --config.full, the language model
and the projector. `python -m tspo_jax.export` writes a PEFT folder (`--adapter=DIR` elsewhere) or a merged answerer.

Running the same command again resumes from the newest checkpoint, exactly; SIGTERM saves and ends with exit status 75.
Metrics, per step, under TRL's names: loss (alpha losses/dpo + gamma losses/sft; about alpha log 2 + gamma losses/sft at
the first step), rewards/{chosen,rejected,margins} (beta times the log-ratio to the reference; 0 at the first step),
rewards/accuracies (share of pairs whose chosen answer has strictly more: 0, not 0.5, while nothing is learnt),
rewards/margin_per_token, logps/*, ref_logps/*, tokens/* (of an answer), grad_norm (before clipping), learning_rate (0
at the first step of a warm-up); on held-out pairs the same as eval_*, and eval_accuracy/{full,evidence,without}.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from tspo_jax import config as config_module
from tspo_jax.command_line import entry_point
from tspo_jax.runs.loop import define_flags, run_from_flags
from tspo_jax.tpo import training
from tspo_jax.tpo.config import TpoConfig


def train(config: TpoConfig, run_dir: Path, devices: Sequence[jax.Device] | None = None) -> bool:
    """Trains until `config.num_steps` updates are done. Returns False where SIGTERM stopped it before."""
    return training.train(config, run_dir, devices or jax.devices())


if __name__ == "__main__":
    define_flags()
    check = partial(config_module.check_overrides, kind=TpoConfig)
    entry_point.run(lambda: run_from_flags(TpoConfig, train), check=check)
