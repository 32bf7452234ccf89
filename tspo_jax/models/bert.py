"""BERT's post-norm blocks (Devlin et al. 2019), as BLIP's text model (MED-BERT, with cross-attention) and SwinBERT use
them. Names are Hugging Face's, so that weights map mechanically."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models import attention
from tspo_jax.models.layers import Embed, LayerNorm, Linear, activation, scan_layers, stack_layers

MASKED = -10000.0  # added to the scores of what a token does not see, as in the original (not -inf)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes; the defaults are bert-base-uncased's.

    Attributes:
      cross_width: of what the cross-attention reads; 0 = there is none.
      type_vocab_size: rows of the table of token types; 0 = there is none.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    cross_width: int = 0
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_hf(cls, config: dict, **other) -> "BertConfig":
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**({name: value for name, value in config.items() if name in names} | other))


class BertEmbeddings(nnx.Module):
    """Word + position (+ type 0) embeddings, normalised: ids int [B, N] -> [B, N, hidden]."""

    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.word_embeddings = Embed(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.position_embeddings = Embed(cfg.max_position_embeddings, cfg.hidden_size, rngs=rngs)
        if cfg.type_vocab_size:
            self.token_type_embeddings = Embed(cfg.type_vocab_size, cfg.hidden_size, rngs=rngs)
        self.LayerNorm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.has_types = cfg.type_vocab_size > 0
        self.max_positions = cfg.max_position_embeddings

    def __call__(self, ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """`positions` int [N] or [B, N]; by default 0 .. N - 1. Raises ValueError for more tokens than positions."""
        if ids.shape[1] > self.max_positions:
            raise ValueError(f"{ids.shape[1]} tokens, more than the model's {self.max_positions} positions")
        places = jnp.arange(ids.shape[1]) if positions is None else positions
        h = self.word_embeddings(ids) + self.position_embeddings(places)
        if self.has_types:
            h = h + self.token_type_embeddings.embedding[0]
        return self.LayerNorm(h)


class BertSelfAttention(nnx.Module):
    def __init__(self, cfg: BertConfig, key_width: int, *, rngs: nnx.Rngs):
        self.query = Linear(cfg.hidden_size, cfg.hidden_size, rngs=rngs)
        self.key = Linear(key_width, cfg.hidden_size, rngs=rngs)
        self.value = Linear(key_width, cfg.hidden_size, rngs=rngs)
        self.num_heads = cfg.num_attention_heads

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, S, width] -> keys and values [B, S, heads, head_dim]."""
        return self._heads(self.key(x)), self._heads(self.value(x))

    def attend(self, x, keys, values, bias, gate=None) -> jax.Array:
        """x [B, N, hidden] reads keys and values [B, S, ...]; bias and gate as of attention.biased."""
        return attention.biased(self._heads(self.query(x)), keys, values, bias, gate).reshape(x.shape)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.num_heads, -1)


class BertOutput(nnx.Module):
    """Projection, residual, norm."""

    def __init__(self, width: int, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.dense = Linear(width, cfg.hidden_size, rngs=rngs)
        self.LayerNorm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)

    def __call__(self, x: jax.Array, residual: jax.Array, dropout: "Dropout") -> jax.Array:
        return self.LayerNorm(dropout(self.dense(x)) + residual)


@dataclasses.dataclass
class Dropout:
    """Dropout of hidden states while training: `key` None or rate 0 keeps everything. Each call draws anew."""

    rate: float = 0.0
    key: jax.Array | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.key is None or not self.rate:
            return x
        self.key, key = jax.random.split(self.key)
        return jnp.where(jax.random.bernoulli(key, 1 - self.rate, x.shape), x / (1 - self.rate), 0).astype(x.dtype)


KEEP = Dropout()


class BertAttention(nnx.Module):
    def __init__(self, cfg: BertConfig, key_width: int, *, rngs: nnx.Rngs):
        self.self = BertSelfAttention(cfg, key_width, rngs=rngs)
        self.output = BertOutput(cfg.hidden_size, cfg, rngs=rngs)

    def __call__(self, x, source, bias, dropout=KEEP):
        """x [B, N, hidden] reads `source` [B, S, width] with `bias` [B or 1, heads or 1, N or 1, S]."""
        return self.output(self.self.attend(x, *self.self.keys_values(source), bias), x, dropout)


class BertIntermediate(nnx.Module):
    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.dense = Linear(cfg.hidden_size, cfg.intermediate_size, rngs=rngs)
        self.activation = activation(cfg.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activation(self.dense(x))


class BertLayer(nnx.Module):
    """Self-attention, cross-attention where something is given to read, feed-forward."""

    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.attention = BertAttention(cfg, cfg.hidden_size, rngs=rngs)
        if cfg.cross_width:
            self.crossattention = BertAttention(cfg, cfg.cross_width, rngs=rngs)
        self.intermediate = BertIntermediate(cfg, rngs=rngs)
        self.output = BertOutput(cfg.intermediate_size, cfg, rngs=rngs)

    def __call__(self, x, bias, read=None, read_bias=None, dropout=(0.0, None), number=None):
        """`dropout` is its rate and a key, into which the layer's `number` is folded."""
        rate, key = dropout
        drop = Dropout(rate, None if key is None else jax.random.fold_in(key, number))
        x = self.attention(x, x, bias, drop)
        if read is not None:
            x = self.crossattention(x, read, read_bias, drop)
        return self.feed_forward(x, drop)

    def feed_forward(self, x: jax.Array, dropout: Dropout = KEEP) -> jax.Array:
        return self.output(self.intermediate(x), x, dropout)


class BertEncoder(nnx.Module):
    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.layers = stack_layers(lambda rngs: BertLayer(cfg, rngs=rngs), cfg.num_hidden_layers, rngs)
        self.num_layers = cfg.num_hidden_layers

    def __call__(self, x, bias, read=None, read_bias=None, dropout=(0.0, None)):
        """x [B, N, hidden] -> [B, N, hidden].

        Args:
          bias: float, added to the scores of the self-attention, broadcast to [B, heads, N, N] (see `visible_bias`).
          read, read_bias: [B, S, cross_width] and its bias, for the cross-attention; None leaves it out.
          dropout: its rate and a key; without a key there is none.
        """
        numbers = jnp.arange(self.num_layers)
        return scan_layers(self.layers, x, bias, read, read_bias, dropout, per_layer=numbers)[0]


class BertTransform(nnx.Module):
    """What stands before the vocabulary: dense, activation, norm."""

    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.dense = Linear(cfg.hidden_size, cfg.hidden_size, rngs=rngs)
        self.LayerNorm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.activation = activation(cfg.hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.LayerNorm(self.activation(self.dense(x)))


class BertPredictions(nnx.Module):
    """Hidden states [..., hidden] -> logits float32 [..., V]."""

    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.transform = BertTransform(cfg, rngs=rngs)
        self.decoder = Linear(cfg.hidden_size, cfg.vocab_size, use_bias=False, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(cfg.vocab_size))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (self.decoder(self.transform(x)) + self.bias[...]).astype(jnp.float32)


class BertHead(nnx.Module):
    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.predictions = BertPredictions(cfg, rngs=rngs)


def visible_bias(visible: jax.Array) -> jax.Array:
    """What is added to the scores: 0 where `visible` is 1, MASKED where it is 0, in between between."""
    return (1.0 - visible.astype(jnp.float32)) * MASKED
