"""SigLIP's image and text towers (Zhai et al. 2023; SigLIP 2, Tschannen et al. 2025), as in Hugging Face's SiglipModel.

The published SigLIP 2 models of one resolution are of this class (model_type `siglip`); those of any resolution
(NaFlex, model_type `siglip2`) are not.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models.clip import TextEmbeddings
from tspo_jax.models.layers import Encoder, EncoderLayer, FeedForward, LayerNorm, Linear
from tspo_jax.models.siglip import SiglipEmbeddings


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One tower; the defaults that Hugging Face's configuration leaves unsaid."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    def encoder(self, rngs: nnx.Rngs) -> Encoder:
        sizes = self.hidden_size, self.intermediate_size, self.num_attention_heads
        return Encoder(
            self.num_hidden_layers,
            lambda rngs: EncoderLayer(*sizes, self.hidden_act, self.layer_norm_eps, rngs=rngs),
            rngs=rngs,
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
    image_size: int = 224
    patch_size: int = 16

    @property
    def side(self) -> int:
        """Patches per side of the square image."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TextConfig(TowerConfig):
    vocab_size: int = 32000
    max_position_embeddings: int = 64


@dataclasses.dataclass(frozen=True)
class Siglip2Config:
    text: TextConfig
    vision: VisionConfig

    @classmethod
    def from_hf(cls, config: dict) -> "Siglip2Config":
        """From config.json. Raises ValueError where its towers do not meet in one space."""
        text, vision = (dict(config.get(name) or {}) for name in ("text_config", "vision_config"))
        result = cls(_fill(TextConfig, text), _fill(VisionConfig, vision))
        width = text.get("projection_size") or result.text.hidden_size
        if width != result.projection_dim:
            raise ValueError(
                f"config.json: texts are projected to {width} channels, but vision_config.hidden_size is "
                f"{result.projection_dim}"
            )
        return result

    @property
    def projection_dim(self) -> int:
        """Channels of the features."""
        return self.vision.hidden_size


def _fill(cls, values: dict):
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


class PoolingHead(nnx.Module):
    """A learned query attends to all patches: [B, N, width] -> [B, width]."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        width = cfg.hidden_size
        self.probe = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.in_proj = Linear(width, 3 * width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)
        self.layernorm = LayerNorm(width, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.mlp = FeedForward(width, cfg.intermediate_size, cfg.hidden_act, rngs=rngs)
        self.num_heads = cfg.num_attention_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        B, _, width = x.shape
        query = jnp.broadcast_to(self.probe[...].astype(x.dtype), (B, 1, width))
        q = jnp.split(self.in_proj(query), 3, axis=-1)[0]
        _, k, v = jnp.split(self.in_proj(x), 3, axis=-1)
        q, k, v = (y.reshape(B, y.shape[1], self.num_heads, -1) for y in (q, k, v))
        h = self.out_proj(jax.nn.dot_product_attention(q, k, v).reshape(B, 1, width))
        return (h + self.mlp(self.layernorm(h)))[:, 0]


class VisionTransformer(nnx.Module):
    """Pixels [B, S, S, 3] -> [B, width]."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.embeddings = SiglipEmbeddings(cfg, rngs=rngs)
        self.encoder = cfg.encoder(rngs)
        self.post_layernorm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.head = PoolingHead(cfg, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.head(self.post_layernorm(self.encoder(self.embeddings(pixels))))


class TextTransformer(nnx.Module):
    """Token ids [B, N] -> [B, width]: the last token's, which has seen all others, padding too."""

    def __init__(self, cfg: TextConfig, width: int, *, rngs: nnx.Rngs):
        self.embeddings = TextEmbeddings(cfg, rngs=rngs)
        self.encoder = cfg.encoder(rngs)
        self.final_layer_norm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.head = Linear(cfg.hidden_size, width, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.head(self.final_layer_norm(self.encoder(self.embeddings(ids)))[:, -1])


class Siglip2(nnx.Module):
    """Both towers; features are not normalised (the agent and cosine similarity want them raw)."""

    def __init__(self, cfg: Siglip2Config, *, rngs: nnx.Rngs):
        self.text_model = TextTransformer(cfg.text, cfg.projection_dim, rngs=rngs)
        self.vision_model = VisionTransformer(cfg.vision, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(1))
        self.logit_bias = nnx.Param(jnp.zeros(1))

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """Preprocessed pixels float [B, S, S, 3] -> image features [B, D]."""
        return self.vision_model(pixels)

    def text_features(self, ids: jax.Array) -> jax.Array:
        """Token ids int [B, max_position_embeddings], padded on the right -> text features [B, D]."""
        return self.text_model(ids)
