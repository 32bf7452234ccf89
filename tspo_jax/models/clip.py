"""CLIP's image and text towers (Radford et al. 2021), as in Hugging Face's CLIPModel."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models.layers import Embed, Encoder, EncoderLayer, LayerNorm, Linear, patch_conv


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One tower; the defaults that Hugging Face's configuration leaves unsaid."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def make_layer(self, causal: bool):
        return lambda rngs: EncoderLayer(
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.hidden_act,
            self.layer_norm_eps,
            causal=causal,
            rngs=rngs,
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
    image_size: int = 224
    patch_size: int = 32


@dataclasses.dataclass(frozen=True)
class TextConfig(TowerConfig):
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    text: TextConfig
    vision: VisionConfig
    projection_dim: int = 512

    @classmethod
    def from_hf(cls, config: dict) -> "ClipConfig":
        """From the fields of a CLIP folder's config.json; unnamed sizes are those of Hugging Face's CLIPConfig."""
        text = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8)
        vision = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        return cls(
            text=_fill(TextConfig, text | (config.get("text_config") or {})),
            vision=_fill(VisionConfig, vision | (config.get("vision_config") or {})),
            projection_dim=config.get("projection_dim", 512),
        )


def _fill(cls, values: dict):
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in values.items() if k in names})


class VisionEmbeddings(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.class_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (cfg.hidden_size,)))
        self.patch_embedding = patch_conv(cfg.patch_size, cfg.hidden_size, use_bias=False, rngs=rngs)
        num_positions = (cfg.image_size // cfg.patch_size) ** 2 + 1
        self.position_embedding = Embed(num_positions, cfg.hidden_size, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels.astype(self.patch_embedding.kernel.dtype))
        B, _, _, width = patches.shape
        cls = jnp.broadcast_to(self.class_embedding[...], (B, 1, width))
        tokens = jnp.concatenate([cls, patches.reshape(B, -1, width)], axis=1)
        return tokens + self.position_embedding.embedding[...]


class VisionTransformer(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.embeddings = VisionEmbeddings(cfg, rngs=rngs)
        # Hugging Face's spelling.
        self.pre_layrnorm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.encoder = Encoder(cfg.num_hidden_layers, cfg.make_layer(causal=False), rngs=rngs)
        self.post_layernorm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        h = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(h[:, 0])


class TextEmbeddings(nnx.Module):
    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = Embed(cfg.vocab_size, cfg.hidden_size, rngs=rngs)
        self.position_embedding = Embed(cfg.max_position_embeddings, cfg.hidden_size, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.token_embedding(ids) + self.position_embedding.embedding[: ids.shape[1]]


class TextTransformer(nnx.Module):
    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.embeddings = TextEmbeddings(cfg, rngs=rngs)
        self.encoder = Encoder(cfg.num_hidden_layers, cfg.make_layer(causal=True), rngs=rngs)
        self.final_layer_norm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.eos_token_id = cfg.eos_token_id

    def __call__(self, ids: jax.Array) -> jax.Array:
        h = self.final_layer_norm(self.encoder(self.embeddings(ids)))
        # eos_token_id 2 marks the original dumps, whose end token is simply the largest id. In both rules the first
        # match wins, so right padding (with the end token) changes nothing: attention is causal.
        end = ids if self.eos_token_id == 2 else ids == self.eos_token_id
        return jnp.take_along_axis(h, jnp.argmax(end, axis=1)[:, None, None], axis=1)[:, 0]


class Clip(nnx.Module):
    """CLIP with both projections; features are not normalised (the agent and cosine similarity want them raw)."""

    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
        self.text_model = TextTransformer(cfg.text, rngs=rngs)
        self.vision_model = VisionTransformer(cfg.vision, rngs=rngs)
        self.text_projection = Linear(cfg.text.hidden_size, cfg.projection_dim, use_bias=False, rngs=rngs)
        self.visual_projection = Linear(cfg.vision.hidden_size, cfg.projection_dim, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.array(2.6592))

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """Preprocessed pixels float [B, S, S, 3] -> image features [B, D]."""
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, ids: jax.Array) -> jax.Array:
        """Token ids int [B, N], right padded with the end token -> text features [B, D]."""
        return self.text_projection(self.text_model(ids))


def cosine_similarity(text: jax.Array, images: jax.Array, epsilon: float = 1e-8) -> jax.Array:
    """The `clip score`: text [..., D], images [..., T, D] -> float32 [..., T]. Norms below epsilon count as epsilon."""
    text, images = text.astype(jnp.float32), images.astype(jnp.float32)

    def unit(x):
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), epsilon)

    return jnp.einsum("...td,...d->...t", unit(images), unit(text), precision="highest")
