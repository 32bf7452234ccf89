"""Qwen3-VL (dense): image tower on pairs of frames, deepstack, Qwen3 with interleaved 3-D positions (Qwen team 2025).

A video is a row of pairs of frames in the prompt, each with its time in words: `<12.3 seconds>`, markers, its visual
tokens. So frames that are no fixed time apart are shown with their true times. Pairs are encoded apart from the prompts
and from each other: one that several prompts show is encoded once.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tspo_jax.models import attention
from tspo_jax.models.family import Family
from tspo_jax.models.layers import Embed, LayerNorm, Linear, activation, layer_at, scan_layers, stack_layers
from tspo_jax.models.preprocessing import Qwen3Processor, patchify
from tspo_jax.models.qwen2 import Qwen2, Qwen2Config, rotate
from tspo_jax.models.qwen2_5_vl import PatchEmbed, Qwen25VL, patch_angles
from tspo_jax.models.video_prompt import (
    DEFAULT_VIDEO,
    VIDEO_TOKEN,
    FrameTimes,
    Prompt,
    VideoOptions,
    lay_out,
    splice,
)
from tspo_jax.models.video_tags import VIDEO_TAG

START, END = "<|vision_start|>", "<|vision_end|>"  # around the visual tokens of a pair


@dataclasses.dataclass(frozen=True)
class Qwen3VisionConfig:
    """The image tower. Defaults are those that Hugging Face's config.json leaves out."""

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    out_hidden_size: int = 3584
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    hidden_act: str = "gelu_pytorch_tanh"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def unit(self) -> int:
        """Pixels per side of the patches that are merged into one visual token."""
        return self.patch_size * self.spatial_merge_size

    @property
    def side(self) -> int:
        """Learned positions per side of their square grid."""
        return math.isqrt(self.num_position_embeddings)


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """`mrope_section` are the numbers of rotary frequencies that belong to time, height and width."""

    language: Qwen2Config
    vision: Qwen3VisionConfig
    mrope_section: tuple[int, int, int]
    video: VideoOptions = DEFAULT_VIDEO

    @classmethod
    def from_hf(cls, config: Mapping, video: VideoOptions = DEFAULT_VIDEO) -> "Qwen3VLConfig":
        """From config.json, of transformers 4.57 (`rope_scaling`) or 5 (`rope_parameters`)."""
        text = dict(config.get("text_config") or {})
        if text.get("num_experts"):
            raise ValueError(
                "config.json: text_config.num_experts: a mixture of experts; only dense models are supported"
            )
        text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        rope = text.pop("rope_scaling", None) or text.get("rope_parameters") or {}
        kind, section = rope.get("rope_type", rope.get("type", "default")), rope.get("mrope_section", (24, 20, 20))
        if kind not in ("default", "mrope"):
            raise ValueError(f"config.json: rope_scaling is of type {kind!r}; only unscaled positions are supported")
        if not rope.get("mrope_interleaved", True):
            raise ValueError("config.json: mrope_interleaved is false; Qwen3-VL's positions are interleaved")
        text["rope_parameters"] = {"rope_theta": rope.get("rope_theta") or text.get("rope_theta") or 500000.0}
        if text.get("attention_bias"):
            raise ValueError("config.json: text_config.attention_bias is true; only models without are supported")
        language = dataclasses.replace(
            Qwen2Config.from_hf(text), head_dim=text.get("head_dim") or 128, attention_bias=False, use_qk_norm=True
        )
        if len(section) != 3 or 2 * sum(section) != language.head_dim:
            raise ValueError(
                f"config.json: mrope_section {list(section)} does not sum to half of the heads' {language.head_dim}"
            )
        vision = read_vision_config(config.get("vision_config") or {})
        if vision.out_hidden_size != language.hidden_size:
            raise ValueError(
                f"config.json: vision_config.out_hidden_size {vision.out_hidden_size} is not hidden_size "
                f"{language.hidden_size}"
            )
        return cls(language, vision, tuple(section), video)

    @property
    def temporal_patch_size(self) -> int:
        """Frames that are encoded together."""
        return self.vision.temporal_patch_size

    def num_visual_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Visual tokens of a prompt with `num_frames` frames of height x width pixels."""
        unit = self.vision.unit
        return math.ceil(num_frames / self.temporal_patch_size) * (height // unit) * (width // unit)

    @property
    def axis_of_frequency(self) -> np.ndarray:
        """int [head_dim // 2]: whether time (0), height or width turns a frequency. Interleaved: height has each third
        frequency from 1 on and width from 2 on, as many as `mrope_section` says; time has all others."""
        axes = np.zeros(self.language.head_dim // 2, int)
        for axis in (1, 2):
            axes[axis : 3 * self.mrope_section[axis] : 3] = axis
        return axes

    def write_times(self, prompt: str, times: FrameTimes) -> str:
        """A rendered prompt with VIDEO_TAG once -> with each pair's time in words, markers and VIDEO_TAG.

        The time of a pair is the mean of its first and last frame's; where a frame is missing the last one counts
        twice. The template's own markers around the video stay where `outer_markers` says so.
        """
        size = self.temporal_patch_size
        seconds = self.video.seconds(times, size)
        seconds = np.pad(seconds, (0, -len(seconds) % size), mode="edge").reshape(-1, size)
        pairs = "".join(
            f"<{(first + last) / 2:.1f} seconds>{START}{VIDEO_TAG}{END}" for first, last in seconds[:, [0, -1]].tolist()
        )
        return prompt.replace(f"{START}{VIDEO_TAG}{END}", f"{START}{pairs}{END}" if self.video.outer_markers else pairs)

    def time_steps(self, times: FrameTimes) -> None:
        """Nothing: the times are in the text."""


def read_vision_config(config: Mapping) -> Qwen3VisionConfig:
    names = {field.name for field in dataclasses.fields(Qwen3VisionConfig)}
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in config.items() if name in names}
    vision = Qwen3VisionConfig(**values)
    activation(vision.hidden_act)
    if vision.hidden_size % vision.num_heads or vision.head_dim % 4:
        raise ValueError(
            f"config.json: vision_config.hidden_size {vision.hidden_size} does not make {vision.num_heads} heads of a "
            "width that is a multiple of 4"
        )
    if vision.side**2 != vision.num_position_embeddings:
        raise ValueError(
            f"config.json: vision_config.num_position_embeddings {vision.num_position_embeddings} is no square"
        )
    theta = (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    if theta != 10000.0:
        raise ValueError(f"config.json: vision_config.rope_parameters.rope_theta is {theta:g}; only 10000 is supported")
    indexes = vision.deepstack_visual_indexes
    if list(indexes) != sorted(set(indexes)) or not all(0 <= index < vision.depth for index in indexes):
        raise ValueError(
            f"config.json: vision_config.deepstack_visual_indexes {list(indexes)} are not ascending layers of "
            f"{vision.depth}"
        )
    return vision


# ---- image tower -----------------------------------------------------------------------------------------
# Patches of a pair of frames lie in the order (row of merged patches, column of merged patches, row, column), N = h * w
# in all; `grid` are the static numbers of rows and columns of merged patches.


def position_weights(grid: tuple[int, int], merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """How the learned side x side positions are read at a grid's patches: bilinearly, corners on corners.

    Returns: int [N, 4], numbers of learned positions, and their weights float32 [N, 4].
    """

    def taps(size: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(at)
        high_weight = at - low
        low = low.astype(int)
        return np.stack([low, np.minimum(low + 1, side - 1)], 1), np.stack([1 - high_weight, high_weight], 1)

    i, j, di, dj = np.indices((*grid, merge, merge)).reshape(4, -1)
    (rows, row_weights), (columns, column_weights) = (taps(size * merge) for size in grid)
    rows, row_weights = rows[i * merge + di], row_weights[i * merge + di]
    columns, column_weights = columns[j * merge + dj], column_weights[j * merge + dj]
    index = rows[:, :, None] * side + columns[:, None, :]
    return index.reshape(-1, 4), (row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, 4)


class VisionAttention(nnx.Module):
    """Attention among all patches of a pair of frames; softmax and rotation in float32."""

    def __init__(self, cfg: Qwen3VisionConfig, *, rngs: nnx.Rngs):
        self.qkv = Linear(cfg.hidden_size, 3 * cfg.hidden_size, rngs=rngs)
        self.proj = Linear(cfg.hidden_size, cfg.hidden_size, rngs=rngs)
        self.num_heads = cfg.num_heads

    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        F, N, _ = x.shape
        q, k, v = (y.reshape(F, N, self.num_heads, -1) for y in jnp.split(self.qkv(x), 3, axis=-1))
        q, k = (rotate(y.astype(jnp.float32), angles[None]).astype(x.dtype) for y in (q, k))
        return self.proj(attention.bidirectional(q, k, v).reshape(x.shape))


class VisionMlp(nnx.Module):
    def __init__(self, d_in: int, d_hidden: int, d_out: int, hidden_act: str, *, rngs: nnx.Rngs):
        self.linear_fc1 = Linear(d_in, d_hidden, rngs=rngs)
        self.linear_fc2 = Linear(d_hidden, d_out, rngs=rngs)
        self.activation = activation(hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_fc2(self.activation(self.linear_fc1(x)))


class VisionBlock(nnx.Module):
    def __init__(self, cfg: Qwen3VisionConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(cfg.hidden_size, epsilon=1e-6, rngs=rngs)
        self.attn = VisionAttention(cfg, rngs=rngs)
        self.norm2 = LayerNorm(cfg.hidden_size, epsilon=1e-6, rngs=rngs)
        self.mlp = VisionMlp(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_size, cfg.hidden_act, rngs=rngs)

    def __call__(self, state, angles, slot):
        """`state` is x and what is kept of the blocks so far, to which the output is written at `slot`."""
        x, kept = state
        x = x + self.attn(self.norm1(x), angles)
        x = x + self.mlp(self.norm2(x))
        return (x, jax.lax.dynamic_update_index_in_dim(kept, x, slot, 0)), None


class Merger(VisionMlp):
    """Neighbouring 2 x 2 patches -> one visual token; normalised before they are joined, or after."""

    def __init__(self, cfg: Qwen3VisionConfig, *, norm_joined: bool, rngs: nnx.Rngs):
        width = cfg.hidden_size * cfg.spatial_merge_size**2
        super().__init__(width, width, cfg.out_hidden_size, "gelu", rngs=rngs)
        self.norm = LayerNorm(width if norm_joined else cfg.hidden_size, epsilon=1e-6, rngs=rngs)
        self.width, self.norm_joined = width, norm_joined

    def __call__(self, x: jax.Array) -> jax.Array:
        joined = (x.shape[0], -1, self.width)
        x = self.norm(x.reshape(joined)) if self.norm_joined else self.norm(x).reshape(joined)
        return super().__call__(x)


class Qwen3Vision(nnx.Module):
    """Frames float [F, H, W, 3], normalised, H and W multiples of `cfg.unit` -> visual tokens of each pair of
    successive frames [F // 2, 1 + D, rows, columns, out_hidden_size]: those that stand in the prompt, then those of the
    D deepstack levels, which are added behind the language model's first layers."""

    def __init__(self, cfg: Qwen3VisionConfig, *, rngs: nnx.Rngs):
        self.patch_embed = PatchEmbed(cfg, use_bias=True, rngs=rngs)
        self.pos_embed = Embed(cfg.num_position_embeddings, cfg.hidden_size, rngs=rngs)
        self.blocks = stack_layers(lambda rngs: VisionBlock(cfg, rngs=rngs), cfg.depth, rngs)
        self.merger = Merger(cfg, norm_joined=False, rngs=rngs)
        levels = len(cfg.deepstack_visual_indexes)
        if levels:
            self.deepstack_merger_list = stack_layers(
                lambda rngs: Merger(cfg, norm_joined=True, rngs=rngs), levels, rngs
            )
        self.cfg = cfg

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.merge(self.features(pixels))

    def features(self, pixels: jax.Array) -> jax.Array:
        """Patches behind the last block and behind those of the deepstack levels, the patches of a visual token
        together: [F // 2, 1 + D, rows, columns, patches, hidden]."""
        cfg = self.cfg
        F, H, W, _ = pixels.shape
        grid = H // cfg.unit, W // cfg.unit
        x = self.patch_embed(patchify(pixels, cfg.patch_size, cfg.temporal_patch_size, cfg.spatial_merge_size))
        index, weight = position_weights(grid, cfg.spatial_merge_size, cfg.side)
        x = x + jnp.einsum("ntw,nt->nw", self.pos_embed(index).astype(jnp.float32), weight).astype(x.dtype)
        angles = jnp.asarray(patch_angles(grid, cfg.spatial_merge_size, cfg.head_dim))
        # The outputs of the deepstack layers are kept, those of the others overwrite each other in one more slot.
        levels = {layer: level for level, layer in enumerate(cfg.deepstack_visual_indexes)}
        slot = jnp.array([levels.get(layer, len(levels)) for layer in range(cfg.depth)])
        kept = jnp.zeros((len(levels) + 1, *x.shape), x.dtype)
        (x, kept), _ = scan_layers(self.blocks, (x, kept), angles, per_layer=slot)
        features = jnp.stack([x, *(kept[level] for level in range(len(levels)))], axis=1)
        return features.reshape(F // cfg.temporal_patch_size, -1, *grid, cfg.spatial_merge_size**2, cfg.hidden_size)

    def merge(self, features: jax.Array) -> jax.Array:
        """`features` -> visual tokens [F // 2, 1 + D, rows, columns, out_hidden_size]."""
        pairs, levels, *grid, _, width = features.shape
        patches = features.reshape(pairs, levels, -1, width)
        mergers = [self.merger, *(layer_at(self.deepstack_merger_list, i) for i in range(levels - 1))]
        tokens = [merger(patches[:, level]) for level, merger in enumerate(mergers)]
        return jnp.stack(tokens, axis=1).reshape(pairs, levels, *grid, self.cfg.out_hidden_size)


# ---- positions -------------------------------------------------------------------------------------------


def prompt_positions(
    ids: jax.Array, num_pairs: int, lengths: jax.Array, grid: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Three-axis positions of prompts and of what is generated for them.

    Text counts on by one on all axes. The tokens of a pair, rows x columns, begin where the text before it ends: time
    stands still, height and width count on; the text behind it goes on behind the longer side.

    Args:
      ids: int [P, N], right padded, with at most `num_pairs` VIDEO_TOKENs per row.
      lengths: int [P], of the ids.
    Returns:
      int [P, N + num_pairs * (rows * columns - 1), 3]; and int [P], the position of the first generated token.
    """
    rows, columns = grid
    advance = jnp.where(ids == VIDEO_TOKEN, max(grid), 1)
    start = jnp.cumsum(advance, axis=1) - advance
    layout = lay_out(ids, num_pairs, rows * columns)
    within = layout.visual % (rows * columns)
    offsets = jnp.stack([jnp.zeros_like(within), within // columns, within % columns], axis=-1)
    base = jnp.take_along_axis(start, layout.source, axis=1)[..., None]
    following = jnp.sum(jnp.where(jnp.arange(ids.shape[1]) < lengths[:, None], advance, 0), axis=1)
    return base + jnp.where(layout.is_visual[..., None], offsets, 0), following


# ---- the whole model -------------------------------------------------------------------------------------


class Qwen3VL(Qwen25VL):
    """The answering Video-MLLM; prefill and decode are Qwen2.5-VL's, with positions and layers of its own."""

    def __init__(self, cfg: Qwen3VLConfig, *, rngs: nnx.Rngs):
        self.visual = Qwen3Vision(cfg.vision, rngs=rngs)
        self.language_model = Qwen2(cfg.language, rngs=rngs)
        self.cfg = cfg

    def encode_frames(self, pixels: jax.Array) -> jax.Array:
        """Normalised frames [F, H, W, 3], F even -> tokens [F // 2, 1 + D, rows, columns, hidden] of pairs."""
        return self.visual(pixels)

    def prompt(
        self,
        tokens: jax.Array,
        ids: jax.Array,
        lengths: jax.Array,
        steps: jax.Array | None = None,
        num_frames: jax.Array | None = None,
    ) -> Prompt:
        """Text with the visual tokens of each pair spliced in.

        Args:
          tokens: [P, pairs, 1 + D, rows, columns, hidden], of each prompt's video.
          ids: int [P, N], right padded, with a VIDEO_TOKEN per pair that is shown (`Qwen3VLConfig.write_times`).
          lengths: int [P], of the ids.
          steps, num_frames: not looked at; the text tells the times, and its VIDEO_TOKENs which pairs are shown.
        """
        P, pairs, levels, rows, columns, width = tokens.shape
        tokens = tokens.reshape(P, pairs, levels, rows * columns, width)
        embeddings = splice(self.language_model.embed_tokens(jnp.maximum(ids, 0)), tokens[:, :, 0], ids)
        nothing = jnp.zeros((*ids.shape, width), tokens.dtype)
        added = [splice(nothing, tokens[:, :, level], ids) for level in range(1, levels)]
        positions, following = prompt_positions(ids, pairs, lengths, (rows, columns))
        lengths = lengths + (ids == VIDEO_TOKEN).sum(axis=1) * (rows * columns - 1)
        return Prompt(embeddings, positions, lengths, following, jnp.stack(added, axis=1) if added else None)


# ---- the family ------------------------------------------------------------------------------------------


def read(description: Mapping, preprocessing: Mapping, video: VideoOptions):
    """The network's config and processor; see models/family.py."""
    if video.merge:
        raise ValueError("Qwen3-VL has words between its pairs of frames: it cannot merge them")
    if video.time_instruction or video.next_position != DEFAULT_VIDEO.next_position:
        raise ValueError(f"Qwen3-VL is told the times of pairs of frames in words: it cannot do {video}")
    config = Qwen3VLConfig.from_hf(description, video)
    tower = config.vision
    sizes = tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size
    return config, Qwen3Processor.from_hf(preprocessing, *sizes, video.frame_size)


FAMILY = Family(
    model_types=("qwen3_vl",),
    model=Qwen3VL,
    read=read,
    names=dict(
        rename=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.", "model.language_model."),
            (r"^visual\.patch_embed\.", "model.visual.patch_embed.proj."),
            (r"^visual\.", "model.visual."),
        ),
        ignored=(r"\.rotary_(pos_)?emb\.inv_freq$",),
        aliases=((r"^visual\.", "model.visual."), (r"^language_model\.", "model.language_model.")),
    ),
    sharding=(
        (r"visual\.pos_embed\.embedding", (None, "width")),
        (r"visual\.blocks\.mlp\.linear_fc1\.kernel", (None, "width", None)),
        (r"visual\.blocks\.mlp\.linear_fc2\.kernel", (None, None, "width")),
        (r"visual\.merger\.linear_fc1\.kernel", ("width", None)),
        (r"visual\.merger\.linear_fc2\.kernel", (None, "width")),
        (r"visual\.deepstack_merger_list\.linear_fc1\.kernel", (None, "width", None)),
        (r"visual\.deepstack_merger_list\.linear_fc2\.kernel", (None, None, "width")),
    ),
    tower=("visual.patch_embed.", "visual.pos_embed.", "visual.blocks."),
    templates={
        "qwen3_vl": "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{text}<|im_end|>\n"
        "<|im_start|>assistant\n",
    },
    stacked=("deepstack_merger_list",),
)
