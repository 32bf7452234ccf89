"""The configuration of preference training: that of making the pairs, and that of learning from them."""

import dataclasses

from tspo_jax import config as config_module
from tspo_jax.config import GENERAL_MAY_DIFFER, MAX_BAD, Answerer, ConfigError, General, group
from tspo_jax.models.lora import TARGETS


@dataclasses.dataclass(frozen=True)
class Build:
    """How pairs are made (build_pairs)."""

    questions: str = ""  # jsonl file in the TSPO-10K format, with known answers
    output: str = ""  # folder of the data set
    recipes: tuple[str, ...] = ("irrelevant", "incomplete")
    frames: int = 8  # K that the chosen answer is made from
    sparse_frames: int = 2  # of them that the rejected answer of recipe incomplete is made from
    attempts: int = 4  # frame sets without the evidence that are tried until an answer is wrong
    answer_style: str = "own"  # the model's own words; or letter, or text: those of the options that it named
    suffix: str = "Please answer with the option's letter from the given choices directly."
    batch_size: int = 8  # questions that are answered together
    max_pairs: int = 0  # of a recipe, drawn at random; 0 = all
    heldout: float = 0.1  # share of the videos whose pairs are held out
    # For videos without questions: module:function or an OpenAI-compatible address that writes questions from captions
    # and judges; "" = none, questions have known answers and the rule is the judge.
    writer: str = ""
    writer_model: str = ""
    captioner: str = ""  # folder of SwinBERT that describes the parts of a video to the writer; "" = the answerer
    questions_per_video: int = 1  # that the writer is asked for, by each recipe


@dataclasses.dataclass(frozen=True)
class PairData:
    store: str = ""  # folder of the frame store made by predecode
    pairs: str = ""  # file of the pairs: jsonl, json, csv or yaml (tpo/pairs.py)
    held_out: str = ""  # pairs that are evaluated during training; "" = none
    num_frames: int = 64  # of the whole video, evenly spaced, in both answers' prompt
    strict: bool = False  # a bad pair ends the run; else it is listed and left out
    max_bad: float = MAX_BAD  # share of bad pairs above which the file is a wrong one and the run ends
    suffix: str = ""  # last line of the user's text where a pair's prompt does not bring it; pairs of ours do
    answer_text: str = "{answer}"  # how an answer stands behind the prompt: " {answer}" for a model that begins so
    max_tokens: int = 0  # of a prompt with its answer; 0 = the answerer's max_position_embeddings
    answer_buckets: tuple[int, ...] = (32, 128, 512)  # answers are padded to the smallest one that holds a batch's
    decode_threads: int = 16
    cached_videos: int = 0  # whose training frames stay in memory, where pairs share videos; 0 = none


@dataclasses.dataclass(frozen=True)
class Lora:
    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = tuple(TARGETS)  # projections of the language model
    use_rslora: bool = False  # scaling alpha / sqrt(r) instead of alpha / r


@dataclasses.dataclass(frozen=True)
class Preference:
    """The loss (tpo/losses.py). Defaults are those of LLaVA-Video-TPO."""

    loss_type: str = "sigmoid"  # or hinge, ipo, kto_pair, robust
    beta: float = 0.2
    label_smoothing: float = 0.0
    alpha: float = 1.0  # weight of the preference loss; 0 = training on the chosen answers alone
    gamma: float = 1.0  # weight of the chosen answers' likelihood; 0 = plain DPO


@dataclasses.dataclass(frozen=True)
class PreferenceOptimizer:
    """AdamW with clipping by the global norm; linear warm-up, then the learning rate falls as a cosine to 0."""

    lora_rate: float = 1e-5
    full_rate: float = 3e-7  # the paper's, of full fine-tuning
    warmup: float = 0.1  # share of the steps, rounded up
    max_grad_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Reference:
    """Log-probabilities of the answers before training."""

    mode: str = ""  # stored: computed once; online: in each step, with the adapters off; "" = online with LoRA
    file: str = ""  # where they are stored; "" = RUN_DIR/reference.jsonl
    tolerance: float = 0.0  # nats a token by which they may differ at the first step; 0 = 1e-3, in bfloat16 0.05


@dataclasses.dataclass(frozen=True)
class HeldOutPairs:
    every: int = 0  # steps; 0 = never
    num_pairs: int = 96  # of data.held_out, evenly spaced
    accuracy: bool = False  # also answer their questions: from the training frames, the evidence's, and without it


@dataclasses.dataclass(frozen=True)
class TpoConfig(General):
    """Of build_pairs.py and train_answerer.py. Defaults are those of LLaVA-Video-TPO where it is published."""

    batch_size: int = 64  # pairs per step, over all devices
    num_steps: int = 157  # 10,000 pairs, once each
    accumulate: int = 1  # parts that a batch is computed in, one after another; does not change the result
    full: bool = False  # train language model and projector instead of adapters
    answerer: Answerer = group(Answerer)
    build: Build = group(Build)
    data: PairData = group(PairData)
    lora: Lora = group(Lora)
    preference: Preference = group(Preference)
    optimizer: PreferenceOptimizer = group(PreferenceOptimizer)
    reference: Reference = group(Reference)
    held_out: HeldOutPairs = group(HeldOutPairs)

    def __post_init__(self):
        """Raises ConfigError for values that make no sense together."""
        least = {
            "accumulate": self.accumulate,
            "data.num_frames": self.data.num_frames,
            "data.decode_threads": self.data.decode_threads,
            "build.frames": self.build.frames,
            "build.sparse_frames": self.build.sparse_frames,
            "build.attempts": self.build.attempts,
            "build.batch_size": self.build.batch_size,
            "held_out.num_pairs": self.held_out.num_pairs,
            "lora.r": self.lora.r,
        }
        for name, value in least.items():
            if value < 1:
                raise ConfigError(f"config.{name} is {value}, it must be at least 1")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"config.accumulate is {self.accumulate}: it must divide batch_size ({self.batch_size})")
        if self.reference.mode not in ("", "stored", "online"):
            raise ConfigError(f"config.reference.mode is {self.reference.mode!r}, not stored, online or ''")
        if self.full and self.reference.mode == "online":
            raise ConfigError(
                "config.reference.mode is online, but with config.full the answerer itself changes: take stored"
            )
        if not 0 <= self.optimizer.warmup < 1:
            raise ConfigError(f"config.optimizer.warmup is {self.optimizer.warmup}, it must be from 0 to below 1")
        if "{answer}" not in self.data.answer_text:
            raise ConfigError(f"config.data.answer_text is {self.data.answer_text!r}: it must hold {{answer}}")
        if not self.data.answer_buckets or sorted(self.data.answer_buckets) != list(self.data.answer_buckets):
            raise ConfigError(f"config.data.answer_buckets is {self.data.answer_buckets}: it must ascend")

    @property
    def is_online(self) -> bool:
        """Whether the reference is computed in each step."""
        return (self.reference.mode or ("stored" if self.full else "online")) == "online"


MAY_DIFFER = (*GENERAL_MAY_DIFFER, "build", "held_out", "accumulate", "data.held_out")
MAY_DIFFER += (
    "data.max_bad",
    "data.cached_videos",
    "data.decode_threads",
    "answerer.attention",
    "answerer.encode_chunk",
    "answerer.prefill_chunk",
    "answerer.question_chunk",
    "reference.tolerance",
)


def default():
    """Every field with its default, for a file in configs/."""
    return config_module.default(TpoConfig)
