"""BLIP's text model (Li et al. 2022: MED-BERT): one BERT that reads a text alone or with an image or a video, and one
that writes. The same as BlipTextModel and BlipTextLMHeadModel of Hugging Face."""

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models.bert import BertConfig, BertEmbeddings, BertEncoder, BertHead, visible_bias


class MedBert(nnx.Module):
    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.embeddings = BertEmbeddings(cfg, rngs=rngs)
        self.encoder = BertEncoder(cfg, rngs=rngs)

    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array,
        read: jax.Array | None = None,
        read_mask: jax.Array | None = None,
        causal: bool = False,
    ) -> jax.Array:
        """Hidden states [B, N, hidden]; what stands behind the mask is noise.

        Args:
          ids, mask: int [B, N], right padded, and 1 where a token counts.
          read: [B, S, cross_width], what the text is about (multimodal mode); None = text mode.
          read_mask: [B, S]; None = all of it.
          causal: a token sees those before it only.
        """
        visible = mask[:, None, None, :]
        if causal:
            visible = visible * jnp.tril(jnp.ones((ids.shape[1], ids.shape[1]), mask.dtype))
        read_bias = None if read_mask is None else visible_bias(read_mask[:, None, None, :])
        return self.encoder(self.embeddings(ids), visible_bias(visible), read, read_bias)


class MedBertWriter(nnx.Module):
    """The text model with a head: logits of the next token, causal, about what it reads."""

    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.bert = MedBert(cfg, rngs=rngs)
        self.cls = BertHead(cfg, rngs=rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array, read: jax.Array, read_mask: jax.Array | None) -> jax.Array:
        """float32 [B, N, V]; arguments as MedBert's."""
        return self.cls.predictions(self.bert(ids, mask, read, read_mask, causal=True))
