"""SigLIP's image tower as LLaVA-Video uses it: all patch tokens, the published tower's last layer never run."""

import dataclasses

import jax
from flax import nnx

from tspo_jax.models.layers import Embed, Encoder, EncoderLayer, LayerNorm, patch_conv


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the tower that runs. The defaults are so400m-patch14-384 without its last layer."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 26
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    @property
    def side(self) -> int:
        """Patches per side of the square image."""
        return self.image_size // self.patch_size


class SiglipEmbeddings(nnx.Module):
    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.patch_embedding = patch_conv(cfg.patch_size, cfg.hidden_size, use_bias=True, rngs=rngs)
        self.position_embedding = Embed(cfg.side**2, cfg.hidden_size, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels.astype(self.patch_embedding.kernel.dtype))
        tokens = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        return tokens + self.position_embedding.embedding[...]


class SiglipVisionTransformer(nnx.Module):
    """Pixels [B, S, S, 3] -> patch tokens [B, side * side, hidden], before post_layernorm."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.embeddings = SiglipEmbeddings(cfg, rngs=rngs)

        def make_layer(rngs):
            return EncoderLayer(
                cfg.hidden_size,
                cfg.intermediate_size,
                cfg.num_attention_heads,
                cfg.hidden_act,
                cfg.layer_norm_eps,
                rngs=rngs,
            )

        self.encoder = Encoder(cfg.num_hidden_layers, make_layer, rngs=rngs)
        # Never applied: it stays in the published checkpoints, so it is loaded and saved with them.
        self.post_layernorm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.encoder(self.embeddings(pixels))


class SiglipVision(nnx.Module):
    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.vision_model = SiglipVisionTransformer(cfg, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.vision_model(pixels)
