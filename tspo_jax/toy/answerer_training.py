"""Supervised training of the tiny LLaVA-Video: its image tower on what a frame shows, then projector and language model
on questions about sets of frames."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import PreTrainedTokenizerBase

from tspo_jax.answering import prompts
from tspo_jax.models.layers import merge_params
from tspo_jax.models.llava_video import LlavaVideo, LlavaVideoConfig
from tspo_jax.models.preprocessing import ImageProcessor
from tspo_jax.models.qwen2 import Qwen2Config
from tspo_jax.models.siglip import SiglipConfig
from tspo_jax.toy.fitting import Fitting, fit, fresh_params, muon
from tspo_jax.toy.frame_bank import BALL_NAMES, NOTHING, SETTING_NAMES, THING_NAMES, FrameBank
from tspo_jax.toy.settings import SETTINGS

IMAGE_SIZE = 48
SHARPNESS = 2.5  # how much more than a random kernel's the first queries tell tokens apart
BRANCH = 0.35  # initial scale of what the mlps add
WORD_SUFFIX = "Please answer with one word."
# Exercises beside the toy world's questions: what is shown frame by frame, and pairs in random order, whose second
# word is found by the first.
LIST_QUESTION = "What is shown in every frame?"
BALLS_QUESTION = "Which ball is shown with which thing?"
ORDER_QUESTION = "What is shown after what?"
LETTER_QUESTION = "Which option has which letter?"


def llava_config(vocab_size: int) -> LlavaVideoConfig:
    """Bilinear pooling and grid newlines, as in LLaVA-Video 7B: 2 x 2 patches become one token and a newline."""
    return LlavaVideoConfig(
        Qwen2Config(vocab_size, 96, 192, 4, 4, 2, rope_theta=1e6, max_position_embeddings=4096),
        SiglipConfig(128, 256, 2, 4, IMAGE_SIZE, 24),
    )


def initial_params(config: LlavaVideoConfig, seed: int) -> tuple[nnx.GraphDef, dict]:
    """A fresh LLaVA-Video whose attention starts out looking for tokens like its own and copying them.

    Query and key kernels agree, the output kernel undoes the value kernel, and the head reads the embeddings (mimetic
    initialisation, Trockman & Kolter 2023). Two heads of the first layers look one and two tokens back, and one of the
    third finds what the first said. At least 3 layers. Finding the frame that shows what a question names is then a
    matter of hundreds of steps; from independent kernels it takes tens of thousands.
    """
    graphdef, params = fresh_params(lambda rngs: LlavaVideo(config, rngs=rngs), seed)
    language, cfg = params["language_model"], config.language
    attention = language["layers"]["self_attn"]
    L, D, d = cfg.num_hidden_layers, cfg.hidden_size, cfg.head_dim
    groups = cfg.num_attention_heads // cfg.num_key_value_heads

    def of_query_heads(kernel):
        """[L, D, key/value heads * d] -> [L, D, query heads * d], each head repeated for its group."""
        return jnp.repeat(kernel.reshape(L, D, -1, d), groups, axis=2).reshape(L, D, -1)

    random_output = attention["o_proj"]["kernel"]
    query = (attention["q_proj"]["kernel"] + of_query_heads(attention["k_proj"]["kernel"])) / 2
    attention["q_proj"]["kernel"] = SHARPNESS * query
    undone = of_query_heads(attention["v_proj"]["kernel"]).swapaxes(1, 2)
    attention["o_proj"]["kernel"] = 0.1 * random_output + undone
    for layer in (0, 1):
        _look_back(attention, cfg, layer, (1, 2))
    # An induction head: the first layer says what came before in a code of its own, the third looks for that code.
    last = slice(-groups * d, None)
    attention["o_proj"]["kernel"] = attention["o_proj"]["kernel"].at[0, last].set(random_output[0, last])
    earlier = SHARPNESS / 2 * jnp.tile(attention["v_proj"]["kernel"][0, :, -d:], groups)
    attention["q_proj"]["kernel"] = attention["q_proj"]["kernel"].at[2, :, last].set(earlier)
    attention["k_proj"]["kernel"] = attention["k_proj"]["kernel"].at[2, :, -d:].set(random_output[0, -d:].T)
    language["layers"]["mlp"]["down_proj"]["kernel"] *= BRANCH
    language["lm_head"]["kernel"] = reading_head(language["embed_tokens"]["embedding"])
    return graphdef, params


def _look_back(attention: dict, cfg: Qwen2Config, layer: int, offsets: tuple[int, ...]) -> None:
    """Makes the queries of the layer's last key head look `offsets` tokens back, in place.

    Biases of query and key make the score a sum of cosines of (distance - offset) under the rotary embedding, whatever
    the tokens are.
    """
    d, groups = cfg.head_dim, cfg.num_attention_heads // cfg.num_key_value_heads
    strength = math.sqrt(5 * math.sqrt(d))
    angles = np.outer(offsets, cfg.rope_theta ** (-np.arange(0, d, 2) / d))  # [offsets, d / 2]
    query = strength * np.concatenate([np.cos(angles), -np.sin(angles)], axis=1).reshape(-1)
    key = strength * np.repeat([1.0, 0.0], d // 2)
    for name, bias, width in (("q_proj", query, groups * d), ("k_proj", key, d)):
        attention[name]["bias"] = attention[name]["bias"].at[layer, -width:].set(bias)
        attention[name]["kernel"] = attention[name]["kernel"].at[layer, :, -width:].multiply(0.1)


def reading_head(embeddings: jax.Array) -> jax.Array:
    """The head's kernel [hidden, V] that reads off which word's embedding a state is."""
    return embeddings.T / jnp.sqrt(embeddings.shape[1])


# ---------------------------------------------------------------------------------------- tower and projector


def train_projection(
    graphdef: nnx.GraphDef,
    params: dict,
    bank: FrameBank,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    num_steps: int,
    run_dir: Path,
    report: Callable[[int, float], None],
) -> dict:
    """`params` of a LlavaVideo with its tower, projector and embeddings trained to agree.

    Every visual token must be closest to the embeddings of the words for its frame's thing, ball and setting. The
    language model then meets pictures in the language it reads, as after LLaVA's first stage. Its head is reset to read
    the trained embeddings.
    """
    processor = ImageProcessor.siglip(IMAGE_SIZE)
    nothing = [tokenizer.pad_token_id]
    classes = [word_ids(tokenizer, THING_NAMES) + nothing, word_ids(tokenizer, BALL_NAMES) + nothing]
    classes = [np.array(ids) for ids in (*classes, word_ids(tokenizer, SETTING_NAMES))]
    labels = np.stack([bank.thing % len(classes[0]), bank.ball % len(classes[1]), bank.setting], axis=1)
    language = params["language_model"]
    frozen = {name: language[name] for name in language if name != "embed_tokens"}

    def loss(params, pixels, labels):
        language = frozen | {"embed_tokens": params["embed_tokens"]}
        model = merge_params(graphdef, {**params["visual"], "language_model": language})
        tokens = model.encode_frames(processor.normalize(pixels))
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


# ------------------------------------------------------------------------------------------------ conversations


class Shot(NamedTuple):
    """A scene as a set of picked frames shows it, by indices into the name tables (thing and ball may be NOTHING)."""

    setting: int
    thing: int
    ball: int
    num_frames: int


class Turn(NamedTuple):
    question: str  # with its options, if it has any
    suffix: str
    answer: str


class Conversation(NamedTuple):
    """frames: K rows of the bank; turns: questions about them, each with its answer."""

    frames: list[int]
    turns: list[Turn]


class ConversationWriter:
    """Draws sets of K frames as a policy may pick them, and conversations about them (as LLaVA-Video is trained on).

    All questions can be answered from the frames; they are those of toy/questions.py, asked with options or for a word,
    and "what is shown in every frame", which teaches to read.
    """

    def __init__(self, bank: FrameBank):
        self._rows: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for i, contents in enumerate(zip(bank.setting.tolist(), bank.thing.tolist(), bank.ball.tolist(), strict=True)):
            self._rows[contents].append(i)

    def __call__(
        self, rng: np.random.Generator, num_frames: int, num_turns: int, word_share: float = 0.4
    ) -> Conversation:
        """`word_share` of the questions ask for a word instead of giving options."""
        shots = self._shots(rng, num_frames)
        frames = []
        for shot in shots:
            rows = self._rows[shot[:3]]
            frames += [rows[i] for i in rng.integers(len(rows), size=shot.num_frames)]
        return Conversation(frames, _turns(rng, shots, num_turns, word_share))

    def _shots(self, rng: np.random.Generator, num_frames: int) -> list[Shot]:
        """Shots in their order, together num_frames frames: events (thing and ball), decoys of them, and fillers."""
        # A needle sample splices videos: then settings mix, and a thing may have a ball in several of them.
        settings = rng.choice(len(SETTING_NAMES), 1 if rng.random() < 0.7 else 4, replace=False)
        things = rng.permutation(len(THING_NAMES))[: rng.integers(max(3, num_frames // 2), num_frames + 2)]
        shots: list[Shot] = []
        events: set[tuple[int, int]] = set()
        left = num_frames
        while left:
            setting, thing = int(rng.choice(settings)), int(rng.choice(things))
            ball, kind = int(rng.integers(len(BALL_NAMES))), rng.random()
            if kind < 0.6 and (setting, thing) not in events:
                events.add((setting, thing))
            elif kind < 0.8:
                ball = NOTHING
            else:
                thing, ball = NOTHING, ball if rng.random() < 0.5 else NOTHING
            if self._rows.get((setting, thing, ball)) and (not shots or shots[-1][:3] != (setting, thing, ball)):
                count = min(left, int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2])))
                shots.append(Shot(setting, thing, ball, count))
                left -= count
        return shots


def _turns(rng: np.random.Generator, shots: list[Shot], num_turns: int, word_share: float) -> list[Turn]:
    """Up to num_turns different questions that the shots answer. (A question asked twice would teach to look up the
    earlier answer in the text.)"""
    shown = [shot.thing for shot in shots if shot.thing != NOTHING]
    lookups = [shot for shot in shots if shot.thing != NOTHING and shot.ball != NOTHING]
    questions = []  # (weight, stem, what is looked for, answer, vocabulary)
    for shot in lookups:
        thing, setting = THING_NAMES[shot.thing], SETTING_NAMES[shot.setting]
        stem = f"hat colour is the ball shown with the {thing}?"
        if sum(other.thing == shot.thing for other in lookups) == 1 and rng.random() < 0.6:
            stem, sought = f"W{stem}", f"with {thing}"
        else:
            stem, sought = f"{SETTINGS[setting].capitalize()}, w{stem}", f"{setting} {thing}"
        questions.append((0.5 / len(lookups), stem, sought, BALL_NAMES[shot.ball], list(BALL_NAMES)))
    for moment, shot in (("beginning", shots[0]), ("end", shots[-1])):
        if shot.thing != NOTHING:
            stem = f"What is shown at the {moment} of the video?"
            questions.append((0.2, stem, moment, THING_NAMES[shot.thing], _things_first(rng, shown)))
    for first, second in itertools.pairwise(shots):
        if shown.count(first.thing) == 1 and second.thing not in (first.thing, NOTHING):
            thing = THING_NAMES[first.thing]
            others = [thing for thing in shown if thing != first.thing]
            stem = f"What is shown right after the {thing}?"
            questions.append((0.2, stem, f"after {thing}", THING_NAMES[second.thing], _things_first(rng, others)))
    turns = [(weight, _asked(rng, *question, word_share)) for weight, *question in questions]
    turns.append((0.1, _everything(shots)))
    balls = [(shot.thing, BALL_NAMES[shot.ball]) for shot in lookups]
    followers = [
        (first.thing, THING_NAMES[second.thing])
        for first, second in itertools.pairwise(shots)
        if second.thing not in (first.thing, NOTHING)
    ]
    for question, relation, pairs in ((BALLS_QUESTION, "with", balls), (ORDER_QUESTION, "after", followers)):
        named = [thing for thing, _ in pairs]
        pairs = [(thing, word) for thing, word in pairs if named.count(thing) == 1 and thing != NOTHING]
        if pairs:
            said = [f"{relation} {THING_NAMES[pairs[i][0]]} {pairs[i][1]}" for i in rng.permutation(len(pairs))]
            turns.append((0.2, Turn(question, "", " " + ", ".join(said))))
    turns.append((0.2, _letters(rng)))
    weights = np.array([weight for weight, _ in turns])
    order = rng.choice(len(turns), min(num_turns, len(turns)), replace=False, p=weights / weights.sum())
    return [turns[i][1] for i in order]


def _everything(shots: list[Shot]) -> Turn:
    """What every frame shows, in order."""
    words = []
    for shot in shots:
        parts = [name for name in (_name(THING_NAMES, shot.thing), _name(BALL_NAMES, shot.ball)) if name]
        words += [" ".join(parts) or "nothing"] * shot.num_frames
    return Turn(LIST_QUESTION, "", " " + ", ".join(words))


def _letters(rng: np.random.Generator) -> Turn:
    """Options of no question, and one of them with its letter."""
    options = rng.choice([BALL_NAMES, THING_NAMES][rng.integers(2)], 4, replace=False).tolist()
    i = rng.integers(4)
    return Turn("\n".join([LETTER_QUESTION, *_lettered(options)]), "", f" {options[i]} {'ABCD'[i]}")


def _lettered(options: list[str]) -> list[str]:
    return [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]


def _asked(
    rng: np.random.Generator, stem: str, sought: str, answer: str, vocabulary: list[str], word_share: float
) -> Turn:
    """The question with four options, or for a word.

    The answer says what is looked for, what was found and, with options, its letter (" with tree red B"): three short
    steps that are learned in minutes, where the letter alone would be one long step that is not.
    """
    if rng.random() < word_share:
        return Turn(stem, WORD_SUFFIX, f" {sought} {answer}")
    wrong = [word for word in dict.fromkeys(vocabulary) if word != answer]
    options = rng.permutation([answer, *rng.choice(wrong[:7], 3, replace=False)]).tolist()
    letter = "ABCD"[options.index(answer)]
    return Turn("\n".join([stem, *_lettered(options)]), prompts.LETTER_SUFFIX, f" {sought} {answer} {letter}")


def _things_first(rng: np.random.Generator, shown: list[int]) -> list[str]:
    """Options' vocabulary: things of the frames first, then others."""
    return [THING_NAMES[i] for i in [*rng.permutation(shown)[:4], *rng.permutation(len(THING_NAMES))]]


def _name(names: tuple[str, ...], index: int) -> str | None:
    return None if index == NOTHING else names[index]


# ------------------------------------------------------------------------------------------------ language model


def render_conversation(turns: list[Turn]) -> list[str]:
    """Texts that alternate between what is given and what is to be said, in the template qwen_1_5."""
    first, *others = turns
    texts = [prompts.render(first.question, suffix=first.suffix), f"{first.answer}<|im_end|>"]
    for turn in others:
        user = f"{turn.question}\n{turn.suffix}" if turn.suffix else turn.question
        texts += [f"\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", f"{turn.answer}<|im_end|>"]
    return texts


def training_texts(writer: ConversationWriter, rng: np.random.Generator, count: int) -> list[str]:
    """Conversations as text, to train a tokenizer on."""
    return ["".join(render_conversation(writer(rng, 8, 3).turns)) for _ in range(count)]


class Batch(NamedTuple):
    """frames int [B, K] rows of the bank; ids int32 [B, N]; weights float32 [B, N], how much each id counts: 0
    outside of answers, and every answer of a turn counts alike, however long it is."""

    frames: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def draw_batch(
    rng: np.random.Generator,
    writer: ConversationWriter,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_frames: int,
    batch_size: int,
) -> Batch:
    """A batch of conversations of three turns, padded on the right to a multiple of 32 tokens."""
    frames, rows, counts = [], [], []
    for _ in range(batch_size):
        conversation = writer(rng, num_frames, num_turns=3)
        frames.append(conversation.frames)
        ids: list[int] = []
        weights: list[float] = []
        for i, text in enumerate(render_conversation(conversation.turns)):
            tokens = prompts.tokenize(text, tokenizer) if i == 0 else tokenizer(text)["input_ids"]
            ids += tokens
            weights += [(i % 2) / len(tokens)] * len(tokens)
        rows.append(ids)
        counts.append(weights)
    padded, lengths = prompts.pad(rows, tokenizer.pad_token_id, multiple=32)
    padded_weights = np.zeros(padded.shape, np.float32)
    for row, length in enumerate(lengths):
        padded_weights[row, :length] = counts[row]
    return Batch(np.array(frames), padded, padded_weights)


def train_language(
    graphdef: nnx.GraphDef,
    params: dict,
    bank: FrameBank,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    num_steps: int,
    run_dir: Path,
    report: Callable[[int, float], None],
    batch_size: int = 32,
) -> dict:
    """`params` with projector and language model trained on conversations about 4, then 8 and sometimes 16, frames.

    The tower stays as it is, so that its tokens are computed once.
    """
    processor = ImageProcessor.siglip(IMAGE_SIZE)
    tower = params["vision_tower"]
    trained = {name: params[name] for name in params if name != "vision_tower"}
    see = jax.jit(lambda pixels: merge_params(graphdef, params).vision_tower(processor.normalize(pixels)))
    tokens = np.concatenate([see(rows) for rows in np.array_split(bank.pixels, -(-len(bank.pixels) // 500))])

    def loss(trained, tokens, ids, weights):
        model = merge_params(graphdef, {**trained, "vision_tower": tower})
        B, K = tokens.shape[:2]
        frames = model.pool(model.mm_projector(tokens.reshape(B * K, *tokens.shape[2:])))
        embeddings = model.embed_prompt(frames.reshape(B, K, *frames.shape[1:]), ids)
        positions = jnp.broadcast_to(jnp.arange(embeddings.shape[1]), embeddings.shape[:2])
        hidden, _ = model.language_model(embeddings, positions)
        # The visual tokens take the place of one id: the text behind them is what is predicted.
        logits = model.language_model.logits(hidden[:, embeddings.shape[1] - ids.shape[1] : -1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(ids[:, 1:], 0))
        return jnp.sum(losses * weights[:, 1:]) / jnp.sum(weights)

    def batches(rng: np.random.Generator):
        writer = ConversationWriter(bank)
        for i in itertools.count():
            num_frames = 4 if i < num_steps // 8 else 16 if i % 5 == 4 else 8
            batch = draw_batch(rng, writer, tokenizer, num_frames=num_frames, batch_size=batch_size)
            yield tokens[batch.frames], batch.ids, batch.weights

    fitting = Fitting(seed=seed, batch_size=batch_size, num_steps=num_steps, learning_rate=5e-3)
    trained = fit(loss, trained, batches(np.random.default_rng(seed)), fitting, run_dir, report, optimizer=muon)
    return {**trained, "vision_tower": tower}
