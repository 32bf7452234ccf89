"""The configuration of a run: every field with its meaning and the paper's value.

A file in configs/ has one `get_config()` that starts from `default()` and states what its run is; on the command line
`--config.optimizer.learning_rate=1e-4` changes single fields. `read` turns that into the frozen `Config` that the
program works with; a field that does not exist is an error everywhere.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from absl import flags
from ml_collections import ConfigDict, config_flags

from tspo_jax.models.attention import IMPLEMENTATIONS
from tspo_jax.models.video_prompt import VideoOptions

flags.disclaim_key_flags()  # --config is one of the program that defines it, whose --help lists it
MAX_BAD = 0.1  # share of bad lines above which a file is a wrong one, not one with a few bad lines


class ConfigError(ValueError):
    """A config with an unknown, missing or impossible field."""


def group(cls):
    """A group of fields, as a field with the group's defaults."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True)
class Agent:
    clip: str = ""  # folder of the frozen CLIP: encodes the questions, and made the features of the frame store
    clip_dtype: str = "float32"  # or bfloat16: of its weights and arithmetic; features of each are kept apart
    # or question_aware: the same at first, but its attention can learn to look at the question; or span: that, and
    # policy.warm_start_steps teach it where the evidence begins and ends, for method span
    kind: str = "paper"
    init: str = ""  # folder of the agent to start from; "" = that of `clip`, a fresh one where it holds CLIP alone
    window: int = 12  # frames that a frame attends to
    num_heads: int = 8


@dataclasses.dataclass(frozen=True)
class Answerer:
    folder: str = ""  # of the frozen Video-MLLM
    adapter: str = ""  # PEFT folder of adapters for it (--adapter=DIR); "" = none
    dtype: str = "bfloat16"  # of its weights and arithmetic: bfloat16 or float32
    # Products of float32 weights: highest, or the platform's shorter ones (TF32, bfloat16 passes): high, default.
    float32_precision: str = "highest"
    attention: str = "auto"  # what computes it: auto, xla, cudnn (NVIDIA, bfloat16) or pallas (TPU)
    max_new_tokens: int = 256
    encode_chunk: int = 16  # frames of a question that are encoded at a time; bounds memory
    prefill_chunk: int = 0  # frame sets of a question that are prefilled at a time, a divisor of group_size; 0 = all
    question_chunk: int = 0  # questions (or a few more) answered while the next are fetched; bounds memory; 0 = all
    template: str = ""  # conversation, a name of prompts.TEMPLATES; "" = the one that the model was trained on
    video: VideoOptions = group(VideoOptions)  # for models that leave a choice: Qwen2.5-VL
    option_text: str = "{letter}"  # how its answers name an option, one token; for rewards probability and margin


@dataclasses.dataclass(frozen=True)
class GeneralSamples:
    """Samples that need the whole video: the paper's comprehensive understanding."""

    k: int = 8  # frames to pick
    share: float = 0.0  # of the batches; 0 here and in `specific`: in proportion to the questions
    accuracy: float = 1.0  # weight of this reward: 1 for a right answer
    # Weights of further rewards, none of which the paper has.
    coverage: float = 0.0  # share of k equal parts of the video with a pick
    probability: float = 0.0  # of the right option, among the options
    margin: float = 0.0  # log-probability of the right option minus that of the best wrong one


@dataclasses.dataclass(frozen=True)
class SpecificSamples:
    """Needle samples: groups of frames of the target video shuffled among groups of other videos."""

    k: int = 16
    share: float = 0.0
    group_frames: int = 50
    min_true_groups: int = 1
    max_true_groups: int = 4
    distractor_groups: int = 12
    max_distractor_groups: int = 12  # the paper's 10-60 minutes are 11 to 68
    accuracy: float = 1.0
    location: float = 1.0  # weight of the reward that is the share of picks in the target video
    coverage: float = 0.0
    probability: float = 0.0
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Data:
    store: str = ""  # folder of the frame store made by predecode
    questions: str = ""  # question file: jsonl, one JSON list, or CSV
    strict: bool = False  # a bad line of it ends the run; else it is listed and left out
    max_bad: float = MAX_BAD  # share of bad lines above which the file is a wrong one and the run ends
    min_frames: int = 50  # a video with fewer candidates, or more than max_frames, gets max_frames evenly spaced ones
    max_frames: int = 128
    buckets: tuple[int, ...] = (128, 832)  # candidate frames T are padded to the smallest bucket that holds them
    workers: int = 0  # processes that load batches ahead; 0 = threads of this one
    decode_threads: int = 16  # threads that read and decode the picked frames
    general: GeneralSamples = group(GeneralSamples)
    specific: SpecificSamples = group(SpecificSamples)


@dataclasses.dataclass(frozen=True)
class Policy:
    group_size: int = 8  # frame sets drawn per question
    tau_start: float = 0.025  # temperature of the scores, annealed linearly over the run
    tau_end: float = 0.01
    advantage: str = "grpo"  # or dr_grpo (not divided by the standard deviation), leave_one_out
    log_prob: str = "independent"  # or plackett_luce, the exact one of an ordered draw without replacement
    # From here on the paper's recipe has none; see policy.Objective.
    inner_steps: int = 1  # optimiser steps on each batch of answers
    clip_low: float = 0.2  # limits of the ratio to the policy that drew, for inner_steps > 1 and stale_steps
    clip_high: float = 0.2
    dead_groups: str = "keep"  # or skip: groups of equal rewards do not count in the mean; resample: drawn anew first
    resamples: int = 2  # how often at most; each costs a rollout
    entropy: float = 0.0  # weight of the scores' entropy, which is raised
    kl: float = 0.0  # weight of the divergence from the initial agent, which is lowered
    kl_limit: float = 0.0  # nats; an update that takes the agent further from the initial one is undone; 0 = none
    stale_steps: int = 0  # 1 = picks are drawn and fetched one update ahead, while the answerer works
    random_k: tuple[int, ...] = ()  # K of a step is one of these by chance instead of data.*.k
    warm_start_steps: int = 0  # first steps of the run: trained on labels (needle masks, evidence), no rollout


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with clipping by the global norm; the learning rate falls linearly to 0."""

    learning_rate: float = 5e-4
    max_grad_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Mesh:
    axes: tuple[tuple[str, int], ...] = (("data", -1), ("model", 1))  # -1 = the devices that are left
    split_over_data: bool = False  # split the answerer's weights over `data` too


@dataclasses.dataclass(frozen=True)
class Distributed:
    """More than one process. On TPU pods and Slurm `enabled` is enough; elsewhere name the other fields too."""

    enabled: bool = False
    coordinator: str = ""  # host:port
    num_processes: int = -1
    process_id: int = -1
    join_seconds: int = 300  # how long a process waits at the start until all others are there
    heartbeat_seconds: int = 100  # a process that is silent for so long counts as lost, and the others end


@dataclasses.dataclass(frozen=True)
class Search:
    """Of method tstar, which looks for objects: those that a question's line names, else those that the answerer names
    from a few frames. See selection/tstar.py."""

    detector: str = ""  # folder of OWL-ViT
    schedule: str = "mix"  # or random, released
    grid: tuple[int, int] = (4, 4)  # rows and columns of frames that are looked at together
    share: float = 0.1  # of the candidates that may be looked at
    threshold: float = 0.6  # confidence of a target in a frame alone, that counts as found


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Of methods flat and backtrack, which answer from captions (docs/rounds.md). Budgets are of a question; 0 = as
    much as it takes."""

    windows: tuple[float, float, float] = (60.0, 10.0, 1.0)  # seconds of a clip: coarse, fine, ultra-fine
    rounds: int = 5  # closer looks
    max_captions: int = 0
    max_writer_calls: int = 0
    max_writer_tokens: int = 0
    max_new_tokens: int = 512  # of a caption, and of a reply of the writer
    captioner: str = ""  # folder of SwinBERT that captions the clips; "" = the answerer
    writer: str = ""  # module:function or an http address that reads the captions; "" = the answerer
    writer_model: str = ""  # that an address is asked for
    writer_context: int = 32768  # tokens of a prompt and its reply together
    writer_timeout: float = 120.0  # seconds


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out questions, answered from the frames of several selection methods side by side (evaluate.py)."""

    benchmark: str = ""  # longvideobench, mlvu, videomme or lvbench; "" = a question file like that of training
    questions: str = ""  # annotation file of the benchmark, or jsonl file
    videos: str = ""  # folder of video files; those that `store` lacks are decoded and encoded into it first
    store: str = ""  # frame store of the videos; "" = that of training, with `videos` RUN_DIR/frames
    methods: tuple[str, ...] = ("uniform", "clip-topk", "topk")  # also flat and backtrack
    budgets: tuple[int, ...] = (64,)  # frames that the answerer sees
    batch_size: int = 8  # prompts that each process answers at a time
    frame_idx: str = ""  # index file whose frames are answered from as well, as method frame-idx
    controls: tuple[str, ...] = ()  # of permuted, random and blank: how much of an answer is not due to the selection
    # Qwen: least and most pixels of a frame, which keeps its video's aspect ratio, whatever answerer.video.frame_size
    # training shows; () = as in training. The published runs of Qwen2.5-VL: (200704, 235200).
    frame_pixels: tuple[int, ...] = ()
    protocol: str = "strict"  # how a benchmark's answers are read: strict, or published with its slips
    search: Search = group(Search)
    rounds: Rounds = group(Rounds)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Evaluation during training, at the first of evaluation.budgets, with its methods, answerer and store.

    The checkpoint with the best accuracy of method topk is kept: RUN_DIR/best. Its accuracy on these questions is too
    optimistic; take others than those of the final evaluation where that matters.
    """

    every: int = 0  # steps; 0 = never
    questions: str = ""  # file like evaluation.questions; "" = that
    num_questions: int = 96  # of it, evenly spaced


@dataclasses.dataclass(frozen=True)
class General:
    """What every trainer has, and all that runs/loop.py reads: the config of a trainer is a subclass."""

    seed: int = 42
    batch_size: int = 16  # examples per step, over all devices
    num_steps: int = 1000
    mesh: Mesh = group(Mesh)
    distributed: Distributed = group(Distributed)
    log_every: int = 1  # steps between two lines on the terminal; metrics.jsonl and TensorBoard get every step
    checkpoint_every: int = 25  # steps
    keep_checkpoints: int = 3
    wandb: str = ""  # project at Weights & Biases that metrics go to as well; "" = none
    profile_steps: int = 0  # a profiler trace of so many steps goes to RUN_DIR/profile; the first two are left out


OfTrainer = TypeVar("OfTrainer", bound=General)


@dataclasses.dataclass(frozen=True)
class Config(General):
    """Of train.py, and of evaluate.py."""

    num_steps: int = 625  # of 16 questions: 10,000, once each
    agent: Agent = group(Agent)
    answerer: Answerer = group(Answerer)
    data: Data = group(Data)
    policy: Policy = group(Policy)
    optimizer: Optimizer = group(Optimizer)
    evaluation: Evaluation = group(Evaluation)
    held_out: HeldOut = group(HeldOut)


# The least that a field may be; everything else with a limit is checked where it is used.
AT_LEAST = {
    "batch_size": 1,
    "num_steps": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "answerer.max_new_tokens": 1,
    "answerer.encode_chunk": 1,
    "answerer.prefill_chunk": 0,
    "answerer.question_chunk": 0,
    "held_out.every": 0,
    "held_out.num_questions": 1,
    "data.workers": 0,
    "profile_steps": 0,
    "data.decode_threads": 1,
    "data.min_frames": 0,
    "data.max_frames": 1,
    "data.general.k": 1,
    "data.specific.k": 1,
    "policy.group_size": 2,  # rewards are compared within a group
    "policy.tau_start": 1e-4,  # scores are divided by it
    "policy.tau_end": 0,  # not reached before the last step
    "policy.inner_steps": 1,
    "policy.resamples": 1,
    "policy.kl_limit": 0,
    "policy.warm_start_steps": 0,
    "distributed.join_seconds": 1,
    "distributed.heartbeat_seconds": 1,
}
ONE_OF = {
    "agent.kind": ("paper", "question_aware", "span"),
    "answerer.dtype": ("bfloat16", "float32"),
    "agent.clip_dtype": ("float32", "bfloat16"),
    "answerer.float32_precision": ("highest", "high", "default"),
    "answerer.attention": IMPLEMENTATIONS,
    "policy.stale_steps": (0, 1),
}

# What may change between two starts of one run: where it runs and what it prints, not what it computes.
GENERAL_MAY_DIFFER = ("mesh", "distributed", "log_every", "checkpoint_every", "keep_checkpoints", "wandb")
GENERAL_MAY_DIFFER += ("profile_steps",)
MAY_DIFFER = (*GENERAL_MAY_DIFFER, "evaluation", "held_out", "data.workers", "data.decode_threads")
MAY_DIFFER += ("answerer.attention", "answerer.encode_chunk", "answerer.prefill_chunk", "answerer.question_chunk")


def default(kind: type[General] = Config) -> ConfigDict:
    """Every field of a trainer's config with its default: for `Config` the paper's value; folders are empty."""
    return ConfigDict(dataclasses.asdict(kind()))


def read(config: Mapping[str, Any], kind: type[OfTrainer] = Config) -> OfTrainer:
    """The frozen form of a ConfigDict (or nested mapping) that has exactly the fields of `kind`.

    Raises ConfigError naming a field that is unknown, missing or of a wrong type.
    """
    return _read(kind, config, "")


def _read(cls, values: Mapping[str, Any], prefix: str):
    if not isinstance(values, Mapping | ConfigDict):
        raise ConfigError(f"config.{prefix.removesuffix('.')} is {values!r}, not a group of fields")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(_unknown(prefix + name, fields))
    kwargs = {}
    for name, kind in fields.items():
        if name not in values:
            raise ConfigError(f"config.{prefix}{name} is missing; start from default() in tspo_jax/config.py")
        value, path = values[name], prefix + name
        if path in ONE_OF and value not in ONE_OF[path]:
            raise ConfigError(f"config.{path} is {value!r}, not one of {', '.join(map(str, ONE_OF[path]))}")
        if dataclasses.is_dataclass(kind):
            kwargs[name] = _read(kind, value, f"{path}.")
            continue
        try:
            kwargs[name] = _as_type(value, kind)
        except TypeError:
            name_of_kind = kind.__name__ if isinstance(kind, type) else kind
            raise ConfigError(f"config.{path} is {value!r}, which is not of type {name_of_kind}") from None
        if path in AT_LEAST and value < AT_LEAST[path]:
            raise ConfigError(f"config.{path} is {value}, it must be at least {AT_LEAST[path]}")
    return cls(**kwargs)


def _as_type(value, kind):
    """`value` as a field of type `kind` holds it: lists become tuples, integers floats. TypeError where it has another
    type."""
    if kind in (int, float, bool, str):
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise TypeError
        return kind(value)
    if not isinstance(value, (list, tuple)):
        raise TypeError
    kinds = get_args(kind)
    if kinds[-1] is Ellipsis:
        return tuple(_as_type(x, kinds[0]) for x in value)
    if len(value) != len(kinds):
        raise TypeError
    return tuple(map(_as_type, value, kinds))


def _unknown(path: str, known) -> str:
    group, _, name = path.rpartition(".")
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    where = f" of config.{group}" if group else " of config"
    hint = f"did you mean {' or '.join(close)}?" if close else f"the fields{where} are {', '.join(known)}"
    return f"config.{path} does not exist; {hint}"


# ---- command line ----------------------------------------------------------------------------------------


def define_flag() -> None:
    """The flags --config=FILE.py, with overrides of single fields, and --adapter=DIR, short for one of them."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "A file with get_config(), e.g. configs/toy.py; --config.FIELD=VALUE changes fields of tspo_jax/config.py.",
    )
    flags.DEFINE_string("adapter", "", "PEFT folder of adapters for the answerer: --config.answerer.adapter=DIR.")


def check_overrides(argv: Sequence[str], kind: type[General] = Config) -> None:
    """Raises ConfigError for a flag --config.NAME of a field that `kind` lacks, or a config file that does not exist.

    For before the flags are parsed, which would end in a traceback.
    """
    for argument in argv[1:]:
        if file := re.match(r"--?config[= ](.*)", argument):
            if not Path(file[1].partition(":")[0]).is_file():  # FILE.py:variant
                raise ConfigError(f"--config={file[1]}: no such file; see configs/")
        elif override := re.match(r"--?config\.([\w.]+)", argument):
            cls, prefix = kind, ""
            for name in override[1].split("."):
                fields = {field.name: field.type for field in dataclasses.fields(cls)} if cls else {}
                if name not in fields:
                    raise ConfigError(_unknown(prefix + name, fields))
                cls = fields[name] if dataclasses.is_dataclass(fields[name]) else None
                prefix += f"{name}."


def from_flags(kind: type[OfTrainer] = Config) -> OfTrainer:
    """The config of the parsed flags."""
    if flags.FLAGS.config is None:
        raise ConfigError("--config is needed: a file with get_config(), e.g. --config=configs/toy.py")
    config = flags.FLAGS.config
    if flags.FLAGS.adapter:
        if "answerer" not in config:
            raise ConfigError("--adapter belongs to an answerer, and this config has none")
        config = config.copy_and_resolve_references()
        config.answerer.adapter = flags.FLAGS.adapter
    return read(config, kind)
