"""The configuration of training a retriever."""

import dataclasses

from tspo_jax import config as config_module
from tspo_jax.config import GENERAL_MAY_DIFFER, ConfigError, General, group

MAY_DIFFER = (*GENERAL_MAY_DIFFER, "data.decode_threads")


@dataclasses.dataclass(frozen=True)
class RetrievalData:
    store: str = ""  # folder of the frame store made by predecode
    captions: str = ""  # jsonl file: {"video", "start", "end", "caption"}, times in seconds
    decode_threads: int = 16


@dataclasses.dataclass(frozen=True)
class Contrast:
    """The contrastive loss (ALBEF's, as in BLIP). Defaults are those of TESTA's fine-tuning."""

    momentum: float = 0.995  # of the copies that targets come from
    queue: int = 32  # features of earlier batches that are compared as well, a multiple of batch_size; 0 = none
    alpha: float = 0.4  # weight of the copies' own judgement in the targets
    ramp: float = 0.1  # share of the steps over which alpha rises from 0


@dataclasses.dataclass(frozen=True)
class RetrievalOptimizer:
    """AdamW; the learning rate falls as a cosine to 0."""

    learning_rate: float = 1e-5
    weight_decay: float = 0.05
    max_grad_norm: float = 0.0  # 0 = not clipped


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(General):
    batch_size: int = 32  # captions per step, over all devices
    model: str = ""  # folder of TESTA or BLIP
    num_frames: int = 0  # seen together; 0 = as the folder says
    testa_r: tuple[int, ...] = ()  # [frames, patches] that each block merges; () = as the folder says
    data: RetrievalData = group(RetrievalData)
    contrast: Contrast = group(Contrast)
    optimizer: RetrievalOptimizer = group(RetrievalOptimizer)

    def __post_init__(self):
        """Raises ConfigError for values that make no sense."""
        if self.contrast.queue % self.batch_size:
            raise ConfigError(
                f"config.contrast.queue is {self.contrast.queue}: it must be a multiple of batch_size {self.batch_size}"
            )
        for name in ("momentum", "alpha", "ramp"):
            if not 0 <= (value := getattr(self.contrast, name)) <= 1:
                raise ConfigError(f"config.contrast.{name} is {value}, it must be 0 to 1")


def default():
    """Every field with its default, for a file in configs/."""
    return config_module.default(RetrievalConfig)
