"""Conversations about sets of frames, as a policy may pick them: what the tiny answerers are trained on."""

import itertools
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.checkpoints.folders import Answerer, Architecture
from tspo_jax.models.video_prompt import FrameTimes
from tspo_jax.toy.frame_bank import BALL_NAMES, NOTHING, SETTING_NAMES, THING_NAMES, FrameBank
from tspo_jax.toy.settings import SETTINGS

WORD_SUFFIX = "Please answer with one word."
# Exercises beside the toy world's questions: what is shown frame by frame, and pairs in random order, whose second
# word is found by the first.
LIST_QUESTION = "What is shown in every frame?"
BALLS_QUESTION = "Which ball is shown with which thing?"
ORDER_QUESTION = "What is shown after what?"
LETTER_QUESTION = "Which option has which letter?"


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


# ------------------------------------------------------------------------------------------------- text and tokens


def render_conversation(turns: list[Turn], template: str = "qwen_1_5") -> list[str]:
    """Texts that alternate between what is given and what is to be said."""
    first, *others = turns
    texts = [prompts.render(first.question, template, first.suffix), f"{first.answer}<|im_end|>"]
    for turn in others:
        user = f"{turn.question}\n{turn.suffix}" if turn.suffix else turn.question
        texts += [f"\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", f"{turn.answer}<|im_end|>"]
    return texts


def training_texts(writer: ConversationWriter, rng: np.random.Generator, count: int, reader: Architecture) -> list[str]:
    """Conversations as text for a Video-MLLM of reader's family, to train its tokenizer on."""
    return ["".join(_texts(writer(rng, 8, 3), rng, reader)) for _ in range(count)]


def _texts(conversation: Conversation, rng: np.random.Generator, reader: Architecture | Answerer) -> list[str]:
    """`render_conversation`, told when the frames are shown where the family tells that."""
    first, *others = render_conversation(conversation.turns, reader.template)
    # Of a stream of their own: what else is drawn is the same for every family.
    times = draw_times(rng.spawn(1)[0], len(conversation.frames))
    return [reader.config.write_times(first, times), *others]


def draw_times(rng: np.random.Generator, num_frames: int) -> FrameTimes:
    """When picks of a video, or of a needle sample, are shown that has about one candidate a second."""
    candidates = rng.choice(rng.integers(60, 832), num_frames, replace=False)
    return FrameTimes.of(np.sort(candidates) * rng.uniform(0.95, 1.05))


class Batch(NamedTuple):
    """frames int [B, K] rows of the bank; ids int32 [B, N] and lengths int32 [B] of the conversations; weights float32
    [B, N], how much each id counts: 0 outside of answers, and every answer of a turn counts alike, however long it
    is."""

    frames: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray


def draw_batch(
    rng: np.random.Generator, writer: ConversationWriter, reader: Answerer, *, num_frames: int, batch_size: int
) -> Batch:
    """A batch of conversations of three turns, padded on the right to a multiple of 64 tokens."""
    frames, rows, counts = [], [], []
    for _ in range(batch_size):
        conversation = writer(rng, num_frames, num_turns=3)
        frames.append(conversation.frames)
        ids: list[int] = []
        weights: list[float] = []
        for i, text in enumerate(_texts(conversation, rng, reader)):
            tokens = prompts.tokenize(text, reader.tokenizer) if i == 0 else reader.tokenizer(text)["input_ids"]
            ids += tokens
            weights += [(i % 2) / len(tokens)] * len(tokens)
        rows.append(ids)
        counts.append(weights)
    padded, lengths = prompts.pad(rows, reader.tokenizer.pad_token_id, multiple=64)
    padded_weights = np.zeros(padded.shape, np.float32)
    for row, length in enumerate(lengths):
        padded_weights[row, :length] = counts[row]
    return Batch(np.array(frames), padded, lengths, padded_weights)
