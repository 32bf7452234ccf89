"""The configuration of training a captioner."""

import dataclasses

from tspo_jax import config as config_module
from tspo_jax.config import GENERAL_MAY_DIFFER, ConfigError, General, group
from tspo_jax.models.bert_captioner import MASKS

MAY_DIFFER = (*GENERAL_MAY_DIFFER, "data.decode_threads")


@dataclasses.dataclass(frozen=True)
class CaptionData:
    store: str = ""  # folder of the frame store made by predecode
    captions: str = ""  # jsonl file: {"video", "start", "end", "caption"}, times in seconds
    decode_threads: int = 16


@dataclasses.dataclass(frozen=True)
class Words:
    """Words that are hidden. Defaults are the published ones."""

    share: float = 0.5  # of a caption's tokens, [CLS] and [SEP] counted, at least one
    most: int = 45
    smoothing: float = 0.0  # of the labels


@dataclasses.dataclass(frozen=True)
class SparseMask:
    kind: str = ""  # one of bert_captioner.MASKS; "" = as the model's args.json says
    weight: float = 0.5  # of the share of open edges in the loss
    rate: float = 10.0  # times the learning rate; its weights are small numbers of many edges


@dataclasses.dataclass(frozen=True)
class CaptionOptimizer:
    """AdamW, linear warm-up, then linearly to 0. Defaults are the published ones."""

    learning_rate: float = 3e-4
    swin_rate: float = 0.05  # times the learning rate
    weight_decay: float = 0.2  # of matrices; none of biases, norms and the sparse mask
    warmup: float = 0.1  # share of the steps
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class CaptioningConfig(General):
    batch_size: int = 48  # captions per step, over all devices
    model: str = ""  # folder in SwinBERT's layout; without best-checkpoint the weights are drawn anew
    video_swin: str = ""  # file of Video Swin's own authors that a new model starts from
    dropout: float = 0.1
    data: CaptionData = group(CaptionData)
    words: Words = group(Words)
    mask: SparseMask = group(SparseMask)
    optimizer: CaptionOptimizer = group(CaptionOptimizer)

    def __post_init__(self):
        """Raises ConfigError for values that make no sense."""
        if self.mask.kind and self.mask.kind not in MASKS:
            raise ConfigError(f"config.mask.kind is {self.mask.kind!r}, none of {', '.join(MASKS)}")
        for name, value in (("words.share", self.words.share), ("optimizer.warmup", self.optimizer.warmup)):
            if not 0 <= value <= 1:
                raise ConfigError(f"config.{name} is {value}, it must be 0 to 1")
        for name, value in (("words.smoothing", self.words.smoothing), ("dropout", self.dropout)):
            if not 0 <= value < 1:
                raise ConfigError(f"config.{name} is {value}, it must be 0 to below 1")
        if self.words.most < 1:
            raise ConfigError(f"config.words.most is {self.words.most}, it must be at least 1")


def default():
    """Every field with its default, for a file in configs/."""
    return config_module.default(CaptioningConfig)
