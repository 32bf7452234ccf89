"""TESTA (Ren et al. 2023) = BLIP with a video tower: finds videos for a text, tells whether the two match, and ranks
answers to a question about a video."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models.bert import BertConfig
from tspo_jax.models.layers import Linear
from tspo_jax.models.med_bert import MedBert, MedBertWriter
from tspo_jax.models.timesformer import Timesformer, TimesformerConfig

ANSWER_SMOOTHING = 0.1  # of the labels of an answer's loss, in the original at inference as well


@dataclasses.dataclass(frozen=True)
class TestaConfig:
    """Sizes and parts.

    Attributes:
      embed_dim: width of the features that are compared; 0 = without the contrastive and matching heads (a model that
        answers questions only).
      answers: with the decoder that writes answers.
    """

    vision: TimesformerConfig
    text: BertConfig
    embed_dim: int = 256
    answers: bool = False

    @property
    def writer(self) -> BertConfig:
        """The decoder's sizes: it reads the question's states, not the video."""
        return dataclasses.replace(self.text, cross_width=self.text.hidden_size)


class Ranking(NamedTuple):
    """Answers to Q questions.

    Attributes:
      candidates: int [Q, k], the k most likely ones by their first token, most likely first.
      nll: float32 [Q, k], summed loss of each, labels smoothed by ANSWER_SMOOTHING.
      best: int [Q], the candidate with the smallest loss.
    """

    candidates: jax.Array
    nll: jax.Array
    best: jax.Array


class Testa(nnx.Module):
    def __init__(self, cfg: TestaConfig, *, rngs: nnx.Rngs):
        self.visual_encoder = Timesformer(cfg.vision, rngs=rngs)
        self.text_encoder = MedBert(cfg.text, rngs=rngs)
        if cfg.embed_dim:
            self.vision_proj = Linear(cfg.vision.width, cfg.embed_dim, rngs=rngs)
            self.text_proj = Linear(cfg.text.hidden_size, cfg.embed_dim, rngs=rngs)
            self.itm_head = Linear(cfg.text.hidden_size, 2, rngs=rngs)
            self.temp = nnx.Param(jnp.array(0.07))
        if cfg.answers:
            self.text_decoder = MedBertWriter(cfg.writer, rngs=rngs)
        self.cfg = cfg

    def video_tokens(self, pixels: jax.Array) -> jax.Array:
        """Preprocessed pixels float [B, T, H, W, 3] -> tokens [B, M, D]."""
        return self.visual_encoder(pixels)

    def video_features(self, tokens: jax.Array) -> jax.Array:
        """Unit vectors float32 [B, E] of tokens [B, M, D]: their mean (class token included), projected."""
        return unit(self.vision_proj(tokens.mean(1)))

    def text_features(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Unit vectors float32 [B, E] of ids int [B, N] that begin with [CLS], right padded; `mask` is 1 where they
        count."""
        return unit(self.text_proj(self.text_encoder(ids, mask)[:, 0]))

    def matching_logits(self, tokens: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Of pairs: float32 [B, 2] (no, yes) of video tokens [B, M, D] and ids that begin with [ENC] [B, N]."""
        return self.itm_head(self.text_encoder(ids, mask, tokens)[:, 0]).astype(jnp.float32)

    def question_states(self, tokens: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, N, hidden] of questions that begin with [ENC], about video tokens [B, M, D]."""
        return self.text_encoder(ids, mask, tokens)

    def rank_answers(self, question: jax.Array, mask: jax.Array, ids: jax.Array, ids_mask: jax.Array, k: int):
        """Ranking of A candidate answers for Q questions.

        Args:
          question, mask: [Q, N, hidden] of `question_states`, and the questions' mask [Q, N].
          ids, ids_mask: int [A, n], every answer behind [DEC], closed by [SEP], right padded.
          k: candidates of which the loss is computed; all where there are fewer.
        """
        ids, ids_mask = jnp.asarray(ids), jnp.asarray(ids_mask)
        Q, k = len(question), min(k, len(ids))
        start = jnp.full((Q, 1), ids[0, 0])
        first = self.text_decoder(start, jnp.ones_like(start), question, mask)[:, 0]
        candidates = jax.lax.top_k(jax.nn.softmax(first)[:, ids[:, 1]], k)[1]

        def losses(question, mask, chosen):
            def repeat(x):
                return jnp.broadcast_to(x, (k, *x.shape))

            logits = self.text_decoder(ids[chosen], ids_mask[chosen], repeat(question), repeat(mask))
            return answer_nll(logits, ids[chosen], ids_mask[chosen])

        nll = jax.lax.map(lambda row: losses(*row), (question, mask, candidates))
        best = jnp.take_along_axis(candidates, nll.argmin(1, keepdims=True), axis=1)[:, 0]
        return Ranking(candidates, nll, best)


def answer_nll(logits: jax.Array, ids: jax.Array, mask: jax.Array, smoothing: float = ANSWER_SMOOTHING) -> jax.Array:
    """Summed loss float32 [B] of answers int [B, n] whose next tokens are predicted by `logits` [B, n, V]: smoothed
    labels, padding left out."""
    log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    target = jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)[..., 0]
    loss = -(1 - smoothing) * target - smoothing * log_probs.mean(-1)
    return jnp.sum(loss * mask[:, 1:], axis=1)


def unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
