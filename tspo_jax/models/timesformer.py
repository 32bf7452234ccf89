"""TESTA's video tower: a TimeSformer (Bertasius et al. 2021, divided space-time attention) whose blocks merge alike
frames and alike patches (Ren et al. 2023, section 3)."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx, struct

from tspo_jax.models import attention
from tspo_jax.models.layers import FeedForward, LayerNorm, Linear, layer_at, patch_conv, scan_layers, stack_layers
from tspo_jax.models.token_merge import merge_tokens

# How a list of numbers becomes [frames, patches] merged in each block.
MERGING_TYPES = ("frame&patch", "frame", "patch", "frame-patch", "patch-frame")


@dataclasses.dataclass(frozen=True)
class TimesformerConfig:
    """The defaults are ViT-B/16 at 224 pixels, 32 frames, as released.

    Attributes:
      num_frames: rows of `time_embed`; another number of frames takes the nearest rows.
      merging: (frames, patches) that each block removes; () = nothing is merged. More than a block can is cut down.
      frame_flag: the original counts a protected token in a frame merge as well, which lowers the most that it can
        remove, wherever `merging_type` names patches.
      learnable_temporal_scaling: a learned factor per frame; it fixes the number of frames, so nothing can be merged.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: int = 4
    num_frames: int = 32
    layer_norm_eps: float = 1e-6
    merging: tuple[tuple[int, int], ...] = ()
    frame_flag: bool = True
    learnable_temporal_scaling: bool = False

    def __post_init__(self):
        if self.merging and len(self.merging) != self.depth:
            raise ValueError(f"a merging schedule of {len(self.merging)} blocks for a tower of {self.depth}")
        if self.is_merging and self.learnable_temporal_scaling:
            raise ValueError("learnable_temporal_scaling needs all frames in every block: nothing can be merged")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")

    @property
    def is_merging(self) -> bool:
        return any(r > 0 for pair in self.merging for r in pair)

    @property
    def side(self) -> int:
        return self.image_size // self.patch_size

    def tokens_after(self, num_frames: int) -> list[tuple[int, int]]:
        """(frames, patches) after each block."""
        T, L, after = num_frames, self.side**2, []
        for frames, patches in self.merging or ((0, 0),) * self.depth:
            T -= max(0, min(frames, (T - self.frame_flag) // 2))
            L -= max(0, min(patches, L // 2))
            after.append((T, L))
        return after


def merging_schedule(merging_type: str, numbers: list, depth: int) -> dict:
    """The fields `merging` and `frame_flag` of a config's `merging_type` and `testa_r`.

    `frame&patch` has [frames, patches] per block, one after another in one flat list or as pairs; the others one number
    per block. A shorter list is padded with 0. Raises ValueError for a list that is too long or holds anything else.
    """
    if merging_type not in MERGING_TYPES:
        raise ValueError(f"merging_type {merging_type!r} is none of {', '.join(MERGING_TYPES)}")
    flat = [r for entry in numbers for r in (entry if isinstance(entry, list | tuple) else (entry,))]
    per_block = 2 if merging_type == "frame&patch" else 1
    if len(flat) > per_block * depth or any(not isinstance(r, int) or isinstance(r, bool) or r < 0 for r in flat):
        raise ValueError(
            f"testa_r {numbers}: {merging_type} takes {per_block} numbers >= 0 for each of {depth} blocks at most"
        )
    flat += [0] * (per_block * depth - len(flat))
    if merging_type == "frame&patch":
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
    else:
        kinds = merging_type.split("-")
        pairs = [(r, 0) if kinds[i % len(kinds)] == "frame" else (0, r) for i, r in enumerate(flat)]
    return {"merging": tuple(pairs), "frame_flag": "patch" in merging_type}


@struct.dataclass
class VideoState:
    """What goes from block to block: the class token [B, D], the patches [B, L, T, D], and how many original tokens
    each one stands for, float32 [B, L, T, 1]; None = one each."""

    cls: jax.Array
    patches: jax.Array
    sizes: jax.Array | None


class FusedAttention(nnx.Module):
    """Multi-head attention with one projection for queries, keys and values."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, N, width] -> the same, and the keys averaged over the heads [B, N, head_dim]: what tokens are compared
        by when they are merged."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        return self.proj(attention.bidirectional(q, k, v).reshape(x.shape)), k.mean(2)


class TimesformerBlock(nnx.Module):
    def __init__(self, cfg: TimesformerConfig, *, rngs: nnx.Rngs):
        def norm():
            return LayerNorm(cfg.width, epsilon=cfg.layer_norm_eps, rngs=rngs)

        self.temporal_norm1 = norm()
        self.temporal_attn = FusedAttention(cfg.width, cfg.num_heads, rngs=rngs)
        self.temporal_fc = Linear(cfg.width, cfg.width, rngs=rngs)
        self.norm1 = norm()
        self.attn = FusedAttention(cfg.width, cfg.num_heads, rngs=rngs)
        self.norm2 = norm()
        self.mlp = FeedForward(cfg.width, cfg.mlp_ratio * cfg.width, "gelu", rngs=rngs)
        if cfg.learnable_temporal_scaling:
            self.temporal_scaling = nnx.Param(jnp.zeros((1, cfg.num_frames, 1)))
        self.is_scaled = cfg.learnable_temporal_scaling
        self.frame_flag = cfg.frame_flag

    def __call__(self, state: VideoState, merging: tuple[int, int] = (0, 0)) -> VideoState:
        """`merging`: the frames and patches to remove."""
        cls, patches, sizes = state.cls, state.patches, state.sizes
        num_frames, num_patches = merging
        B, L, T, D = patches.shape

        # Each patch looks along time.
        out, keys = self.temporal_attn(self.temporal_norm1(patches.reshape(B * L, T, D)))
        if self.is_scaled:
            if self.temporal_scaling.shape[1] != T:
                raise ValueError(f"{T} frames, but learnable_temporal_scaling is of {self.temporal_scaling.shape[1]}")
            out = out * (jnp.tanh(self.temporal_scaling[...]) + 1)
        patches = patches + self.temporal_fc(out).reshape(patches.shape)
        metric = keys.reshape(B, L, T, -1)
        patches, sizes = merge_tokens(patches, metric, sizes, num_frames, shared=True, class_token=self.frame_flag)

        # Each frame looks at itself, with a copy of the class token.
        T = patches.shape[2]
        frames = _with_class(cls, jnp.swapaxes(patches, 1, 2))  # [B, T, 1 + L, D]
        out, keys = self.attn(self.norm1(frames.reshape(B * T, 1 + L, D)))
        out = out.reshape(frames.shape)
        cls = cls + out[:, :, 0].mean(1)
        frames = _with_class(cls, frames[:, :, 1:] + out[:, :, 1:])
        if sizes is not None:
            sizes = _with_class(jnp.ones((B, 1)), jnp.swapaxes(sizes, 1, 2))
        metric = keys.reshape(B, T, 1 + L, -1)
        frames, sizes = merge_tokens(frames, metric, sizes, num_patches, shared=False, class_token=True)
        patches = jnp.swapaxes(frames[:, :, 1:], 1, 2)
        sizes = None if sizes is None else jnp.swapaxes(sizes[:, :, 1:], 1, 2)

        cls = cls + self.mlp(self.norm2(cls))
        return VideoState(cls, patches + self.mlp(self.norm2(patches)), sizes)


def _with_class(cls: jax.Array, frames: jax.Array) -> jax.Array:
    """[B, D] in front of the patches [B, T, L, D] of every frame: [B, T, 1 + L, D]."""
    B, T, _, D = frames.shape
    return jnp.concatenate([jnp.broadcast_to(cls[:, None, None], (B, T, 1, D)), frames], axis=2)


class PatchEmbed(nnx.Module):
    def __init__(self, cfg: TimesformerConfig, *, rngs: nnx.Rngs):
        self.proj = patch_conv(cfg.patch_size, cfg.width, use_bias=True, rngs=rngs)


class Timesformer(nnx.Module):
    def __init__(self, cfg: TimesformerConfig, *, rngs: nnx.Rngs):
        def normal(*shape):
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

        self.patch_embed = PatchEmbed(cfg, rngs=rngs)
        self.cls_token = normal(1, 1, cfg.width)
        self.pos_embed = normal(1, cfg.side**2 + 1, cfg.width)
        self.time_embed = nnx.Param(jnp.zeros((1, cfg.num_frames, cfg.width)))
        self.blocks = stack_layers(lambda rngs: TimesformerBlock(cfg, rngs=rngs), cfg.depth, rngs)
        self.norm = LayerNorm(cfg.width, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.cfg = cfg

    def embed(self, pixels: jax.Array) -> VideoState:
        """Preprocessed pixels float [B, T, H, W, 3] -> the state that the first block takes."""
        B, T, *size = pixels.shape
        patches = self.patch_embed.proj(pixels.reshape(B * T, *size).astype(self.patch_embed.proj.kernel.dtype))
        _, H, W, D = patches.shape
        rows, columns = (jnp.arange(n) * self.cfg.side // n for n in (H, W))
        position = self.pos_embed[0, 1:].reshape(self.cfg.side, self.cfg.side, D)[rows][:, columns]
        time = self.time_embed[0][jnp.arange(T) * self.cfg.num_frames // T]
        patches = (patches + position).reshape(B, T, H * W, D) + time[:, None]
        cls = jnp.broadcast_to(self.cls_token[0, 0] + self.pos_embed[0, 0], (B, D))
        return VideoState(cls, jnp.swapaxes(patches, 1, 2), None)

    def states(self, pixels: jax.Array) -> Iterator[VideoState]:
        """The state after each block, in turn."""
        state = self.embed(pixels)
        for i, merging in enumerate(self.cfg.merging or ((0, 0),) * self.cfg.depth):
            state = layer_at(self.blocks, i)(state, merging)
            yield state

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """All tokens after the final norm [B, 1 + L * T, D]: the class token, then the patches, time fastest."""
        if self.cfg.is_merging:  # every block has another shape
            *_, state = self.states(pixels)
        else:
            state, _ = scan_layers(self.blocks, self.embed(pixels))
        return self.norm(flat(state))


def flat(state: VideoState) -> jax.Array:
    """A state as tokens [B, 1 + L * T, D], the class token first, time fastest."""
    B, _, _, D = state.patches.shape
    return jnp.concatenate([state.cls[:, None], state.patches.reshape(B, -1, D)], axis=1)
