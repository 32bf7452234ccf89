"""Qwen2: the language model of LLaVA-Video. Layers are stacked and scanned."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models import attention
from tspo_jax.models.layers import Embed, Linear, RMSNorm, layer_at, scan_layers, stack_layers
from tspo_jax.models.video_prompt import add_behind


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = None  # tokens of a prompt and its answer; None = not told
    # Qwen3's differences: heads of a width of their own, no biases, queries and keys normalised within each head.
    head_dim: int = 0  # 0 = hidden_size / num_attention_heads
    attention_bias: bool = True
    use_qk_norm: bool = False

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @classmethod
    def from_hf(cls, config: dict) -> "Qwen2Config":
        """From the fields of config.json, in the 4.x form (`rope_theta`) or the 5.x form (`rope_parameters`)."""
        if config.get("use_sliding_window"):
            raise ValueError("config.json: use_sliding_window is true; only full attention is supported")
        for name in ("rope_scaling", "rope_parameters"):
            rope = config.get(name) or {}
            if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
                raise ValueError(f"config.json: {name} is of type {rope_type!r}; only unscaled positions are supported")
        if (hidden_act := config.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"config.json: hidden_act {hidden_act!r} is not supported, only silu")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in config]:
            raise ValueError(f"config.json: lacks {', '.join(missing)}")
        names = {f.name for f in dataclasses.fields(cls)} - {"head_dim", "attention_bias", "use_qk_norm"}
        values = {k: v for k, v in config.items() if k in names}
        values["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
        return cls(**values)


class KVCache(NamedTuple):
    """Keys and values of each layer, [B, num_key_value_heads, S, head_dim]; S slots of which a prefix is filled.

    Decoding reads them all at every token: they lie in the order in which it does, a layer an array of its own, so that
    none is copied or turned round on the way.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array) -> "KVCache":
        """From those of prompts as a scan over the layers returns them, [L, B, S, num_key_value_heads, head_dim]."""
        return cls(*(tuple(layer.swapaxes(1, 2) for layer in x) for x in (k, v)))

    def extend(self, slots: int) -> "KVCache":
        """Room for `slots` more tokens."""
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots), (0, 0))), self)


def inverse_frequencies(head_dim: int, theta: float) -> jax.Array:
    """float32 [head_dim // 2], radians per position."""
    return theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Positions int [B, N] -> rotary angles float32 [B, N, head_dim // 2]."""
    return positions[..., None].astype(jnp.float32) * inverse_frequencies(head_dim, theta)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary embedding, a head's two halves as the pairs: x [B, N, H, head_dim], angles [B, N, head_dim // 2]."""
    cos, sin = (f(angles)[:, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


class Attention(nnx.Module):
    """Grouped-query attention. Qwen2: query, key and value projections have a bias, the output projection has none;
    Qwen3: none has, and the queries and keys of each head are normalised."""

    def __init__(self, cfg: Qwen2Config, *, rngs: nnx.Rngs):
        q_width = cfg.num_attention_heads * cfg.head_dim
        kv_width = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, q_width, use_bias=cfg.attention_bias, rngs=rngs)
        self.k_proj = Linear(cfg.hidden_size, kv_width, use_bias=cfg.attention_bias, rngs=rngs)
        self.v_proj = Linear(cfg.hidden_size, kv_width, use_bias=cfg.attention_bias, rngs=rngs)
        self.o_proj = Linear(q_width, cfg.hidden_size, use_bias=False, rngs=rngs)
        if cfg.use_qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(cfg.head_dim, cfg.rms_norm_eps) for _ in range(2))
        self.head_dim, self.num_kv_heads, self.use_qk_norm = cfg.head_dim, cfg.num_key_value_heads, cfg.use_qk_norm

    def __call__(self, x, angles, slots, cache):
        """[B, N, hidden], and the keys and values of x, [B, N, ...], or, given a layer's (k, v) of a cache, that with
        them in its `slots`."""
        if cache is None:
            q, *kv = self._of_prompt(x, angles)
            return self.o_proj(attention.causal(q, *kv).reshape(*x.shape[:2], -1)), tuple(kv)
        kv = self.keys_values(x, angles)
        new = tuple(a.swapaxes(1, 2) for a in kv)

        def put(cache):
            return tuple(_put(old, part, slots) for old, part in zip(cache, new, strict=True))

        def write_then_read(cache):
            cache = put(cache)
            return self.attend(x, angles, cache, slots), cache

        # Which order leaves the cache where it lies, by the bytes that each platform's compiler counts.
        return jax.lax.platform_dependent(
            cache,
            tpu=lambda cache: (self.attend(x, angles, cache, slots, new), put(cache)),
            default=write_then_read,
        )

    def _of_prompt(self, x, angles):
        """Queries, keys and values. For the TPU's kernel one product gives all three: the tokens are read once, and
        those of keys and values alone are too narrow to keep a matrix unit busy. The three matrices lie beside each
        other in it, those of a head of keys with its heads of queries, so that a mesh which splits the heads splits the
        whole."""
        projections = self.q_proj, self.k_proj, self.v_proj
        is_plain = all(isinstance(p, nnx.Linear) for p in projections)  # adapters have products of their own
        if not is_plain or attention.chosen(self.head_dim, x.dtype, x.shape[1]) != "pallas":
            return self.queries(x, angles), *self.keys_values(x, angles)

        def beside(*parts):
            return jnp.concatenate([p.reshape(*p.shape[:-1], self.num_kv_heads, -1) for p in parts], axis=-1)

        y = jnp.einsum("bnw,whd->bnhd", x, beside(*(p.kernel[...] for p in projections)))
        if self.q_proj.bias is not None:
            y = y + beside(*(p.bias[...] for p in projections))
        q, k, v = jnp.split(y, [y.shape[-1] - 2 * self.head_dim, y.shape[-1] - self.head_dim], axis=-1)
        q = q.reshape(*x.shape[:2], -1, self.head_dim)
        if self.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, angles), rotate(k, angles), v

    def queries(self, x, angles):
        q = self._heads(self.q_proj, x)
        return rotate(self.q_norm(q) if self.use_qk_norm else q, angles)

    def keys_values(self, x, angles):
        k = self._heads(self.k_proj, x)
        return rotate(self.k_norm(k) if self.use_qk_norm else k, angles), self._heads(self.v_proj, x)

    def attend(self, x, angles, kv, slots, new=None):
        """[B, N, hidden]: each token of x sees a cache's keys and values up to its own of the `slots` [B, N]; `new` are
        those of x itself where the cache lacks them."""
        out = attention.cached(self.queries(x, angles), *kv, slots, new)
        return self.o_proj(out.reshape(*x.shape[:2], -1))

    def _heads(self, project, x):
        return project(x).reshape(*x.shape[:2], -1, self.head_dim)


def _put(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """A cache [B, H, S, d] with new [B, H, N, d] in its slots int [B, N]."""
    B, H = cache.shape[:2]
    return cache.at[jnp.arange(B)[:, None, None], jnp.arange(H)[None, :, None], slots[:, None]].set(new)


class GatedFeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, *, use_bias: bool, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, use_bias=use_bias, rngs=rngs)
        self.up_proj = Linear(width, hidden, use_bias=use_bias, rngs=rngs)
        self.down_proj = Linear(hidden, width, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    def __init__(self, cfg: Qwen2Config, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedFeedForward(cfg.hidden_size, cfg.intermediate_size, use_bias=False, rngs=rngs)

    def __call__(self, x, angles, slots, cache=None):
        """[B, N, hidden], and the keys and values; see `Attention`."""
        x, kv = self.attended(x, angles, slots, cache)
        return x + self.feed_forward(x), kv

    def attended(self, x, angles, slots, cache=None):
        """The residual stream behind attention, and the keys and values."""
        h, kv = self.self_attn(self.input_layernorm(x), angles, slots, cache)
        return x + h, kv

    def feed_forward(self, x):
        """What is added to the stream behind attention."""
        return self.mlp(self.post_attention_layernorm(x))

    def at(self, place, x, angles):
        """The output for token `place`, int [B], of each row alone, [B, 1, hidden]; and all keys and values."""
        y, place = self.input_layernorm(x), place[:, None]
        kv = self.self_attn.keys_values(y, angles)
        x, y, angles = (jnp.take_along_axis(a, place[..., None], axis=1) for a in (x, y, angles))
        in_order = tuple(a.swapaxes(1, 2) for a in kv)
        x = x + self.self_attn.attend(y, angles, in_order, place)
        return x + self.feed_forward(x), kv


class Qwen2(nnx.Module):
    def __init__(self, cfg: Qwen2Config, *, rngs: nnx.Rngs):
        self.embed_tokens = Embed(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.layers = stack_layers(lambda rngs: DecoderLayer(cfg, rngs=rngs), cfg.num_hidden_layers, rngs)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size, use_bias=False, rngs=rngs)
        self.cfg = cfg

    def __call__(
        self,
        embeddings: jax.Array,
        positions: jax.Array,
        cache: KVCache | None = None,
        angles: jax.Array | None = None,
        added: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states after the final norm, and the keys and values.

        Args:
          embeddings: [B, N, hidden] (from `embed_tokens`, possibly with visual tokens spliced in).
          positions: int [B, N]. Without a cache attention is causal over the N tokens in order. With one, the tokens
            are written to the cache's slots `positions` and see the slots up to their own: right-padded prompts of
            different lengths decode as one batch, each overwriting its own padding.
          cache: from an earlier call, extended by the number of tokens to come.
          angles: rotary angles float32 [B, N, head_dim // 2], where they are not those of `positions`.
          added: without a cache, [B, D, N, hidden] that is added to the outputs of the first D layers.
        """
        if angles is None:
            angles = rope_angles(positions, self.cfg.head_dim, self.cfg.rope_theta)
        if cache is None:
            behind = partial(add_behind, added=added)
            h, kv = scan_layers(self.layers, embeddings, angles, positions, behind=behind)
            return self.norm(h), KVCache.of(*kv)
        # A scan would copy each layer's weights out of the stack before it multiplies with them, and decoding is as
        # fast as it reads them.
        h, filled = embeddings, []
        for i, layer_cache in enumerate(zip(*cache, strict=True)):
            h, kv = layer_at(self.layers, i)(h, angles, positions, layer_cache)
            filled.append(kv)
        return self.norm(h), KVCache(*zip(*filled, strict=True))

    def prefill(
        self,
        embeddings: jax.Array,
        positions: jax.Array,
        last: jax.Array,
        angles: jax.Array | None = None,
        added: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """As a call without a cache, but with the hidden state of one token of each prompt: `last`, int [B].

        Of the last layer nothing but the keys and values of the other tokens is ever needed, so nothing else is
        computed. `added` [B, D, N, hidden] is added to the outputs of the first D layers (to that of the last layer of
        all nothing is). Returns [B, hidden] and the cache.
        """
        if angles is None:
            angles = rope_angles(positions, self.cfg.head_dim, self.cfg.rope_theta)

        def step(stream, i):
            layer = layer_at(self.layers, i)
            x, kv = layer.attended(jnp.add(*stream), angles, positions)
            return (x, add_behind(i, layer.feed_forward(x), added)), kv

        # What a layer adds last is added at the start of the next, whose norm reads the sum: a pass over it less.
        final = self.cfg.num_hidden_layers - 1
        stream, kv = jax.lax.scan(step, (embeddings, jnp.zeros_like(embeddings)), jnp.arange(final))
        h, last_kv = layer_at(self.layers, final).at(last, jnp.add(*stream), angles)
        kv = jax.tree.map(lambda others, x: jnp.concatenate([others, x[None]]), kv, last_kv)
        return self.norm(h[:, 0]), KVCache.of(*kv)

    def behind(self, embedding: jax.Array, position: jax.Array, seen: KVCache) -> jax.Array:
        """The hidden state after the final norm [B, hidden] of one more token, which sees `seen` and itself.

        Args:
          embedding: [B, hidden].
          position: rotary position int [B].
          seen: keys and values of the tokens that it sees, which may be a part of a cache.
        """
        angles = rope_angles(position[:, None], self.cfg.head_dim, self.cfg.rope_theta)
        slots = jnp.full((len(embedding), 1), seen.k[0].shape[2])
        return self(embedding[:, None], slots, seen.extend(1), angles)[0][:, 0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., hidden] -> float32 [..., V]."""
        head = self.embed_tokens.attend if self.cfg.tie_word_embeddings else self.lm_head
        return head(hidden).astype(jnp.float32)
