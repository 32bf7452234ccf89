"""The tiny Video-MLLMs of the toy world before any training: their sizes, and parameters from which a few hundred steps
are enough.

A fresh one's attention starts out looking for tokens like its own and copying them: query and key kernels agree, the
output kernel undoes the value kernel, and the head reads the embeddings (mimetic initialisation, Trockman & Kolter
2023). Two heads of the first layers look one and two tokens back, and one of the third finds what the first said.
Finding the frame that shows what a question names is then a matter of hundreds of steps; from independent kernels it
takes tens of thousands.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import Answerer, Architecture, Generation
from tspo_jax.models import llava_video, qwen3_vl
from tspo_jax.models.family import Family
from tspo_jax.models.llava_video import LlavaVideoConfig
from tspo_jax.models.qwen2 import Qwen2Config
from tspo_jax.models.siglip import SiglipConfig
from tspo_jax.models.video_prompt import DEFAULT_VIDEO
from tspo_jax.models.video_tags import VIDEO_TAG
from tspo_jax.toy.fitting import fresh_params

IMAGE_SIZE, PATCH_SIZE = 48, 24  # 2 x 2 patches of a frame, which become one visual token
SHARPNESS = 2.5  # how much more than a random kernel's the first queries tell tokens apart
BRANCH = 0.35  # initial scale of what the mlps add
CONSTANT, CONSTANT_VALUE = 0, 3.0  # the coordinate of Qwen3-VL's states that is the same for all tokens, and its value
# Times which the products of normalised queries and keys are raised; the frequencies by which a head looks back.
QK_SCALE, NUM_FREQUENCIES = 3.3, 4


class TinyAnswerer(NamedTuple):
    """A family's tiny model.

    Attributes:
      title: the family's name.
      family: the family.
      config_json: number of tokens -> config.json in the fields of the published models, without the ids of tokens.
      preprocessing: video_preprocessor_config.json; {} = the folder has none.
      special_tokens: field of config.json with its id -> a token, besides those of Qwen2's conversations.
      initial_params: (config, seed) -> the model's structure and parameters, of 3 layers at least.
      prompt_tokens: what `encode_frames` gives -> the tokens [F, ..., hidden] that stand in the prompt.
    """

    title: str
    family: Family
    config_json: Callable[[int], dict]
    preprocessing: Mapping[str, Any]
    special_tokens: Mapping[str, str]
    initial_params: Callable[[Any, int], tuple[nnx.GraphDef, dict]]
    prompt_tokens: Callable[[jax.Array], jax.Array]

    def architecture(self, vocab_size: int) -> Architecture:
        return Architecture.of(self.family, self.config_json(vocab_size), self.preprocessing, DEFAULT_VIDEO)

    def untrained(self, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int) -> Answerer:
        """`folder` is where it will lie."""
        a = self.architecture(len(tokenizer))
        graphdef, params = self.initial_params(a.config, seed)
        generation = Generation((tokenizer.eos_token_id,), tokenizer.pad_token_id, 1.0)
        return Answerer(folder, a.config, graphdef, params, tokenizer, a.processor, generation, a.template)

    def save(self, answerer: Answerer) -> None:
        """Writes the folder, in the published models' form; weights in bfloat16."""
        folder, tokenizer = answerer.folder, answerer.tokenizer
        a = self.architecture(len(tokenizer))
        weights.save_params(folder, answerer.params, a.format, ml_dtypes.bfloat16)
        tokenizer.save_pretrained(folder)
        special = {"eos_token_id": tokenizer.eos_token, "pad_token_id": tokenizer.pad_token, **self.special_tokens}
        ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in special.items()}
        write_json(folder / "config.json", self.config_json(len(tokenizer)) | ids)
        if self.preprocessing:
            write_json(folder / "video_preprocessor_config.json", self.preprocessing)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---- LLaVA-Video -----------------------------------------------------------------------------------------


def llava_config(vocab_size: int, patch_size: int = PATCH_SIZE) -> LlavaVideoConfig:
    """Bilinear pooling and grid newlines, as in LLaVA-Video 7B: 2 x 2 patches become one token, and a newline closes
    every row of them."""
    return LlavaVideoConfig(
        Qwen2Config(vocab_size, 96, 192, 4, 4, 2, rope_theta=1e6, max_position_embeddings=4096),
        SiglipConfig(128, 256, 2, 4, IMAGE_SIZE, patch_size),
    )


def llava_config_json(vocab_size: int, patch_size: int = PATCH_SIZE) -> dict:
    """In lmms-lab's fields; the tower is named with its unused last layer."""
    config = llava_config(vocab_size, patch_size)
    tower = dataclasses.asdict(config.vision)
    tower["num_hidden_layers"] += 1
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        **dataclasses.asdict(config.language),
        "use_sliding_window": False,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision.hidden_size,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": config.newline,
        "mm_spatial_pool_mode": config.pool_mode,
        "vision_config": tower,
    }


def initial_llava_video(config: LlavaVideoConfig, seed: int) -> tuple[nnx.GraphDef, dict]:
    graphdef, params = fresh_params(lambda rngs: llava_video.LlavaVideo(config, rngs=rngs), seed)

    def add_constant(attention: dict, name: str, layer: int, columns: slice, values: np.ndarray) -> None:
        bias = attention[name]["bias"]
        attention[name]["bias"] = bias.at[layer, columns].set(values)

    # Products of random queries and keys that are not normalised are this much smaller than what sharpens them.
    find_and_copy(params["language_model"], config.language, add_constant, 5 * math.sqrt(config.language.head_dim))
    return graphdef, params


# ---- Qwen3-VL --------------------------------------------------------------------------------------------


def qwen3_config_json(vocab_size: int) -> dict:
    """Frames one by one (the published models take pairs), one token each, one level of deepstack."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": vocab_size,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 4, 4],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 96,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "num_position_embeddings": 4,
            "deepstack_visual_indexes": [0],
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


# However many frames a video has, each is shown at the smallest size, IMAGE_SIZE.
QWEN3_PREPROCESSING = {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "patch_size": PATCH_SIZE,
    "merge_size": 2,
    "temporal_patch_size": 1,
    "size": {"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def initial_qwen3_vl(config: qwen3_vl.Qwen3VLConfig, seed: int) -> tuple[nnx.GraphDef, dict]:
    """Its projections have no biases. What LLaVA-Video's biases say is read from a coordinate of the states that is the
    same for every token, text or visual, and that no layer writes to at first."""
    graphdef, params = fresh_params(lambda rngs: qwen3_vl.Qwen3VL(config, rngs=rngs), seed)
    visual, language = params["visual"], params["language_model"]
    attention, mlp = language["layers"]["self_attn"], language["layers"]["mlp"]
    for reader in (*(attention[name] for name in ("q_proj", "k_proj", "v_proj")), mlp["gate_proj"], mlp["up_proj"]):
        reader["kernel"] = reader["kernel"].at[:, CONSTANT].set(0)

    def add_constant(attention: dict, name: str, layer: int, columns: slice, values: np.ndarray) -> None:
        kernel = attention[name]["kernel"]
        attention[name]["kernel"] = kernel.at[layer, CONSTANT, columns].set(values)

    find_and_copy(language, config.language, add_constant, 1.0, NUM_FREQUENCIES)
    for name in ("q_norm", "k_norm"):  # heads of a layer share them
        attention[name]["scale"] *= math.sqrt(QK_SCALE)
    for writer in (attention["o_proj"], mlp["down_proj"]):
        writer["kernel"] = writer["kernel"].at[:, :, CONSTANT].set(0)
    words = language["embed_tokens"]["embedding"].at[:, CONSTANT].set(CONSTANT_VALUE)
    language["embed_tokens"]["embedding"], language["lm_head"]["kernel"] = words, reading_head(words)
    last = visual["merger"]["linear_fc2"]
    last["kernel"] = last["kernel"].at[:, CONSTANT].set(0)
    last["bias"] = last["bias"].at[CONSTANT].set(CONSTANT_VALUE)
    deepstack = visual["deepstack_merger_list"]["linear_fc2"]
    deepstack["kernel"] = jnp.zeros_like(deepstack["kernel"])  # nothing is added at first
    return graphdef, params


# ---- what both begin with --------------------------------------------------------------------------------


def find_and_copy(
    language: dict, cfg: Qwen2Config, add_constant: Callable, strength: float, num_frequencies: int = 0
) -> None:
    """Sets the attention, mlps and head of a Qwen2's or Qwen3's fresh parameters, in place.

    Args:
      add_constant: (parameters of attention, projection's name, layer, its columns, values) makes the projection say
        these values for every token.
      strength: product of the lengths of what looks back, per frequency.
      num_frequencies: the fastest frequencies, by which it looks; 0 = all.
    """
    attention = language["layers"]["self_attn"]
    L, D, d = cfg.num_hidden_layers, cfg.hidden_size, cfg.head_dim
    groups = cfg.num_attention_heads // cfg.num_key_value_heads

    def of_query_heads(kernel):
        """[L, D, key/value heads * d] -> [L, D, query heads * d], each head repeated for its group."""
        return jnp.repeat(kernel.reshape(L, D, -1, d), groups, axis=2).reshape(L, D, -1)

    random_output = attention["o_proj"]["kernel"]
    query = (attention["q_proj"]["kernel"] + of_query_heads(attention["k_proj"]["kernel"])) / 2
    attention["q_proj"]["kernel"] = SHARPNESS * query
    undone = of_query_heads(attention["v_proj"]["kernel"]).swapaxes(1, 2)
    attention["o_proj"]["kernel"] = 0.1 * random_output + undone
    for layer in (0, 1):
        _look_back(attention, cfg, layer, (1, 2), add_constant, strength, num_frequencies or d // 2)
    # An induction head: the first layer says what came before in a code of its own, the third looks for that code.
    last = slice(-groups * d, None)
    attention["o_proj"]["kernel"] = attention["o_proj"]["kernel"].at[0, last].set(random_output[0, last])
    earlier = SHARPNESS / 2 * jnp.tile(attention["v_proj"]["kernel"][0, :, -d:], groups)
    attention["q_proj"]["kernel"] = attention["q_proj"]["kernel"].at[2, :, last].set(earlier)
    attention["k_proj"]["kernel"] = attention["k_proj"]["kernel"].at[2, :, -d:].set(random_output[0, -d:].T)
    language["layers"]["mlp"]["down_proj"]["kernel"] *= BRANCH
    language["lm_head"]["kernel"] = reading_head(language["embed_tokens"]["embedding"])


def _look_back(
    attention: dict,
    cfg: Qwen2Config,
    layer: int,
    offsets: tuple[int, ...],
    add_constant: Callable,
    strength: float,
    num_frequencies: int,
) -> None:
    """Makes the queries of the layer's last key head look `offsets` tokens back, in place.

    What a query and a key always say makes the score a sum of cosines of (distance - offset) under the rotary
    embedding, whatever the tokens are.
    """
    d, groups = cfg.head_dim, cfg.num_attention_heads // cfg.num_key_value_heads
    length = math.sqrt(strength) * (np.arange(d // 2) < num_frequencies)
    angles = np.outer(offsets, cfg.rope_theta ** (-np.arange(0, d, 2) / d))  # [offsets, d / 2]
    query = np.concatenate([length * np.cos(angles), -length * np.sin(angles)], axis=1).reshape(-1)
    key = np.concatenate([length, np.zeros(d // 2)])
    for name, constant, width in (("q_proj", query, groups * d), ("k_proj", key, d)):
        attention[name]["kernel"] = attention[name]["kernel"].at[layer, :, -width:].multiply(0.1)
        add_constant(attention, name, layer, slice(-width, None), constant)


def reading_head(embeddings: jax.Array) -> jax.Array:
    """The head's kernel [hidden, V] that reads off which word's embedding a state is."""
    return embeddings.T / jnp.sqrt(embeddings.shape[1])


LLAVA_VIDEO = TinyAnswerer(
    "LLaVA-Video",
    llava_video.FAMILY,
    llava_config_json,
    {},
    {},
    initial_llava_video,
    prompt_tokens=lambda tokens: tokens,
)
TINY_ANSWERERS: dict[str, TinyAnswerer] = {  # name of the folder -> model
    "llava_video": LLAVA_VIDEO,
    # Four tokens and two newlines a frame, of which patches can be merged as well (docs/tokens.md).
    "llava_video_2x2": LLAVA_VIDEO._replace(config_json=partial(llava_config_json, patch_size=PATCH_SIZE // 2)),
    "qwen3_vl": TinyAnswerer(
        "Qwen3-VL",
        qwen3_vl.FAMILY,
        qwen3_config_json,
        QWEN3_PREPROCESSING,
        {
            "vision_start_token_id": qwen3_vl.START,
            "vision_end_token_id": qwen3_vl.END,
            "image_token_id": "<|image_pad|>",
            "video_token_id": VIDEO_TAG,
        },
        initial_qwen3_vl,
        prompt_tokens=lambda tokens: tokens[:, 0],  # the others are of deepstack
    ),
}
