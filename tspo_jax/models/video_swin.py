"""Video Swin Transformer (Liu et al. 2022, arXiv 2106.13230): attention inside windows of time, height and width, which
every other block shifts."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tspo_jax.models import attention
from tspo_jax.models.layers import FeedForward, LayerNorm, Linear, layer_at, stack_layers

OTHER_REGION = -100.0  # added to the scores of tokens that only the shift brought into one window (the original's)


@dataclasses.dataclass(frozen=True)
class VideoSwinConfig:
    """The defaults are Swin-B's, as SwinBERT takes it. `window_size` and `patch_size`: time, height, width."""

    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window_size: tuple[int, int, int] = (8, 7, 7)
    patch_size: tuple[int, int, int] = (2, 4, 4)
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"{len(self.depths)} depths, but {len(self.num_heads)} num_heads")

    @classmethod
    def from_json(cls, fields: dict) -> "VideoSwinConfig":
        """Raises ValueError for a field that is unknown or a variant that is not this network."""
        for name in ("patch_norm", "qkv_bias"):
            if not fields.get(name, True):
                raise ValueError(f"{name} is false; only networks with it are supported")
        names = {field.name for field in dataclasses.fields(cls)}
        if strange := sorted(fields.keys() - names - {"patch_norm", "qkv_bias"}):
            raise ValueError(f"unknown fields {', '.join(strange)}")
        own = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items() if name in names}
        return cls(**own)

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Features in time, height and width of a video."""
        sizes = [-(-n // p) for n, p in zip((num_frames, height, width), self.patch_size, strict=True)]
        for _ in self.depths[1:]:
            sizes[1:] = [-(-n // 2) for n in sizes[1:]]
        return tuple(sizes)


def effective_window(sizes, window) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Window and shift for tokens of `sizes`: no wider than they are, and unshifted where one window holds them all."""
    pairs = [(n, 0) if n <= w else (w, w // 2) for n, w in zip(sizes, window, strict=True)]
    return tuple(w for w, _ in pairs), tuple(s for _, s in pairs)


def bias_index(window: tuple[int, int, int]) -> np.ndarray:
    """Row of the bias table for each pair of places of a window: int [N, N], places in the order time, row, column."""
    places = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1).reshape(-1, 3)
    apart = places[:, None] - places[None] + np.array(window) - 1
    _, h, w = (2 * n - 1 for n in window)
    return apart[..., 0] * h * w + apart[..., 1] * w + apart[..., 2]


def shift_mask(sizes, window, shift) -> np.ndarray:
    """What is added to the scores of shifted windows: float32 [windows, N, N], 0 within a region; of padded `sizes`."""
    label = np.zeros(sizes, np.int32)
    cuts = [
        (slice(0, -w), slice(-w, -s), slice(-s, None)) if s else (slice(None),)
        for w, s in zip(window, shift, strict=True)
    ]
    for number, region in enumerate(itertools.product(*cuts)):
        label[region] = number
    label = _windows(label[None, ..., None], window)[0, ..., 0]  # [windows, N]
    return np.where(label[:, :, None] == label[:, None], 0.0, OTHER_REGION).astype(np.float32)


def _windows(x, window):
    """[B, D, H, W, C] (numpy or jax) -> [B, windows, N, C]."""
    B, D, H, W, C = x.shape
    d, h, w = window
    x = x.reshape(B, D // d, d, H // h, h, W // w, w, C).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, -1, d * h * w, C)


def _from_windows(x, sizes, window):
    D, H, W = sizes
    d, h, w = window
    x = x.reshape(x.shape[0], D // d, H // h, W // w, d, h, w, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], D, H, W, -1)


class WindowAttention(nnx.Module):
    def __init__(self, width: int, num_heads: int, window: tuple[int, int, int], *, rngs: nnx.Rngs):
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)
        rows = math.prod(2 * n - 1 for n in window)
        self.relative_position_bias_table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, num_heads)))
        self.num_heads, self.window = num_heads, window

    def __call__(self, x: jax.Array, mask: np.ndarray | None) -> jax.Array:
        """x [B, windows, N, C]; mask float32 [windows, N, N] or None.

        The bias of a window smaller than the nominal one is that of its first N places, as in the original, which is
        right where only time is cut.
        """
        B, W, N, C = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(B, W, N, 3, self.num_heads, -1), 3, 0)
        table = self.relative_position_bias_table[...]
        bias = jnp.moveaxis(table[bias_index(self.window)[:N, :N]], -1, 0)[None]  # [1, heads, N, N]
        if mask is not None:
            bias = bias + mask[:, None]
        out = jax.vmap(lambda q, k, v: attention.biased(q, k, v, bias))(q, k, v)
        return self.proj(out.reshape(x.shape))


class VideoSwinBlock(nnx.Module):
    def __init__(self, cfg: VideoSwinConfig, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.attn = WindowAttention(width, num_heads, cfg.window_size, rngs=rngs)
        self.norm2 = LayerNorm(width, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.mlp = FeedForward(width, cfg.mlp_ratio * width, "gelu", rngs=rngs)

    def __call__(self, x: jax.Array, is_shifted: bool) -> jax.Array:
        """[B, D, H, W, C] -> the same."""
        sizes = x.shape[1:4]
        window, shift = effective_window(sizes, self.attn.window)
        shift = shift if is_shifted else (0, 0, 0)
        # Padding comes behind the norm: padded tokens are zero vectors, whose keys and values are the biases, and they
        # are looked at, as in the original.
        y = jnp.pad(self.norm1(x), ((0, 0), *((0, -n % w) for n, w in zip(sizes, window, strict=True)), (0, 0)))
        padded = y.shape[1:4]
        mask = None
        if any(shift):
            y = jnp.roll(y, [-s for s in shift], (1, 2, 3))
            mask = shift_mask(padded, window, shift)
        y = _from_windows(self.attn(_windows(y, window), mask), padded, window)
        if any(shift):
            y = jnp.roll(y, shift, (1, 2, 3))
        x = x + y[:, : sizes[0], : sizes[1], : sizes[2]]
        return x + self.mlp(self.norm2(x))


class PatchMerging(nnx.Module):
    """Four neighbours become one token of twice the width; time stays."""

    def __init__(self, cfg: VideoSwinConfig, width: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * width, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.reduction = Linear(4 * width, 2 * width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, x.shape[2] % 2), (0, x.shape[3] % 2), (0, 0)))
        corners = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(jnp.concatenate(corners, axis=-1)))


class Stage(nnx.Module):
    def __init__(self, cfg: VideoSwinConfig, index: int, *, rngs: nnx.Rngs):
        width = cfg.embed_dim * 2**index
        self.depth = cfg.depths[index]

        def make_block(rngs):
            return VideoSwinBlock(cfg, width, cfg.num_heads[index], rngs=rngs)

        self.blocks = stack_layers(make_block, self.depth, rngs)
        self.has_downsample = index < len(cfg.depths) - 1
        if self.has_downsample:
            self.downsample = PatchMerging(cfg, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        graphdef, params = nnx.split(self.blocks)
        even = self.depth - self.depth % 2

        def two_blocks(x, pair):
            for i in (0, 1):
                x = nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], pair))(x, is_shifted=i == 1)
            return x, None

        pairs = jax.tree.map(lambda p: p[:even].reshape(even // 2, 2, *p.shape[1:]), params)
        x, _ = jax.lax.scan(two_blocks, x, pairs)
        if self.depth % 2:
            x = layer_at(self.blocks, self.depth - 1)(x, is_shifted=False)
        return self.downsample(x) if self.has_downsample else x


class PatchProjection(nnx.Module):
    """Patches that do not overlap, projected; the end of a video is padded with zeros to whole patches."""

    def __init__(self, cfg: VideoSwinConfig, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), (3, *cfg.patch_size, cfg.embed_dim)))
        self.bias = nnx.Param(jnp.zeros(cfg.embed_dim))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        _, d, h, w, _ = kernel.shape
        x = jnp.pad(x, ((0, 0), *((0, -n % p) for n, p in zip(x.shape[1:4], (d, h, w), strict=True)), (0, 0)))
        B, D, H, W, _ = x.shape
        x = x.astype(kernel.dtype).reshape(B, D // d, d, H // h, h, W // w, w, 3)
        return jnp.einsum("bdphqwrc,cpqro->bdhwo", x, kernel) + self.bias[...]


class PatchEmbed(nnx.Module):
    def __init__(self, cfg: VideoSwinConfig, *, rngs: nnx.Rngs):
        self.proj = PatchProjection(cfg, rngs=rngs)
        self.norm = LayerNorm(cfg.embed_dim, epsilon=cfg.layer_norm_eps, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.proj(x))


class VideoSwin(nnx.Module):
    def __init__(self, cfg: VideoSwinConfig, *, rngs: nnx.Rngs):
        self.patch_embed = PatchEmbed(cfg, rngs=rngs)
        for i in range(len(cfg.depths)):  # attributes, not a list: each stage has its own shapes
            setattr(self, f"stage{i}", Stage(cfg, i, rngs=rngs))
        self.norm = LayerNorm(cfg.width, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.num_stages = len(cfg.depths)

    def states(self, pixels: jax.Array) -> list[jax.Array]:
        """What patch_embed and each stage give, in turn, of normalised pixels float [B, T, H, W, 3]."""
        states = [self.patch_embed(pixels)]
        for i in range(self.num_stages):
            states.append(getattr(self, f"stage{i}")(states[-1]))
        return states

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels float [B, T, H, W, 3] -> features [B, D, h, w, width] (VideoSwinConfig.grid)."""
        return self.norm(self.states(pixels)[-1])
