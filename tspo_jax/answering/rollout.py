"""The frozen Video-MLLM answers B questions, each from G sets of K frames, in one compiled program.

Every unique frame (or pair of frames, where the model encodes pairs) is encoded once, its tokens are gathered into the
B * G prompts, all prompts are prefilled in a few batches, and greedy decoding runs until the last of them has ended.
Nothing goes back to the host in between.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tspo_jax.checkpoints.folders import Answerer, Generation
from tspo_jax.devices import compiling, sharding
from tspo_jax.models import attention
from tspo_jax.models.attention import platform_of
from tspo_jax.models.layers import merge_params, take_apart
from tspo_jax.models.video_prompt import VIDEO_TOKEN


class Answers(NamedTuple):
    """Answers of a batch.

    Attributes:
      tokens: int32 [B, G, max_new_tokens], the end token among them, then padding.
      lengths: int32 [B, G].
      steps: int32 [], tokens decoded before all answers had ended: the longest length.
      first_logits: float32 [B, G, V] of the first token, before any penalty; None unless asked for.
      option_log_probs: float32 [B, G, O], how likely each option was where the answer names one (its first token where
        it names none), among the options; None without options.
    """

    tokens: jax.Array
    lengths: jax.Array
    steps: jax.Array
    first_logits: jax.Array | None
    option_log_probs: jax.Array | None


def unique_frames(picks: np.ndarray, num_slots: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What to fetch for the picks of a batch of groups (on the host).

    Args:
      picks: int [B, G, K], candidate frames.
      num_slots: U, the static number of frames of a question that travel to the device; by default G * K, which
        always suffices.
    Returns:
      int32 [B, U]: the frames, ascending, the last one repeated as padding; int32 [B, G, K]: index into them.
    Raises: ValueError where a question has more than `num_slots` unique frames.
    """
    B, G, K = picks.shape
    U = num_slots or G * K
    frames, index = np.zeros((B, U), np.int32), np.zeros((B, G, K), np.int32)
    for b in range(B):
        unique, inverse = np.unique(picks[b], return_inverse=True)
        if len(unique) > U:
            raise ValueError(f"a group of question {b} picks {len(unique)} unique frames, more than {U} slots")
        frames[b] = np.pad(unique, (0, U - len(unique)), mode="edge")
        index[b] = inverse.reshape(G, K)
    return frames, index


class Rollout:
    """`rollout(params, arrays)` is compiled once for each set of shapes; `num_compilations` counts them.

    Args:
      graphdef: of the answerer, whose params it is called with (checkpoints.Answerer says what the model must offer).
      normalize: pixels uint8 -> float, on the device.
      generation: end tokens, padding and repetition penalty.
      max_new_tokens: length at which an answer is cut.
      encode_chunk: frames of each question that are encoded at a time; bounds memory.
      prefill_chunk: frame sets of each question that are prefilled at a time, a divisor of G; bounds memory. 0 = all.
      mesh: over which the arguments are split, if they are.
      return_first_logits: also return the first token's logits.
      float32_precision: of products of float32 weights: highest, or the platform's shorter ones (high, default).
      attention: what computes it, one of models.attention.IMPLEMENTATIONS. Raises ValueError where the devices cannot.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        normalize: Callable[[jax.Array], jax.Array],
        generation: Generation,
        *,
        max_new_tokens: int,
        encode_chunk: int = 16,
        prefill_chunk: int = 0,
        mesh: Mesh | None = None,
        return_first_logits: bool = False,
        attention: str = "auto",
        float32_precision: str = "highest",
    ):
        for name, value in (("max_new_tokens", max_new_tokens), ("encode_chunk", encode_chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.graphdef = graphdef
        self.normalize = normalize
        self.generation = generation
        self.max_new_tokens = max_new_tokens
        self.encode_chunk = encode_chunk
        self.prefill_chunk = prefill_chunk
        self.mesh = mesh
        self.return_first_logits = return_first_logits
        self.attention = attention
        self.float32_precision = float32_precision
        self.num_compilations = 0
        self.program = jax.jit(self._answer, compiler_options=compiling.options(platform_of(mesh)))

    @classmethod
    def of(cls, answerer: Answerer, **options) -> "Rollout":
        rollout = cls(answerer.graphdef, answerer.processor.normalize, answerer.generation, **options)
        dtype = jax.tree.leaves(answerer.params)[0].dtype
        attention.check(rollout.attention, platform_of(rollout.mesh), dtype)
        return rollout

    def __call__(
        self,
        params: dict,
        frames: jax.Array,
        index: jax.Array,
        prompt_ids: jax.Array,
        prompt_lengths: jax.Array,
        options: jax.Array | None = None,
        steps: jax.Array | None = None,
        num_frames: jax.Array | None = None,
    ) -> Answers:
        """Answers from every frame set.

        Args:
          params: of the answerer.
          frames: uint8 [B, U, S, S, 3], cropped for the answerer (`processor.crop`); see `unique_frames`.
          index: int [B, G, K] into the U frames; frames behind the largest index in use are not encoded.
          prompt_ids: int [B, N], right padded (prompts.pad), or [B, G, N] where a set's text tells its frames' times.
          prompt_lengths: int [B] or [B, G].
          options: int [B, O], the token that names each option in an answer (prompts.option_tokens), -1 for none; then
            the answers say how likely each is.
          steps: int [B, G, pairs], where the frames lie in time (prompts.Prompts); None where nobody knows.
          num_frames: int [B, G], how many of the K a set has, the others of `index` being its last again; None = K.
        """
        return self.program(params, frames, index, prompt_ids, prompt_lengths, options, steps, num_frames)

    def _answer(
        self, params, frames, index, prompt_ids, prompt_lengths, options=None, steps=None, num_frames=None
    ) -> Answers:
        is_float32 = jax.tree.leaves(params)[0].dtype == jnp.float32
        precision = self.float32_precision if is_float32 else None  # None = as without
        with attention.computed_by(self.attention, self.mesh), jax.default_matmul_precision(precision):
            return self._traced(params, frames, index, prompt_ids, prompt_lengths, options, steps, num_frames)

    def _traced(self, params, frames, index, prompt_ids, prompt_lengths, options, steps, num_frames) -> Answers:
        self.num_compilations += 1  # runs while tracing, which is once per set of shapes
        model = merge_params(self.graphdef, params)
        B, G, K = index.shape
        split = partial(sharding.split_questions, self.mesh)
        if prompt_ids.ndim == 2:  # one text for all sets of a question
            prompt_ids, prompt_lengths = (jnp.repeat(x[:, None], G, axis=1) for x in (prompt_ids, prompt_lengths))
        texts = prompt_ids, prompt_lengths, steps, num_frames

        units, index = encode_units(index, frames.shape[1], model.cfg.temporal_patch_size)

        def encode(units):
            """[B, u, n] of n frames each -> [B, u, ...], the tokens of each unit."""
            shown = jax.vmap(lambda frames, unit: frames[unit])(frames, units)
            shown = sharding.split_frames(self.mesh, shown.reshape(-1, *shown.shape[2:]))
            tokens = model.encode_frames(self.normalize(shown.reshape(-1, *shown.shape[2:])))
            return split(tokens.reshape(*units.shape[:2], *tokens.shape[1:]))

        def prefill(sets):
            """Frame sets [B, g, K] and their texts [B, g, ...] -> where their answers begin [B, g, ...], first logits
            [B, g, V], the cache."""
            g = sets[0].shape[1]
            shown = _picked(unit_tokens, sets[0], shape)  # [B, g, K, ...]
            prompt = split(model.prompt(*jax.tree.map(_flat, (shown, *sets[1:]))))
            logits, cache, place = model.prefill(prompt)
            cache = jax.tree.map(lambda x: x.reshape(B, g, *x.shape[1:]), cache.extend(self.max_new_tokens))
            return place.reshape(B, g, *place.shape[1:]), split(logits.reshape(B, g, -1)), split(cache)

        with jax.named_scope("encode"):
            chunk = max(1, self.encode_chunk // units.shape[-1])
            unit_tokens, shape = _encode_used(encode, units, index.max() + 1, chunk)
        with jax.named_scope("prefill"):
            places, first_logits, cache = _in_chunks(prefill, (index, *texts), self.prefill_chunk or G)
        with jax.named_scope("decode"):
            if platform_of(self.mesh) == "cpu":
                # Its compiler copies a part of an array before it multiplies with it: once here and not at every token.
                # Those of accelerators read it in place, and memory for a second copy is what they are short of.
                language = model.language_model
                language.layers = take_apart(language.layers, language.cfg.num_hidden_layers)
            tokens, lengths, steps, scores = greedy_decode(
                model.decode,
                first_logits.reshape(B * G, -1),
                jax.tree.map(lambda x: x.reshape(B * G, *x.shape[2:]), cache),
                places.reshape(B * G, *places.shape[2:]),
                self.generation,
                self.max_new_tokens,
                penalized_tokens(_flat(prompt_ids), _flat(prompt_lengths), self.generation, first_logits.shape[-1]),
                None if options is None else jnp.repeat(options, G, axis=0),
            )
        scores = None if options is None else scores.reshape(B, G, -1)
        logits = first_logits if self.return_first_logits else None
        return Answers(tokens.reshape(B, G, -1), lengths.reshape(B, G), steps, logits, scores)


def encode_units(index: jax.Array, num_frames: int, size: int) -> tuple[jax.Array, jax.Array]:
    """What is encoded for a batch of groups: `size` successive frames of a set together, equal ones once.

    Args:
      index: int [B, G, K] into `num_frames` frames; where `size` does not divide K the last frame of a set is repeated.
    Returns:
      units int [B, U, size], frames of each; and int [B, G, ceil(K / size)], index into them. Only the units up to its
      largest entry are in use.
    """
    B, G, K = index.shape
    if size == 1:
        return jnp.broadcast_to(jnp.arange(num_frames)[:, None], (B, num_frames, 1)), index
    units = jnp.pad(index, ((0, 0), (0, 0), (0, -K % size)), mode="edge").reshape(B, -1, size)
    weights = num_frames ** np.arange(size)[::-1]  # a unit as one number
    unique = partial(jnp.unique, size=units.shape[1], fill_value=0, return_inverse=True)
    codes, inverse = jax.vmap(unique)(units @ weights)
    return codes[..., None] // weights % num_frames, inverse.reshape(B, G, -1)


def penalized_tokens(ids: jax.Array, lengths: jax.Array, generation: Generation, vocab_size: int) -> jax.Array:
    """The tokens that the repetition penalty holds for from the start: bool [B, V] of prompts int [B, N].

    Those of the prompt, or none, as Hugging Face's class of the model passes tokens or embeddings (see Generation).
    """
    B, N = ids.shape
    none = jnp.zeros((B, vocab_size), bool)
    if generation.video_token_id is None:
        return none
    ids = jnp.where(ids == VIDEO_TOKEN, generation.video_token_id, ids)
    ids = jnp.where(jnp.arange(N) < lengths[:, None], ids, vocab_size)  # padding is out of range and dropped
    return none.at[jnp.arange(B)[:, None], ids].set(True, mode="drop")


def _flat(x: jax.Array) -> jax.Array:
    """[B, G, ...] -> [B * G, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _in_chunks(prefill, sets, chunk: int):
    """`prefill` over frame sets and their texts, a tree of [B, G, ...], `chunk` of the G at a time."""
    G = sets[0].shape[1]
    if chunk >= G:
        return prefill(sets)
    if G % chunk:
        raise ValueError(f"prefill_chunk is {chunk}; it must divide the group size {G}")

    def place(i, filled):
        part = prefill(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1), sets))
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=1)
        return jax.tree.map(put, filled, part)

    def room(x):
        return jnp.zeros((x.shape[0], G, *x.shape[2:]), x.dtype)

    empty = jax.tree.map(room, jax.eval_shape(prefill, jax.tree.map(lambda x: x[:, :chunk], sets)))
    return jax.lax.fori_loop(0, G // chunk, place, empty)


def _encode_used(encode, units: jax.Array, num_used: jax.Array, chunk: int) -> tuple[jax.Array, tuple[int, ...]]:
    """`encode` over units [B, U, n], `chunk` of the U at a time, skipping the chunks behind the first `num_used`.

    U is static but how many of its units are unique is not; what is skipped costs no time. Returns the tokens of all
    units one after another, [B, tokens, width], and the shape of a unit's. (Did they lie in units, TPUs would take what
    is picked out of a copy of them all.)
    """
    U = units.shape[1]
    chunk = min(chunk, U)
    one = jax.eval_shape(encode, units[:, :chunk])
    B, _, *shape, width = one.shape
    if chunk == U:
        return encode(units).reshape(B, -1, width), tuple(shape)
    num_chunks = -(-U // chunk)
    units = jnp.pad(units, ((0, 0), (0, num_chunks * chunk - U), (0, 0)))

    def encode_chunk(i, tokens):
        part = encode(jax.lax.dynamic_slice_in_dim(units, i * chunk, chunk, axis=1)).reshape(B, -1, width)
        return jax.lax.dynamic_update_slice_in_dim(tokens, part, i * part.shape[1], axis=1)

    tokens = jnp.zeros((B, num_chunks * chunk * math.prod(shape), width), one.dtype)
    return jax.lax.fori_loop(0, (num_used + chunk - 1) // chunk, encode_chunk, tokens), tuple(shape)


def _picked(tokens: jax.Array, picks: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The tokens [B, ..., *shape, width] of int [B, ...] picks out of those of all units [B, tokens, width]."""
    rows = picks[..., None] * math.prod(shape) + np.arange(math.prod(shape))
    return jax.vmap(lambda tokens, rows: tokens[rows])(tokens, rows).reshape(*picks.shape, *shape, tokens.shape[-1])


def greedy_decode(
    decode: Callable,
    logits: jax.Array,
    cache,
    places: jax.Array,
    generation: Generation,
    max_new_tokens: int,
    penalized: jax.Array | None = None,
    options: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Greedy answers of P prompts that have been prefilled; stops when the last one has ended.

    The repetition penalty is Hugging Face's: the score of a token that was generated before, or is `penalized`, is
    divided by it when positive, multiplied when negative.

    Args:
      decode: (tokens int [P], places int [P, ...], cache) -> (logits float32 [P, V], cache).
      logits: float32 [P, V] of the first new token.
      cache: with room for `max_new_tokens`.
      places: int [P, ...], where the first new token goes; each further token goes one further.
      penalized: bool [P, V], tokens that count as generated from the start; None = no token.
      options: int [P, O], tokens that name the options, -1 for none; None = no option.
    Returns:
      tokens int32 [P, max_new_tokens], padded behind the end token; lengths int32 [P]; steps int32 []; and float32
      [P, O], log-probabilities of the options among each other (before any penalty) at the first token that is one of
      them, or else at the first token.
    """
    P = logits.shape[0]
    options = jnp.full((P, 0), -1) if options is None else options
    penalty, rows = generation.repetition_penalty, jnp.arange(P)
    end_tokens = jnp.array(generation.eos_token_ids)

    def pick(step, logits, tokens, lengths, ended, seen, scores, named):
        of_options = jnp.take_along_axis(logits, jnp.maximum(options, 0), axis=-1)
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
        token = jnp.where(ended, generation.pad_token_id, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        names_one = jnp.any(token[:, None] == options, axis=-1) & ~ended
        scores = jnp.where((step == 0) | (names_one & ~named)[:, None], of_options, scores)
        tokens, lengths = tokens.at[:, step].set(token), lengths + ~ended
        ended, seen = ended | jnp.isin(token, end_tokens), seen.at[rows, token].set(True)
        return tokens, lengths, ended, seen, scores, named | names_one

    def step_is_needed(state):
        step, _, (_, _, ended, *_) = state
        return (step < max_new_tokens) & ~ended.all()

    def one_step(state):
        step, cache, picked = state
        logits, cache = decode(picked[0][:, step - 1], places + step - 1, cache)
        return step + 1, cache, pick(step, logits, *picked)

    nothing = (
        jnp.full((P, max_new_tokens), generation.pad_token_id, jnp.int32),
        jnp.zeros(P, jnp.int32),
        jnp.zeros(P, bool),
        jnp.zeros(logits.shape, bool) if penalized is None else penalized,
        jnp.zeros(options.shape, jnp.float32),
        jnp.zeros(P, bool),
    )
    state = jnp.int32(1), cache, pick(0, logits, *nothing)
    steps, _, (tokens, lengths, _, _, scores, _) = jax.lax.while_loop(step_is_needed, one_step, state)
    return tokens, lengths, steps, jax.nn.log_softmax(jnp.where(options < 0, -jnp.inf, scores))
