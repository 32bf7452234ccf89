"""Checkpoint folders as things to call: CLIP with its tokenizer and pixels, the temporal agent, an answering MLLM.

`DIR` is a Hugging Face style folder everywhere: config.json, *.safetensors, tokenizer and processor files.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from statistics import mode
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from tspo_jax.checkpoints import adapters, weights
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.devices import compiling
from tspo_jax.devices.sharding import ParamSharding, check_memory
from tspo_jax.models.clip import Clip, ClipConfig
from tspo_jax.models.families import FAMILIES
from tspo_jax.models.family import Family
from tspo_jax.models.layers import abstract_module, merge_params, split_params
from tspo_jax.models.llava_video import LlavaVideoConfig
from tspo_jax.models.preprocessing import ImageProcessor, Qwen3Processor, QwenProcessor
from tspo_jax.models.question_aware_agent import QuestionAwareAgent
from tspo_jax.models.qwen2_5_vl import Qwen25VLConfig
from tspo_jax.models.qwen3_vl import Qwen3VLConfig
from tspo_jax.models.siglip2 import Siglip2, Siglip2Config
from tspo_jax.models.span_agent import SpanAgent
from tspo_jax.models.temporal_agent import TemporalAgent
from tspo_jax.models.video_prompt import DEFAULT_VIDEO, VideoOptions

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class ClipEncoder:
    """CLIP, or SigLIP 2, from a folder; `identity` names the checkpoint that features came from."""

    folder: Path
    config: ClipConfig | Siglip2Config
    graphdef: nnx.GraphDef
    params: dict
    tokenizer: PreTrainedTokenizerBase
    processor: ImageProcessor
    identity: str
    pad_token_id: int

    @property
    def width(self) -> int:
        return self.config.projection_dim

    def token_ids(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [B, max_position_embeddings], cut on the right with the end token kept, padded as the model learned it:
        CLIP's with the end token."""
        length = self.config.text.max_position_embeddings
        ids = self.tokenizer(list(texts), truncation=True, max_length=length)["input_ids"] if len(texts) else []
        rows = [row + [self.pad_token_id] * (length - len(row)) for row in ids]
        return np.array(rows, np.int32).reshape(-1, length)

    def text_features(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Raw text features float32 [len(texts), D]."""
        ids = self.token_ids(texts)
        rows = (ids[i : i + batch_size] for i in range(0, len(ids), batch_size))
        return _in_batches(self._encode_text, self.params, rows, batch_size, self.width)

    def image_features(self, images: Sequence[np.ndarray] | np.ndarray, batch_size: int = 64) -> np.ndarray:
        """Raw image features float32 [n, D] of uint8 images [H, W, 3]; computed in fixed batches of one shape, whose
        images are cropped by threads while the device encodes those before."""
        with ThreadPoolExecutor() as pool:
            starts = range(0, len(images), batch_size)
            pixels = (np.stack([*pool.map(self.processor.crop, images[i : i + batch_size])]) for i in starts)
            return _in_batches(self._encode_images, self.params, pixels, batch_size, self.width)

    @cached_property
    def _encode_text(self):
        def encode(params, ids):
            with _exactly(params):
                return merge_params(self.graphdef, params).text_features(ids)

        return jax.jit(encode)

    @cached_property
    def _encode_images(self):
        def encode(params, pixels):
            with _exactly(params):
                return merge_params(self.graphdef, params).image_features(self.processor.normalize(pixels))

        return jax.jit(encode, compiler_options=compiling.options(jax.default_backend()))


def _exactly(params: dict):
    """Products of float32 weights in full float32 (a `with` block), on GPUs and TPUs too."""
    is_float32 = jax.tree.leaves(params)[0].dtype == jnp.float32
    return jax.default_matmul_precision("highest" if is_float32 else None)


def _in_batches(encode, params, parts: Iterable[np.ndarray], batch_size: int, width: int) -> np.ndarray:
    """`encode` over parts [<= batch_size, ...], padded to one static shape: float32 [n, width]."""
    out = [np.zeros((0, width), np.float32)]
    for part in parts:
        padded = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)])
        out.append(encode(params, padded)[: len(part)])  # not waited for: the next part is made meanwhile
    return np.concatenate([np.asarray(features, np.float32) for features in out])


def load_clip(folder: str | Path, dtype: jnp.dtype = jnp.float32, sharding: Sharding | None = None) -> ClipEncoder:
    """The image and text encoder of a CLIP, TSPO or SigLIP 2 folder, by its model_type.

    Features of another dtype than float32 have an identity of their own, so that no store mixes them.
    """
    folder, dtype = Path(folder), jnp.dtype(dtype)
    config = read_clip_config(folder)
    kind = ENCODERS[weights.read_config(folder)["model_type"]]
    graphdef, abstract = abstract_module(lambda rngs: kind.module(config, rngs=rngs))
    params = weights.load_params(folder, abstract, kind.format, dtype=dtype, sharding=sharding)
    tokenizer = read_tokenizer(kind.tokenizer, folder, config.text.vocab_size)
    pad = tokenizer.eos_token_id if kind.pads_with_end else tokenizer.pad_token_id
    if pad is None:
        raise CheckpointError(f"{folder}: its tokenizer has no padding token")
    return ClipEncoder(
        folder,
        config,
        graphdef,
        params,
        tokenizer,
        kind.processor(read_preprocessing(folder), config.vision.image_size),
        weights.checkpoint_identity(folder) + ("" if dtype == jnp.float32 else f"-{dtype}"),
        pad,
    )


@dataclasses.dataclass(frozen=True)
class EncoderKind:
    """A family of image and text encoders: how its folders are read."""

    config: Callable[[dict], ClipConfig | Siglip2Config]
    module: type
    format: weights.Format
    tokenizer: type
    processor: Callable[[dict, int], ImageProcessor]
    pads_with_end: bool


# model_type of config.json -> encoder.
ENCODERS = {
    "clip": EncoderKind(ClipConfig.from_hf, Clip, weights.CLIP, CLIPTokenizer, ImageProcessor.clip, True),
    "siglip": EncoderKind(
        Siglip2Config.from_hf,
        Siglip2,
        weights.SIGLIP2,
        AutoTokenizer,
        lambda preprocessing, image_size: ImageProcessor.siglip(image_size, preprocessing),
        False,
    ),
}


# config.agent.kind -> module.
AGENT_KINDS = {"paper": TemporalAgent, "question_aware": QuestionAwareAgent, "span": SpanAgent}


# Kinds of agents in a folder that may be asked for as another one, which scores the same until it is trained.
GROWS_INTO = (("paper", "question_aware"), ("paper", "span"), ("question_aware", "span"))


def load_agent(
    folder: str | Path, *, window: int = 12, num_heads: int = 8, seed: int = 0, kind: str | None = None
) -> tuple[nnx.GraphDef, dict]:
    """The temporal agent of a TSPO folder (`selector.*`), an original training checkpoint (`multiModal_align.*`) or an
    export of a question-aware one (`question_aware_selector.*`).

    A plain CLIP folder has none: then a fresh one of CLIP's width, weights N(0, 0.02^2) and zero biases, as training
    starts in the original. Parameters are float32 whatever the file holds.

    Args:
      kind: of AGENT_KINDS; None = what the folder holds. The paper's agent may be asked for as a question-aware one,
        which scores the same until it is trained.
    Raises: CheckpointError where the folder holds an agent of another kind, window or number of heads.
    """
    prefix = agent_prefix(folder)
    found = weights.AGENTS.get(prefix, "paper")
    kind = kind or found

    def fresh(width: int) -> tuple[nnx.GraphDef, dict]:
        return split_params(AGENT_KINDS[kind](width, num_heads=num_heads, window=window, rngs=nnx.Rngs(seed)))

    if prefix is None:
        return fresh(read_clip_config(folder).projection_dim)
    if kind != found and (found, kind) not in GROWS_INTO:
        raise CheckpointError(f"{folder}: its agent is {found}, it cannot be used as {kind} (agent.kind)")
    files = weights.SafetensorsFolder(folder)
    bias = f"{prefix}offset_bias"
    if bias in files.names() and files.shape(bias) != (num_heads, window):
        there = "{} heads and window {}".format(*files.shape(bias))
        raise CheckpointError(f"{folder}: its agent has {there}, not {num_heads} heads and window {window}")
    # Nearly every tensor of the agent ends in its width. The commonest: a missing or misshapen one is named below.
    (width,) = mode(files.shape(name)[-1:] for name in files.names() if name.startswith(prefix))
    graphdef, abstract = abstract_module(
        lambda rngs: AGENT_KINDS[found](width, num_heads=num_heads, window=window, rngs=rngs)
    )
    params = weights.load_params(folder, abstract, weights.agent_format(prefix), dtype=jnp.float32)
    # A folder with the agent alone needs no config.json; where CLIP lies beside it, the two must fit.
    config = weights.read_config(folder) if (Path(folder) / "config.json").is_file() else {}
    if config.get("model_type") in ENCODERS and (expected := read_clip_config(folder).projection_dim) != width:
        raise CheckpointError(
            f"{folder}: its agent is of width {width}, but config.json's projection_dim is {expected}"
        )
    if kind != found:
        graphdef, new_terms = fresh(width)
        params = new_terms | params
    return graphdef, params


def agent_prefix(folder: str | Path) -> str | None:
    """What the names of the agent's tensors in a folder begin with; None where it holds no agent."""
    names = weights.SafetensorsFolder(folder).names()
    return next((prefix for prefix in weights.AGENTS if any(name.startswith(prefix) for name in names)), None)


def agent_kind(params: dict) -> str:
    """The kind of an agent, by its parameters."""
    own = {"span": "edge_weight", "question_aware": "modulation", "paper": "temporal"}
    return next(kind for kind, name in own.items() if name in params)


def agent_graphdef(params: dict, width: int, *, window: int = 12, num_heads: int = 8) -> nnx.GraphDef:
    """The structure of an agent of features of `width`, of the kind that its parameters say.

    Raises: CheckpointError where they are not the parameters of such an agent, listing what differs.
    """
    kind = agent_kind(params)
    graphdef, abstract = abstract_module(
        lambda rngs: AGENT_KINDS[kind](width, num_heads=num_heads, window=window, rngs=rngs)
    )
    expected, found = ({path: x.shape for path, x in weights.flatten(tree).items()} for tree in (abstract, params))
    wrong = [
        f"{path} is {found.get(path, 'missing')}, expected {expected.get(path, 'no such parameter')}"
        for path in sorted(expected | found)
        if found.get(path) != expected.get(path)
    ]
    if wrong:
        raise CheckpointError("\n  ".join([f"not a {kind} agent of width {width}:", *wrong]))
    return graphdef


def read_clip_config(folder: str | Path) -> ClipConfig | Siglip2Config:
    """Of a folder with an image and text encoder; CheckpointError for one of another model_type."""
    return clip_config(weights.read_config(folder), f"{folder}/config.json")


def clip_config(config: dict, source: str | Path) -> ClipConfig | Siglip2Config:
    """From a config.json, by its model_type. `source` is where it came from."""
    model_type = config.get("model_type")
    if model_type not in ENCODERS:
        more = "; of SigLIP 2 the models of one resolution (model_type siglip)" if model_type == "siglip2" else ""
        raise CheckpointError(f"{source}: model_type is {model_type!r}, not {' or '.join(ENCODERS)}{more}")
    return ENCODERS[model_type].config(config)


def read_preprocessing(folder: Path) -> dict:
    """How a folder's images are preprocessed; {} where it says nothing about that."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            return weights.read_config(folder, name)
    if (folder / "processor_config.json").is_file():  # all processors of a folder in one file
        parts = weights.read_config(folder, "processor_config.json")
        return parts.get("video_processor") or parts.get("image_processor") or {}
    return {}


def read_tokenizer(kind: type, folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises CheckpointError where there is none (transformers would make an empty one), it
    is damaged, or it has more tokens than the model's `vocab_size`."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise CheckpointError(f"{folder}: holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        tokenizer = kind.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({error})") from error
    if len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, more than config.json's vocab_size {vocab_size}"
        )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a checkpoint wants its answers decoded: greedily, with its own end tokens and repetition penalty.

    The penalty holds for the prompt's tokens too, with `video_token_id` for the video, where that is given. Without it
    only generated tokens count, as for LLaVA-Video, whose prompts are embeddings to the original.
    """

    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    repetition_penalty: float
    video_token_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Answerer:
    """A frozen Video-MLLM from a folder. `graphdef` merged with `params` has encode_frames, prompt, prefill and decode
    (see models/llava_video.py); rollout.py composes them. `template` is the conversation that it was trained on."""

    folder: Path
    config: LlavaVideoConfig | Qwen25VLConfig | Qwen3VLConfig
    graphdef: nnx.GraphDef
    params: dict
    tokenizer: PreTrainedTokenizerBase
    processor: ImageProcessor | QwenProcessor | Qwen3Processor
    generation: Generation
    template: str


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A Video-MLLM without weights, as its config.json describes it: `abstract` are the shapes of its parameters."""

    config: LlavaVideoConfig | Qwen25VLConfig | Qwen3VLConfig
    graphdef: nnx.GraphDef
    abstract: dict
    format: weights.Format
    tokenizer: type
    processor: ImageProcessor | QwenProcessor | Qwen3Processor
    template: str

    @classmethod
    def of(
        cls, family: Family, description: Mapping[str, Any], preprocessing: Mapping[str, Any], video: VideoOptions
    ) -> "Architecture":
        config, processor = family.read(description, preprocessing, video)
        graphdef, abstract = abstract_module(lambda rngs: family.model(config, rngs=rngs))
        fmt = weights.Format(**family.names)
        fmt = fmt.without_head() if config.language.tie_word_embeddings else fmt
        return cls(config, graphdef, abstract, fmt, Qwen2Tokenizer, processor, family.template)


# model_type of config.json -> family.
ANSWERERS = {model_type: family for family in FAMILIES for model_type in family.model_types}


def answerer_architecture(
    config: Mapping[str, Any],
    source: str | Path,
    preprocessing: Mapping[str, Any] | None = None,
    video: VideoOptions = DEFAULT_VIDEO,
) -> Architecture:
    """The Video-MLLM that a config.json describes, chosen by its model_type. `source` is where it came from."""
    model_type = config.get("model_type")
    if model_type not in ANSWERERS:
        raise CheckpointError(
            f"{source}: model_type {model_type!r} is not supported; supported: {', '.join(ANSWERERS)} (dense models)"
        )
    return Architecture.of(ANSWERERS[model_type], config, preprocessing or {}, video)


def load_answerer(
    folder: str | Path,
    dtype: jnp.dtype = jnp.float32,
    sharding: Sharding | None = None,
    video: VideoOptions = DEFAULT_VIDEO,
    adapter: str | Path = "",
) -> Answerer:
    """The Video-MLLM of a folder, with the adapters of a PEFT folder if one is given; they stay apart from the weights,
    so that bfloat16 does not swallow them.

    Raises ShardingError, before reading it, where its weights do not fit the devices; CheckpointError.
    """
    folder = Path(folder)
    a = answerer_architecture(weights.read_config(folder), folder / "config.json", read_preprocessing(folder), video)
    if isinstance(sharding, ParamSharding):
        check_memory({path: leaf.shape for path, leaf in weights.flatten(a.abstract).items()}, dtype, sharding)
    params = weights.load_params(folder, a.abstract, a.format, dtype=dtype, sharding=sharding)
    graphdef = a.graphdef
    if adapter:
        found = adapters.read(adapter, a.abstract, a.format, weights.checkpoint_identity(folder))
        graphdef, _ = adapters.add(graphdef, a.abstract, found.lora)
        params = adapters.beside(params, found.params, sharding)
    return Answerer(
        folder,
        a.config,
        graphdef,
        params,
        read_tokenizer(a.tokenizer, folder, a.config.language.vocab_size),
        a.processor,
        read_generation(folder),
        a.template,
    )


def read_generation(folder: Path) -> Generation:
    """End tokens and repetition penalty from generation_config.json, else the end token of config.json and 1.0."""
    has_own = (folder / "generation_config.json").is_file()
    own = weights.read_config(folder, "generation_config.json") if has_own else {}
    config = weights.read_config(folder)
    config = (config.get("text_config") or {}) | config | own
    eos = config.get("eos_token_id")
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    if eos == (None,):
        raise CheckpointError(f"{folder}/config.json: eos_token_id is missing")
    pad = config.get("pad_token_id")
    penalty = float(own.get("repetition_penalty") or 1.0)
    video = config.get("video_token_id")  # named by the models whose prompts are token ids to Hugging Face's class
    return Generation(eos, eos[-1] if pad is None else pad, penalty, video)
