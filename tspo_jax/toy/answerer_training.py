"""Supervised training of a tiny Video-MLLM: its image tower on what a frame shows, then projector and language model on
questions about sets of frames."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import PreTrainedTokenizerBase

from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.checkpoints.weights import flatten, unflatten
from tspo_jax.models.layers import merge_params
from tspo_jax.toy.conversations import ConversationWriter, draw_batch
from tspo_jax.toy.fitting import Fitting, fit, muon
from tspo_jax.toy.frame_bank import BALL_NAMES, SETTING_NAMES, THING_NAMES, FrameBank
from tspo_jax.toy.tiny_answerers import TinyAnswerer, reading_head


def train_projection(
    tiny: TinyAnswerer,
    answerer: Answerer,
    bank: FrameBank,
    *,
    seed: int,
    num_steps: int,
    run_dir: Path,
    report: Callable[[int, float], None],
) -> dict:
    """The answerer's parameters with its tower, projector and embeddings trained to agree.

    Every visual token must be closest to the embeddings of the words for its frame's thing, ball and setting. The
    language model then meets pictures in the language it reads, as after LLaVA's first stage. Its head is reset to read
    the trained embeddings.
    """
    graphdef, params, tokenizer = answerer.graphdef, answerer.params, answerer.tokenizer
    nothing = [tokenizer.pad_token_id]
    classes = [word_ids(tokenizer, THING_NAMES) + nothing, word_ids(tokenizer, BALL_NAMES) + nothing]
    classes = [np.array(ids) for ids in (*classes, word_ids(tokenizer, SETTING_NAMES))]
    labels = np.stack([bank.thing % len(classes[0]), bank.ball % len(classes[1]), bank.setting], axis=1)
    language = params["language_model"]
    frozen = {name: language[name] for name in language if name != "embed_tokens"}

    def loss(params, pixels, labels):
        language = frozen | {"embed_tokens": params["embed_tokens"]}
        model = merge_params(graphdef, {**params["visual"], "language_model": language})
        tokens = tiny.prompt_tokens(model.encode_frames(answerer.processor.normalize(pixels)))
        words = params["embed_tokens"]["embedding"]
        each = [
            optax.softmax_cross_entropy_with_integer_labels(
                tokens @ words[ids].T / jnp.sqrt(words.shape[1]),
                jnp.broadcast_to(label[:, None, None], tokens.shape[:3]),
            ).mean()
            for ids, label in zip(classes, labels.T, strict=True)
        ]
        return sum(each)

    def batches(rng: np.random.Generator):
        while True:
            rows = rng.choice(len(labels), 128, replace=False)
            yield bank.pixels[rows], labels[rows]

    visual = {name: params[name] for name in params if name != "language_model"}
    trained = {"visual": visual, "embed_tokens": language["embed_tokens"]}
    fitting = Fitting(seed=seed, batch_size=128, num_steps=num_steps, learning_rate=4e-3)
    trained = fit(loss, trained, batches(np.random.default_rng(seed)), fitting, run_dir, report)
    words = trained["embed_tokens"]["embedding"]
    # An option's letter reads the same in the list ("B. red") and in the answer ("red B").
    words = words.at[np.array(word_ids(tokenizer, "ABCD"))].set(words[np.array(word_ids(tokenizer, "ABCD", ""))])
    language = frozen | {"embed_tokens": {"embedding": words}, "lm_head": {"kernel": reading_head(words)}}
    return {**trained["visual"], "language_model": language}


def word_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], before: str = " ") -> list[int]:
    """The tokens of words within a sentence. Raises ValueError where a word is more than one token."""
    ids = [tokenizer(f"{before}{word}")["input_ids"] for word in words]
    if long := [word for word, tokens in zip(words, ids, strict=True) if len(tokens) > 1]:
        raise ValueError(f"the tokenizer splits {', '.join(long)}: train it on more text")
    return [tokens[0] for tokens in ids]


def train_language(
    tiny: TinyAnswerer,
    answerer: Answerer,
    bank: FrameBank,
    *,
    seed: int,
    num_steps: int,
    run_dir: Path,
    report: Callable[[int, float], None],
    batch_size: int = 32,
) -> dict:
    """The answerer's parameters, its tower's aside, trained on conversations about 4, then 8, sometimes 16, frames.

    The tower stays as it is, so that its features are computed once. Raises ValueError for a model that does not encode
    frame by frame.
    """
    if answerer.config.temporal_patch_size != 1:
        raise ValueError(f"it encodes {answerer.config.temporal_patch_size} frames together, not one by one")
    graphdef = answerer.graphdef
    is_tower = {path: path.startswith(tiny.family.tower) for path in flatten(answerer.params)}
    tower = {path: leaf for path, leaf in flatten(answerer.params).items() if is_tower[path]}
    trained = unflatten({path: leaf for path, leaf in flatten(answerer.params).items() if not is_tower[path]})

    def whole(trained: dict) -> dict:
        return unflatten(tower | flatten(trained))

    @jax.jit
    def see(pixels):
        return merge_params(graphdef, answerer.params).tower(answerer.processor.normalize(pixels))

    features = np.concatenate([see(rows) for rows in np.array_split(bank.pixels, -(-len(bank.pixels) // 500))])

    def loss(trained, features, ids, lengths, weights):
        model = merge_params(graphdef, whole(trained))
        B, K = features.shape[:2]
        tokens = model.project(features.reshape(B * K, *features.shape[2:]))
        prompt = model.prompt(tokens.reshape(B, K, *tokens.shape[1:]), ids, lengths)
        N = prompt.embeddings.shape[1]
        slots, angles = jnp.broadcast_to(jnp.arange(N), (B, N)), model.angles(prompt.positions)
        hidden, _ = model.language_model(prompt.embeddings, slots, angles=angles, added=prompt.added)
        # The visual tokens take the place of fewer ids, all before what is said.
        logits = model.language_model.logits(hidden[:, N - ids.shape[1] : -1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(ids[:, 1:], 0))
        return jnp.sum(losses * weights[:, 1:]) / jnp.sum(weights)

    def batches(rng: np.random.Generator):
        writer = ConversationWriter(bank)
        for i in itertools.count():
            num_frames = 4 if i < num_steps // 8 else 16 if i % 5 == 4 else 8
            batch = draw_batch(rng, writer, answerer, num_frames=num_frames, batch_size=batch_size)
            yield features[batch.frames], *batch[1:]

    fitting = Fitting(seed=seed, batch_size=batch_size, num_steps=num_steps, learning_rate=5e-3)
    return whole(fit(loss, trained, batches(np.random.default_rng(seed)), fitting, run_dir, report, optimizer=muon))
