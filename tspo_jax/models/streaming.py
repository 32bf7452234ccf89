"""VideoStreaming: a video as a stream of clips, encoded one after another into a memory of constant size, and a
constant number of memories picked for each question (arXiv 2405.16009).

    clip k -> push(memory of k - 1, clip) -> memory of k, indicator of k        once per clip
    question, last memory -> its indicator -> scores of all clips -> V of them  once per question
    [V memories ; last memory] -> projector -> visual tokens of the answerer    always (V + 1) * N_s of them

No code and no weights of the original exist. What its paper leaves open is chosen here and marked *: the summary tokens
start as mean-pooled features*, their learned vectors and that of the question are rows of one table*, a clip's time is
one token of sinusoids*, and the question is read through the answerer's own word vectors*.

Letters: B videos, K clips, T frames of a clip, P patches of a frame (a square), C their width, N_s summary tokens of a
clip, D width of the encoder, V picked clips, W width of the answerer.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models.gumbel_top_k import straight_through_top_k
from tspo_jax.models.layers import Linear, Mlp
from tspo_jax.models.qwen2 import Qwen2, Qwen2Config

_TIME_WAVES = 8  # pairs of sine and cosine of a time
_LONGEST_WAVE = 1e5  # seconds, more than a day


@dataclasses.dataclass(frozen=True)
class StreamingConfig:
    """Sizes. Raises ValueError where they do not fit each other.

    Attributes:
      feature_width: C of a patch.
      answerer_width: W; also of the word vectors that the question is given in.
      frames: T of a clip.
      cells: summary tokens of a frame, a square that divides the square of its patches: N_s = frames * cells.
      width, num_layers, num_heads, num_kv_heads, hidden: of the encoder, which is made of Qwen2's blocks.
      selected: V.
      temperature: of the cosines.
      gradient_scale: of the gradient that reaches the scores through the picks (docs/streaming.md says why).
    """

    feature_width: int
    answerer_width: int
    frames: int = 16
    cells: int = 4
    width: int = 1024
    num_layers: int = 8
    num_heads: int = 16
    num_kv_heads: int = 4
    hidden: int = 4096
    selected: int = 4
    temperature: float = 0.1
    gradient_scale: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"streaming: {field.name} is {getattr(self, field.name)}; it must be positive")
        if math.isqrt(self.cells) ** 2 != self.cells:
            raise ValueError(f"streaming: {self.cells} cells of a frame are no square")
        if self.width % (2 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"streaming: width {self.width}, {self.num_heads} heads and {self.num_kv_heads} key and value heads "
                "do not divide"
            )

    @property
    def summary(self) -> int:
        """N_s."""
        return self.frames * self.cells

    @property
    def num_visual_tokens(self) -> int:
        """Of the answerer's prompt, whatever the video's length."""
        return (self.selected + 1) * self.summary

    @property
    def language(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=2 * self.summary + 2,
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            tie_word_embeddings=True,
        )


class Memories(NamedTuple):
    """What is left of K clips.

    Attributes:
      memories: [B, K, N_s, D].
      indicators: [B, K, D].
      last: [B, N_s, D], the memory after the last clip: all that the next clip needs.
    """

    memories: jax.Array
    indicators: jax.Array
    last: jax.Array


class Selection(NamedTuple):
    """What was picked for questions.

    Attributes:
      scores: float32 [B, K], cosine / temperature, -inf where there is no clip.
      picks: int32 [B, V] in the order of time, K where there are fewer clips than V.
      memories: [B, V, N_s, D], zero there.
    """

    scores: jax.Array
    picks: jax.Array
    memories: jax.Array


class StreamingEncoder(nnx.Module):
    def __init__(self, cfg: StreamingConfig, *, rngs: nnx.Rngs):
        self.feature_mlp = Mlp(cfg.feature_width, cfg.width, cfg.width, "gelu", rngs=rngs)
        self.time = Linear(4 * _TIME_WAVES, cfg.width, rngs=rngs)
        self.question = Linear(cfg.answerer_width, cfg.width, rngs=rngs)
        self.language_model = Qwen2(cfg.language, rngs=rngs)  # its word table holds the learned vectors
        self.projector = Mlp(cfg.width, cfg.answerer_width, cfg.answerer_width, "gelu", rngs=rngs)
        self.cfg = cfg

    # ---- encoding ----------------------------------------------------------------------------------------------

    def first_memory(self, batch_size: int) -> jax.Array:
        """The memory before any clip, [B, N_s, D]: learned."""
        memory = self._learned()[2]
        return jnp.broadcast_to(memory, (batch_size, *memory.shape))

    def push(
        self, memory: jax.Array, clip: jax.Array, times: jax.Array, is_clip: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One clip onto the memory of those before.

        Args:
          memory: [B, N_s, D].
          clip: features [B, T, P, C].
          times: float32 [B, 2], start and end in seconds.
          is_clip: bool [B]; where it is False (a shorter video of a batch), the memory stays.
        Returns:
          memory [B, N_s, D] and indicator [B, D].
        """
        slots, indicator, _ = self._learned()
        features = self.feature_mlp(clip)  # [B, T, P, D]
        B, N_s, D = memory.shape
        summary = self._cell_means(features).reshape(B, N_s, D) + slots
        indicator = features.mean(axis=(1, 2)) + indicator
        x = jnp.concatenate([memory, self.time(_waves(times))[:, None], features.reshape(B, -1, D), summary], axis=1)
        N = x.shape[1]
        h, cache = self.language_model(x, jnp.broadcast_to(jnp.arange(N), (B, N)))
        new = h[:, -N_s:]
        # The indicator comes last and sees the summary alone.
        of_summary = jax.tree.map(lambda x: x[:, :, -N_s:], cache)
        h = self.language_model.behind(indicator, jnp.full(B, N), of_summary)
        return jnp.where(is_clip[:, None, None], new, memory), h

    def encode(
        self,
        clips: jax.Array,
        times: jax.Array,
        is_clip: jax.Array,
        memory: jax.Array | None = None,
        *,
        propagate: bool = True,
        cut_every: int = 0,
    ) -> Memories:
        """`push` of K clips, one after another; gradients keep a clip's activations only while they need them.

        Args:
          clips: [B, K, T, P, C]. times: [B, K, 2]. is_clip: bool [B, K], a prefix.
          memory: after earlier clips; None at the start.
          propagate: False starts every clip from the first memory (an ablation).
          cut_every: gradients do not reach back over every so many clips; 0 = they reach back to the first.
        """
        first = self.first_memory(len(clips))
        graphdef, params = nnx.split(self)

        def step(memory, inputs):
            k, clip, times, is_clip = inputs
            if cut_every:
                memory = jnp.where(k % cut_every == 0, jax.lax.stop_gradient(memory), memory)
            model = nnx.merge(graphdef, params)
            new, indicator = model.push(memory if propagate else first, clip, times, is_clip)
            return jnp.where(is_clip[:, None, None], new, memory), (new, indicator)

        inputs = (jnp.arange(clips.shape[1]), *(x.swapaxes(0, 1) for x in (clips, times, is_clip)))
        last, (memories, indicators) = jax.lax.scan(jax.checkpoint(step), first if memory is None else memory, inputs)
        return Memories(memories.swapaxes(0, 1), indicators.swapaxes(0, 1), last)

    def _learned(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Vectors of the summary slots [N_s, D], the indicator [D], and the first memory [N_s, D]."""
        table, N_s = self.language_model.embed_tokens.embedding[...], self.cfg.summary
        return table[:N_s], table[N_s], table[N_s + 2 :]

    def _cell_means(self, features: jax.Array) -> jax.Array:
        """Patches [B, T, P, D], rows of a square -> means of the cells of a coarser square [B, T, cells, D]."""
        B, T, P, D = features.shape
        side, cells = math.isqrt(P), math.isqrt(self.cfg.cells)
        if side * side != P or side % cells or self.cfg.frames != T:
            raise ValueError(
                f"clips are of {T} frames of {P} patches: they must be {self.cfg.frames} frames of a square of patches "
                f"that {self.cfg.cells} cells divide"
            )
        of_cell = features.reshape(B, T, cells, side // cells, cells, side // cells, D)
        return of_cell.mean(axis=(3, 5)).reshape(B, T, cells * cells, D)

    # ---- answering ---------------------------------------------------------------------------------------------

    def select(
        self,
        words: jax.Array,
        lengths: jax.Array,
        stream: Memories,
        is_clip: jax.Array,
        noise: jax.Array | None = None,
        picks: jax.Array | None = None,
    ) -> Selection:
        """V clips for each question; their number and their work grow with K by one cosine a clip.

        Args:
          words: the question in the answerer's word vectors [B, N, W], right padded.
          lengths: int [B].
          is_clip: bool [B, K].
          noise: Gumbel noise [B, K] (training); None = the largest scores.
          picks: int [B, V] that are used instead of the scores' (ablations).
        """
        scores = self.scores(words, lengths, stream.last, stream.indicators, is_clip)
        weights, chosen = straight_through_top_k(scores, noise, self.cfg.selected, self.cfg.gradient_scale)
        if picks is not None:
            weights, chosen = jax.nn.one_hot(picks, is_clip.shape[1]), picks
        memories = jnp.einsum("bvk,bknd->bvnd", weights.astype(stream.memories.dtype), stream.memories)
        return Selection(scores, chosen, memories)

    def scores(
        self, words: jax.Array, lengths: jax.Array, last: jax.Array, indicators: jax.Array, is_clip: jax.Array
    ) -> jax.Array:
        """float32 [B, K]: cosines of the question's indicator with the clips' over the temperature, -inf for none."""
        u = self.question_indicator(words, lengths, last)
        unit = (x.astype(jnp.float32) / (_norm(x) + 1e-6) for x in (u[:, None], indicators))
        cosines = jnp.sum(next(unit) * next(unit), axis=-1)
        return jnp.where(is_clip, cosines / self.cfg.temperature, -jnp.inf)

    def question_indicator(self, words: jax.Array, lengths: jax.Array, last: jax.Array) -> jax.Array:
        """[B, D]: the encoder's output behind the last memory [B, N_s, D] and the question's words [B, N, W]."""
        B, N, _ = words.shape
        query = self.language_model.embed_tokens.embedding[...][self.cfg.summary + 1]
        x = jnp.concatenate([last, self.question(words).astype(last.dtype), jnp.zeros_like(last[:, :1])], axis=1)
        place = self.cfg.summary + lengths  # behind the last word; the padding behind that is seen by no one
        x = x.at[jnp.arange(B), place].set(query.astype(x.dtype))
        h, _ = self.language_model.prefill(x, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), place)
        return h

    def visual_tokens(self, memories: jax.Array, last: jax.Array) -> jax.Array:
        """What the answerer sees: memories [B, V, N_s, D] and the last one [B, N_s, D] -> [B, (V + 1) * N_s, W]."""
        B, _, N_s, D = memories.shape
        return self.projector(jnp.concatenate([memories.reshape(B, -1, D), last], axis=1))


def _norm(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def _waves(times: jax.Array) -> jax.Array:
    """Seconds [B, 2] -> sines and cosines of waves from 4 to _LONGEST_WAVE seconds, float32 [B, 4 * _TIME_WAVES]."""
    lengths = 4.0 * (_LONGEST_WAVE / 4.0) ** (jnp.arange(_TIME_WAVES) / (_TIME_WAVES - 1))
    angles = 2 * jnp.pi * times.astype(jnp.float32)[..., None] / lengths
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(len(times), -1)
