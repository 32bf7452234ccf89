"""Several answers to one prompt as one sequence, [video, prompt | answer | answer], for training.

The prompt, nearly all of the tokens, is computed once, and no answer sees another: each token of an answer sees the
prompt and its own answer up to itself, at the positions that it would have alone. What comes out, gradients included,
is that of the sequences one by one.

Nothing of a layer but its input is kept for the way back (each is computed twice), and logits exist at the answers'
positions only.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models import attention
from tspo_jax.models.layers import merge_params, split_params
from tspo_jax.models.qwen2 import DecoderLayer, Qwen2
from tspo_jax.models.video_prompt import Prompt, add_behind

QUERY_BLOCK = 128  # tokens of answers that look at the prompt at a time; their scores are [B, H, block, N]


def answer_states(
    model: nnx.Module, prompt: Prompt, answers: jax.Array, constrain: Callable[[jax.Array], jax.Array] = lambda x: x
) -> jax.Array:
    """The hidden states, behind the final norm, that predict each token of the answers.

    Args:
      model: a Video-MLLM (models/llava_video.py says what it offers).
      prompt: of B questions, right padded.
      answers: int [B, S, A], S answers to each, right padded with any token.
      constrain: how the residual stream [B, N, hidden] lies on the devices, applied between the layers.
    Returns:
      [B, S, A, hidden]: the state before each token; the first one's is the prompt's last.
    """
    B, S, A = answers.shape
    language: Qwen2 = model.language_model
    start = prompt.following[:, None] + jnp.tile(jnp.arange(A), S)
    angles = jnp.concatenate([model.angles(prompt.positions), model.angles(start)], axis=1)
    x = jnp.concatenate([prompt.embeddings, language.embed_tokens(answers.reshape(B, S * A))], axis=1)
    P = prompt.embeddings.shape[1]
    attend = partial(_attend, num_prompt=P, lengths=prompt.lengths, is_own=_own_and_before(S, A))
    graphdef, layers = split_params(language.layers)

    @jax.checkpoint
    def step(x, layer):
        i, params = layer
        x = _layer(merge_params(graphdef, params), x, angles, attend)
        return constrain(add_behind(i, x, prompt.added)), None

    with jax.named_scope("layers"):  # devices/program_cost.py counts loops by their scopes
        x, _ = jax.lax.scan(step, constrain(x), (jnp.arange(language.cfg.num_hidden_layers), layers))
    last = jnp.take_along_axis(x, (prompt.lengths - 1)[:, None, None], axis=1)  # [B, 1, hidden]
    of_answers = x[:, P:].reshape(B, S, A, -1)
    before = jnp.concatenate([jnp.broadcast_to(last[:, None], (B, S, 1, x.shape[-1])), of_answers[:, :, :-1]], axis=2)
    return language.norm(before)


def _layer(layer: DecoderLayer, x: jax.Array, angles: jax.Array, attend: Callable) -> jax.Array:
    y = layer.input_layernorm(x)
    out = attend(layer.self_attn.queries(y, angles), *layer.self_attn.keys_values(y, angles))
    x = x + layer.self_attn.o_proj(out.reshape(*x.shape[:2], -1))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _own_and_before(S: int, A: int) -> jax.Array:
    """bool [S * A, S * A]: whether a token of an answer (row) sees another one (column)."""
    answer, place = jnp.divmod(jnp.arange(S * A), A)
    return (answer[:, None] == answer) & (place[:, None] >= place)


def _attend(q, k, v, *, num_prompt: int, lengths: jax.Array, is_own: jax.Array) -> jax.Array:
    """The prompt's tokens look back, and the answers' at the prompt (its padding left out) and at their own."""
    B, N = q.shape[:2]
    of_prompt = attention.causal(*(x[:, :num_prompt] for x in (q, k, v)))
    is_prompt = jnp.arange(num_prompt) < lengths[:, None]  # [B, P]

    @jax.checkpoint
    def look(block):
        q, is_own = block  # [block, B, H, d], [block, S * A]
        is_seen = jnp.concatenate(
            [
                jnp.broadcast_to(is_prompt[:, None], (B, len(q), num_prompt)),
                jnp.broadcast_to(is_own, (B, *is_own.shape)),
            ],
            axis=2,
        )
        out = jax.nn.dot_product_attention(q.swapaxes(0, 1), k, v, mask=is_seen[:, None])
        return out.swapaxes(0, 1)

    queries, num_answers = q[:, num_prompt:].swapaxes(0, 1), N - num_prompt
    if num_answers <= QUERY_BLOCK:
        of_answers = look((queries, is_own))
    else:

        def blocks(x):
            padded = jnp.pad(x, ((0, -num_answers % QUERY_BLOCK), *((0, 0),) * (x.ndim - 1)), mode="edge")
            return padded.reshape(-1, QUERY_BLOCK, *x.shape[1:])

        with jax.named_scope("answers"):
            of_answers = jax.lax.map(look, (blocks(queries), blocks(is_own)))
        of_answers = of_answers.reshape(-1, *queries.shape[1:])[:num_answers]
    return jnp.concatenate([of_prompt, of_answers.swapaxes(0, 1)], axis=1)


def log_probs_at(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax of logits [..., V] at tokens int [...], float32."""
    logits = logits.astype(jnp.float32)
    at_token = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return at_token - jax.nn.logsumexp(logits, axis=-1)


@jax.checkpoint
def _project(hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> jax.Array:
    return log_probs_at(jnp.einsum("...h,hv->...v", hidden, head, preferred_element_type=jnp.float32), tokens)


def token_log_probs(language: Qwen2, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probabilities float32 [...] of tokens int [...] under the states [..., hidden] that predict them."""
    is_tied = language.cfg.tie_word_embeddings
    head = language.embed_tokens.embedding[...].T if is_tied else language.lm_head.kernel[...]
    return _project(hidden, head, tokens)
