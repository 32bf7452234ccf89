"""Qwen2.5-VL: window-attention image tower on pairs of frames, merger, Qwen2 with 3-D positions (Bai et al. 2025).

The two frames of a pair are one temporal patch: pairs are what is encoded, apart from the prompts and from each other
(attention never crosses time), so that a pair that several prompts show is encoded once.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tspo_jax.models import attention
from tspo_jax.models.family import Family
from tspo_jax.models.layers import Linear, Mlp, RMSNorm, from_heads, of_heads, scan_layers, stack_layers
from tspo_jax.models.preprocessing import QwenProcessor, patchify
from tspo_jax.models.qwen2 import (
    GatedFeedForward,
    KVCache,
    Qwen2,
    Qwen2Config,
    inverse_frequencies,
    rope_angles,
    rotate,
)
from tspo_jax.models.token_budget import Budget, merge_visual
from tspo_jax.models.video_prompt import (
    DEFAULT_VIDEO,
    NEXT_POSITION_RULES,
    UNKNOWN_SECOND_PER_GRID,
    FrameTimes,
    Prompt,
    VideoOptions,
    splice,
    video_start,
)


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """The image tower. Defaults are those that Hugging Face's config.json leaves out."""

    depth: int = 32
    hidden_size: int = 3584
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    tokens_per_second: float = 4
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def unit(self) -> int:
        """Pixels per side of the patches that are merged into one visual token."""
        return self.patch_size * self.spatial_merge_size


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig:
    """`mrope_section` are the numbers of rotary frequencies that belong to time, height and width."""

    language: Qwen2Config
    vision: QwenVisionConfig
    mrope_section: tuple[int, int, int]
    video: VideoOptions = DEFAULT_VIDEO

    @classmethod
    def from_hf(cls, config: Mapping, video: VideoOptions = DEFAULT_VIDEO) -> "Qwen25VLConfig":
        """From config.json, flat (as published) or with `text_config` (as newer transformers save it)."""
        if video.next_position not in NEXT_POSITION_RULES:
            raise ValueError(f"next_position is {video.next_position!r}, not one of {', '.join(NEXT_POSITION_RULES)}")
        text = dict(config.get("text_config") or config)
        # A tied head is a property of the whole model, wherever the rest is.
        text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        rope = text.pop("rope_scaling", None) or text.get("rope_parameters") or {}
        kind, section = rope.get("rope_type", rope.get("type", "default")), rope.get("mrope_section", (16, 24, 24))
        if kind not in ("default", "mrope"):
            raise ValueError(f"config.json: rope_scaling is of type {kind!r}; only mrope is supported")
        text["rope_parameters"] = {"rope_theta": rope.get("rope_theta")}
        text.setdefault("rope_theta", 1000000.0)
        language = Qwen2Config.from_hf(text)
        if 2 * sum(section) != language.head_dim or len(section) != 3:
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

    @property
    def axis_of_frequency(self) -> np.ndarray:
        """int [head_dim // 2]: whether time (0), height or width turns a frequency."""
        return np.repeat(np.arange(3), self.mrope_section)

    def write_times(self, prompt: str, times: FrameTimes) -> str:
        """The text of a prompt with a video of these times: they are not in the text."""
        return prompt

    def time_steps(self, times: FrameTimes) -> np.ndarray | None:
        """Positions on the axis of time of the pairs of frames, after the first: int32 [pairs].

        A pair lies where its first frame does: evenly spaced frames lie as Hugging Face's class puts them. None where
        `second_per_grid` says how long each pair lasts.
        """
        if self.video.second_per_grid:
            return None
        seconds = times.seconds[:: self.temporal_patch_size] - times.seconds[0]
        steps = seconds * self.vision.tokens_per_second
        return np.floor(steps + 1e-6).astype(np.int32)  # times such as 2.9999999 are 3

    def num_visual_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Visual tokens of a prompt with `num_frames` frames of height x width pixels."""
        unit = self.vision.unit
        pairs, patches = -(-num_frames // self.temporal_patch_size), (height // unit) * (width // unit)
        return math.prod(Budget.of(self.video.merge).left(pairs, patches) if self.video.merge else (pairs, patches))


def read_vision_config(config: Mapping) -> QwenVisionConfig:
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"config.json: vision_config.hidden_act {activation!r} is not supported, only silu")
    names = {field.name for field in dataclasses.fields(QwenVisionConfig)}
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in config.items() if name in names}
    vision = QwenVisionConfig(**values)
    if vision.hidden_size % vision.num_heads or vision.head_dim % 4:
        raise ValueError(
            f"config.json: vision_config.hidden_size {vision.hidden_size} does not make {vision.num_heads} heads of a "
            "width that is a multiple of 4"
        )
    if vision.window_size % vision.unit:
        raise ValueError(
            f"config.json: vision_config.window_size {vision.window_size} is no multiple of the {vision.unit} pixels "
            "of a visual token"
        )
    return vision


# ---- image tower -----------------------------------------------------------------------------------------
# Patches of a pair of frames lie in the order (row of merged patches, column of merged patches, row, column), N = h * w
# in all; `grid` are the static numbers of rows and columns of merged patches.


def patch_angles(grid: tuple[int, int], merge: int, head_dim: int) -> np.ndarray:
    """Rotary angles float32 [N, head_dim // 2] of a grid's patches: the first half is rows', the other columns'."""
    shape = (grid[0], grid[1], merge, merge)
    i, j, di, dj = np.indices(shape).reshape(4, -1)
    inverse_frequency = 10000.0 ** (-np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2))
    rows, columns = i * merge + di, j * merge + dj
    return np.concatenate(
        [np.outer(rows, inverse_frequency), np.outer(columns, inverse_frequency)], axis=1, dtype=np.float32
    )


def window_order(grid: tuple[int, int], side: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the patches of windows of side x side merged patches lie, int [N], a window after the other; and how many
    each window has, which are fewer where it sticks out of the grid."""
    row, column = np.indices(grid).reshape(2, -1) // side
    window = row * math.ceil(grid[1] / side) + column
    units = np.argsort(window, kind="stable")
    return (units[:, None] * merge**2 + np.arange(merge**2)).reshape(-1), np.bincount(window) * merge**2


class VisionAttention(nnx.Module):
    """Attention among the patches of a pair of frames, or of each window of them, which lie one after the other in x;
    softmax and rotation in float32."""

    def __init__(self, cfg: QwenVisionConfig, *, rngs: nnx.Rngs):
        self.qkv = Linear(cfg.hidden_size, 3 * cfg.hidden_size, rngs=rngs)
        self.proj = Linear(cfg.hidden_size, cfg.hidden_size, rngs=rngs)
        self.cfg = cfg

    def __call__(self, x: jax.Array, angles: jax.Array, lengths: np.ndarray, is_full: jax.Array) -> jax.Array:
        N, H = x.shape[1], self.cfg.num_heads
        x, is_key = attention.in_whole_blocks(x, H)
        if more := x.shape[1] - N:
            angles, lengths = jnp.pad(angles, ((0, more), (0, 0))), [*lengths, more]
        q, k, v = jnp.split(of_heads(self.qkv, x, 3 * H), 3, axis=2)
        q, k = (rotate(y.astype(jnp.float32), angles[None]).astype(x.dtype) for y in (q, k))
        everywhere = partial(attention.bidirectional, is_key=is_key)
        windowed = partial(attention.windowed, lengths=lengths)
        out = jax.lax.cond(is_full, everywhere, windowed, q, k, v)
        return from_heads(self.proj, out)[:, :N]


class VisionBlock(nnx.Module):
    def __init__(self, cfg: QwenVisionConfig, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(cfg.hidden_size, 1e-6)
        self.attn = VisionAttention(cfg, rngs=rngs)
        self.norm2 = RMSNorm(cfg.hidden_size, 1e-6)
        self.mlp = GatedFeedForward(cfg.hidden_size, cfg.intermediate_size, use_bias=True, rngs=rngs)

    def __call__(self, x, angles, lengths, is_full):
        x = x + self.attn(self.norm1(x), angles, lengths, is_full)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    """A 3-D convolution whose kernel is its stride: one matrix product with flattened patches."""

    def __init__(self, cfg, *, use_bias: bool = False, rngs: nnx.Rngs):
        shape = (3, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size, cfg.hidden_size)
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(cfg.hidden_size))
        self.use_bias = use_bias

    def __call__(self, patches: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        out = patches.astype(kernel.dtype) @ kernel.reshape(-1, kernel.shape[-1])
        return out + self.bias[...] if self.use_bias else out


class Merger(nnx.Module):
    """Neighbouring 2 x 2 patches -> one visual token."""

    def __init__(self, cfg: QwenVisionConfig, *, rngs: nnx.Rngs):
        width = cfg.hidden_size * cfg.spatial_merge_size**2
        self.ln_q = RMSNorm(cfg.hidden_size, 1e-6)
        self.mlp = Mlp(width, width, cfg.out_hidden_size, "gelu", rngs=rngs)
        self.width = width

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp(self.ln_q(x).reshape(x.shape[0], -1, self.width))


class QwenVision(nnx.Module):
    """Frames float [F, H, W, 3], normalised, H and W multiples of `cfg.unit` -> visual tokens [F // 2, rows, columns,
    out_hidden_size] of each pair of successive frames."""

    def __init__(self, cfg: QwenVisionConfig, *, rngs: nnx.Rngs):
        self.patch_embed = PatchEmbed(cfg, rngs=rngs)
        self.blocks = stack_layers(lambda rngs: VisionBlock(cfg, rngs=rngs), cfg.depth, rngs)
        self.merger = Merger(cfg, rngs=rngs)
        self.cfg = cfg

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.merge(self.features(pixels))

    def features(self, pixels: jax.Array) -> jax.Array:
        """Patches behind the last block, those of a visual token together: [F // 2, rows, columns, patches, hidden]."""
        cfg = self.cfg
        F, H, W, _ = pixels.shape
        grid = H // cfg.unit, W // cfg.unit
        x = self.patch_embed(patchify(pixels, cfg.patch_size, cfg.temporal_patch_size, cfg.spatial_merge_size))
        # Nothing but attention looks at another patch, so that the windows' order serves all blocks.
        order, lengths = window_order(grid, cfg.window_size // cfg.unit, cfg.spatial_merge_size)
        angles = jnp.asarray(patch_angles(grid, cfg.spatial_merge_size, cfg.head_dim)[order])
        is_full = jnp.array([i in cfg.fullatt_block_indexes for i in range(cfg.depth)])
        x, _ = scan_layers(self.blocks, x[:, order], angles, lengths, per_layer=is_full)
        return x[:, np.argsort(order)].reshape(F // cfg.temporal_patch_size, *grid, -1, cfg.hidden_size)

    def merge(self, features: jax.Array) -> jax.Array:
        """`features` -> visual tokens [F // 2, rows, columns, out_hidden_size]."""
        pairs, *grid, _, width = features.shape
        return self.merger(features.reshape(pairs, -1, width)).reshape(pairs, *grid, self.cfg.out_hidden_size)


# ---- positions -------------------------------------------------------------------------------------------


def video_offsets(grid: tuple[int, int, int], seconds: float, tokens_per_second: float) -> np.ndarray:
    """Positions of a video's tokens after its start: int32 [M, 3] (time, height, width), M = the product of `grid`.

    `seconds` passes from one time step to the next; the product with `tokens_per_second` is cut to an integer, computed
    in float32 as in the original.
    """
    offsets = np.indices(grid).reshape(3, -1).T.astype(np.int32)
    time = offsets[:, 0].astype(np.float32) * np.float32(seconds) * np.float32(tokens_per_second)
    offsets[:, 0] = time.astype(np.int32)
    return offsets


def prompt_positions(
    start: jax.Array,
    num_tokens: int,
    lengths: jax.Array,
    offsets: jax.Array | np.ndarray,
    next_position: str,
    used: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Three-axis positions of prompts with a video, and of what is generated for them.

    Args:
      start: int [P], tokens before the video.
      num_tokens: N, of the padded prompts, the video's M tokens included.
      lengths: int [P], tokens of each prompt.
      offsets: of the video's tokens after its start, int [M, 3] (from `video_offsets`) or [P, M, 3].
      next_position: one of NEXT_POSITION_RULES.
      used: int [P], how many of the M tokens a prompt has; None = all.
    Returns:
      int [P, N, 3]; and int [P], the position of the first generated token on all three axes: generated text goes on
      as text of the prompt would.
    """
    M, start = offsets.shape[-2], start[:, None]
    used = jnp.full(1, M) if used is None else used
    of_video = offsets * (jnp.arange(M) < used[:, None])[..., None]
    jump = 1 + (of_video if next_position == "after_all" else of_video[..., 1:]).max((-2, -1))  # from start to text
    slot = jnp.arange(num_tokens)[None]
    text = jnp.where(slot < start, slot, slot + (jump - used)[:, None])
    offsets = jnp.broadcast_to(offsets, (len(start), M, 3))
    visual = start[..., None] + jnp.take_along_axis(offsets, (slot - start).clip(0, M - 1)[..., None], axis=1)
    is_visual = (slot >= start) & (slot < start + used[:, None])
    return jnp.where(is_visual[..., None], visual, text[..., None]), lengths - used + jump


def mrope_angles(positions: jax.Array, axis_of_frequency: np.ndarray, head_dim: int, theta: float) -> jax.Array:
    """Positions int [P, N, 3] -> rotary angles float32 [P, N, head_dim // 2], each frequency turned by its own axis."""
    return positions[..., axis_of_frequency].astype(jnp.float32) * inverse_frequencies(head_dim, theta)


# ---- the whole model -------------------------------------------------------------------------------------


class Qwen25VL(nnx.Module):
    """The answering Video-MLLM; see models/llava_video.py for the parts that every one has."""

    def __init__(self, cfg: Qwen25VLConfig, *, rngs: nnx.Rngs):
        self.visual = QwenVision(cfg.vision, rngs=rngs)
        self.language_model = Qwen2(cfg.language, rngs=rngs)
        self.cfg = cfg

    def encode_frames(self, pixels: jax.Array) -> jax.Array:
        """Normalised frames [F, H, W, 3], F even -> tokens [F // 2, rows, columns, hidden] of successive pairs."""
        return self.visual(pixels)

    def tower(self, pixels: jax.Array) -> jax.Array:
        """What the image tower alone makes of the frames: features [F // 2, rows, columns, patches, width]."""
        return self.visual.features(pixels)

    def project(self, features: jax.Array) -> jax.Array:
        """The tower's features as visual tokens [F // 2, rows, columns, hidden] of the language model."""
        return self.visual.merge(features)

    def angles(self, positions: jax.Array) -> jax.Array:
        """Rotary angles float32 [P, N, head_dim // 2] of a prompt's positions int [P, N, 3], or of text's [P, N]."""
        lm = self.cfg.language
        if positions.ndim == 2:
            return rope_angles(positions, lm.head_dim, lm.rope_theta)
        return mrope_angles(positions, self.cfg.axis_of_frequency, lm.head_dim, lm.rope_theta)

    def prompt(
        self,
        tokens: jax.Array,
        ids: jax.Array,
        lengths: jax.Array,
        steps: jax.Array | None = None,
        num_frames: jax.Array | None = None,
    ) -> Prompt:
        """Text with the visual tokens spliced in.

        Args:
          tokens: [P, pairs, rows, columns, hidden], of each prompt's video.
          ids: int [P, N], right padded, exactly one VIDEO_TOKEN per row.
          lengths: int [P], of the ids.
          steps: int [P, pairs], from `Qwen25VLConfig.time_steps`; None where nobody knows the frames' times.
          num_frames: int [P], how many are shown, of pairs that come first; None = all. They cannot be merged then.
        """
        P, *grid, W = tokens.shape
        text = self.language_model.embed_tokens(jnp.maximum(ids, 0))
        L = math.prod(grid[1:])
        budget, tokens = Budget.of(self.cfg.video.merge), tokens.reshape(P, grid[0], L, W)
        if any(budget):
            merged = merge_visual(tokens, budget)
            tokens, first = merged.tokens, (merged.frames[..., None] * L + merged.places).reshape(P, -1)
        used = None if num_frames is None else -(-num_frames // self.cfg.temporal_patch_size) * L
        embeddings = splice(text, tokens.reshape(P, 1, -1, W), ids, used)
        N = embeddings.shape[1]
        lengths = lengths + (N - ids.shape[1] if used is None else used - 1)
        video = self.cfg.video
        seconds = video.second_per_grid or UNKNOWN_SECOND_PER_GRID
        offsets = video_offsets(grid, seconds, self.cfg.vision.tokens_per_second)
        if steps is not None:
            of_token = jnp.repeat(steps, L, axis=1)
            offsets = jnp.broadcast_to(offsets, (P, *offsets.shape)).at[..., 0].set(of_token)
        if any(budget):  # a merged token lies where the first of those that it is made of does
            offsets = jnp.broadcast_to(offsets, (P, grid[0] * L, 3))
            offsets = jnp.take_along_axis(offsets, first[..., None], axis=1)
        positions, following = prompt_positions(video_start(ids), N, lengths, offsets, video.next_position, used)
        return Prompt(embeddings, positions, lengths, following)

    def prefill(self, prompt: Prompt) -> tuple[jax.Array, KVCache, jax.Array]:
        """Logits float32 [P, V] at each prompt's last token, the keys and values of all N slots, and where the next
        token goes: int [P, 2], its slot and its position."""
        slots = jnp.broadcast_to(jnp.arange(prompt.embeddings.shape[1]), prompt.positions.shape[:2])
        angles = self.angles(prompt.positions)
        hidden, cache = self.language_model.prefill(prompt.embeddings, slots, prompt.lengths - 1, angles, prompt.added)
        return self.language_model.logits(hidden), cache, jnp.stack([prompt.lengths, prompt.following], axis=1)

    def decode(self, token: jax.Array, place: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One step: tokens int [P] at `place` int [P, 2] -> logits float32 [P, V] of the next, and the cache."""
        slot, position = place[:, None, 0], place[:, None, 1]
        embeddings = self.language_model.embed_tokens(token[:, None])
        hidden, cache = self.language_model(embeddings, slot, cache, self.angles(position))
        return self.language_model.logits(hidden[:, 0]), cache


# ---- the family ------------------------------------------------------------------------------------------


def read(description: Mapping, preprocessing: Mapping, video: VideoOptions):
    """The network's config and processor; see models/family.py."""
    if video.time_instruction:
        raise ValueError("time_instruction is LLaVA-Video's; Qwen2.5-VL is told times by the positions of its tokens")
    Budget.of(video.merge)
    config = Qwen25VLConfig.from_hf(description, video)
    return config, QwenProcessor.from_hf(preprocessing, config.vision.unit, video.frame_size)


FAMILY = Family(
    model_types=("qwen2_5_vl",),
    model=Qwen25VL,
    read=read,
    names=dict(
        rename=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.", "model."),
            (r"^visual\.patch_embed\.", "visual.patch_embed.proj."),
            (r"^visual\.merger\.mlp\.linear_1\.", "visual.merger.mlp.0."),
            (r"^visual\.merger\.mlp\.linear_2\.", "visual.merger.mlp.2."),
        ),
        ignored=(r"\.rotary_emb\.inv_freq$",),
        aliases=((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),  # transformers since 4.52
    ),
    sharding=(
        # Qwen3-VL's tower has some of it
        (r"visual\.patch_embed\.kernel", (None, None, None, None, "width")),
        (r"visual\.blocks\.(attn\.qkv|mlp\.(gate|up)_proj)\.kernel", (None, "width", None)),
        (r"visual\.blocks\.(attn\.proj|mlp\.down_proj)\.kernel", (None, None, "width")),
        (r"visual\.merger\.mlp\.linear_1\.kernel", ("width", None)),
        (r"visual\.merger\.mlp\.linear_2\.kernel", (None, "width")),
        (r"visual\..*\.(bias|scale)", ()),
    ),
    tower=("visual.patch_embed.", "visual.blocks."),
    templates={
        "qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n",
    },
)
