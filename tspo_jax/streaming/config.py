"""The configuration of training a streaming encoder (train_streaming)."""

import dataclasses

from ml_collections import ConfigDict

from tspo_jax import config as config_module
from tspo_jax.config import GENERAL_MAY_DIFFER, MAX_BAD, Answerer, ConfigError, General, group

STAGES = ("clip", "video")
MAY_DIFFER = (*GENERAL_MAY_DIFFER, "data.decode_threads", "data.max_bad", "answerer.attention")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Sizes (models/streaming.py); the answerer's are added."""

    frames: int = 16  # of a clip
    cells: int = 4  # summary tokens of a frame
    width: int = 1024
    num_layers: int = 8
    num_heads: int = 16
    num_kv_heads: int = 4
    hidden: int = 4096
    selected: int = 4  # clips that an answer is given from
    temperature: float = 0.1
    gradient_scale: float = 1.0  # of the gradient to the scores through the picks


@dataclasses.dataclass(frozen=True)
class ClipData:
    store: str = ""  # folder of the frame store made by predecode
    questions: str = ""  # jsonl file in the TSPO-10K format; `evidence` labels the clips
    max_bad: float = MAX_BAD  # share of bad lines above which the file is a wrong one and the run ends
    clips: int = 32  # of a video in stage video, evenly spread where it has more
    decode_threads: int = 16


@dataclasses.dataclass(frozen=True)
class ClipOptimizer:
    learning_rate: float = 1e-4  # after a linear warm-up; then it falls as a cosine to 0
    warmup: float = 0.05  # share of the steps
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class StreamingTraining(General):
    stage: str = "clip"  # one clip; or video: a stream of clips, and the selection among them
    init: str = ""  # stage video: folder of the encoder of stage clip, or the run that made it; "" = a fresh one
    labelled_steps: int = 0  # stage video: first steps with the selection loss at weight 1
    kept: float = 0.1  # its weight after them
    cut_every: int = 0  # gradients do not reach back over every so many clips; 0 = they reach back to the first
    answerer: Answerer = group(Answerer)
    encoder: Encoder = group(Encoder)
    data: ClipData = group(ClipData)
    optimizer: ClipOptimizer = group(ClipOptimizer)

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ConfigError(f"config.stage is {self.stage!r}, not one of {', '.join(STAGES)}")
        if self.stage == "clip" and (self.init or self.labelled_steps):
            raise ConfigError("config.init and config.labelled_steps are of stage video: stage clip selects nothing")
        if self.data.clips < 1:
            raise ConfigError(f"config.data.clips is {self.data.clips}; at least 1")


def default() -> ConfigDict:
    return config_module.default(StreamingTraining)
