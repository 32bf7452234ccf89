"""A stream as it comes: frames go in, questions are answered at any moment, and what is remembered can be saved.

The recurrent state is one memory [1, N_s, D], whatever the length; beside it lies the bank of all clips' memories and
indicators on the host (a clip takes N_s + 1 vectors), from which a question picks V. Frames may be pushed by one thread
while others ask: a question sees the clips that were there when it came.
"""

import dataclasses
import json
import math
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tspo_jax.answering import prompts
from tspo_jax.answering.rollout import greedy_decode
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data import frame_store
from tspo_jax.data.letters import stated_letter
from tspo_jax.data.questions import split_options
from tspo_jax.models import attention
from tspo_jax.models.layers import merge_params
from tspo_jax.models.streaming import Memories
from tspo_jax.models.video_prompt import splice, text_prompt
from tspo_jax.streaming.clips import question_tokens
from tspo_jax.streaming.folders import Encoder, check_answerer

_ROOM = 64  # clips; the bank is padded to this times a power of 2: few sizes, few compilations
_TOKENS = 64  # likewise of texts


@dataclasses.dataclass(frozen=True)
class Remembered:
    """What is left of the clips so far: `last` [N_s, D]; of each clip its memory [N_s, D], indicator [D], and start and
    end in seconds; the time of the last frame. Never changed: a push makes a new one."""

    last: np.ndarray
    memories: tuple[np.ndarray, ...] = ()
    indicators: tuple[np.ndarray, ...] = ()
    times: tuple[tuple[float, float], ...] = ()
    seconds: float = 0.0


class Stream:
    """A stream of one video.

    Args:
      encoder: from folders.load. answerer: that it was trained with.
      max_new_tokens: of an answer.
      remembered: of an earlier start.
      attention: as of the rollout.

    Attributes:
      num_pushes: clips that were encoded; a question about whole clips encodes none.
    """

    def __init__(
        self,
        encoder: Encoder,
        answerer: Answerer,
        *,
        max_new_tokens: int = 32,
        remembered: Remembered | None = None,
        attention: str = "auto",
    ):
        check_answerer(answerer)
        self.encoder, self.answerer, self._attention = encoder, answerer, attention
        self._max_new_tokens = max_new_tokens
        self._push = jax.jit(self._traced_push)
        self._answer = jax.jit(self._traced_answer)
        if remembered is None:
            first = merge_params(encoder.graphdef, encoder.params).first_memory(1)
            remembered = Remembered(np.asarray(first)[0])
        self.remembered = remembered
        self._pending: list[tuple[np.ndarray, float]] = []  # frames of a clip that is not full
        self._lock = threading.Lock()  # of the two fields above; never held while the device works for a question
        self._pushing = threading.Lock()  # one push after another
        self.num_pushes = 0

    # ---- frames ------------------------------------------------------------------------------------------------

    def add(self, frame: np.ndarray, seconds: float) -> bool:
        """A frame uint8 [H, W, 3] at its time; returns whether it made a clip full, which is then encoded.

        Raises ValueError for a time that is none, or before the last frame's.
        """
        if not math.isfinite(seconds) or seconds < 0:
            raise ValueError(f"a frame's time is {seconds}, not seconds from 0 on")
        shown = self.answerer.processor.for_frames(self.encoder.config.frames).crop(frame)
        with self._pushing:
            with self._lock:
                before = self._pending[-1][1] if self._pending else self.remembered.seconds
            if seconds < before - 1e-6:
                raise ValueError(f"a frame at {seconds:g} s comes after {before:g} s: frames must be in order of time")
            with self._lock:
                self._pending.append((shown, seconds))
                is_full = len(self._pending) == self.encoder.config.frames
            if is_full:
                self._commit()
            return is_full

    def finish(self) -> bool:
        """Encodes what is left of a stream that stopped in mid-clip, its last frame repeated; False for nothing."""
        with self._pushing:
            if not self._pending:
                return False
            self._commit()
            return True

    def _commit(self) -> None:
        new = self._with(self.remembered, self._pending)
        with self._lock:
            self.remembered, self._pending = new, []

    def _with(self, remembered: Remembered, pending: Sequence[tuple[np.ndarray, float]]) -> Remembered:
        """One clip more."""
        T = self.encoder.config.frames
        frames = np.stack([frame for frame, _ in [*pending, *[pending[-1]] * (T - len(pending))]])
        start, last = pending[0][1], pending[-1][1]
        end = last + (last - start) / (len(pending) - 1) if len(pending) > 1 else last + 1.0
        times = np.array([[start, end]], np.float32)
        memory, indicator = self._push(
            self.encoder.params, self.answerer.params, remembered.last[None], frames[None], times
        )
        self.num_pushes += 1
        memory = np.asarray(memory)[0]
        return Remembered(
            memory,
            (*remembered.memories, memory),
            (*remembered.indicators, np.asarray(indicator)[0]),
            (*remembered.times, (start, end)),
            last,
        )

    def _traced_push(self, params, frozen, last, frames, times):
        model, normalize = merge_params(self.answerer.graphdef, frozen), self.answerer.processor.normalize
        with attention.computed_by(self._attention):
            tokens = model.encode_frames(normalize(frames[0]))
            features = tokens.reshape(1, len(frames[0]), -1, tokens.shape[-1])
            return merge_params(self.encoder.graphdef, params).push(last, features, times, jnp.ones(1, bool))

    # ---- questions ---------------------------------------------------------------------------------------------

    def ask(self, question: str, suffix: str = prompts.LETTER_SUFFIX) -> dict:
        """The answer to a question (with its options, one a line) from what was seen so far, as `stream` reports it.

        Frames of a clip that is not full count too: they are encoded as one, and forgotten again. Raises ValueError for
        an empty question, and where nothing was seen yet.
        """
        prompt = prompts.render(question, self.answerer.template, suffix)
        with self._lock:
            remembered, pending = self.remembered, list(self._pending)
        if pending:
            remembered = self._with(remembered, pending)
        if not remembered.times:
            raise ValueError("nothing was seen yet: there is no clip to answer from")
        K, cfg = len(remembered.times), self.encoder.config
        room = _ROOM * 2 ** max(0, (-(-K // _ROOM) - 1).bit_length())
        memories = np.zeros((1, room, *remembered.last.shape), np.float32)
        indicators = np.zeros((1, room, cfg.width), np.float32)
        memories[0, :K], indicators[0, :K] = remembered.memories, remembered.indicators
        pad = self.answerer.generation.pad_token_id
        words, word_lengths = prompts.pad([question_tokens(question, self.answerer)], pad, _TOKENS)
        ids, lengths = prompts.pad([prompts.tokenize(prompt, self.answerer.tokenizer)], pad, _TOKENS)
        stream = Memories(memories, indicators, remembered.last[None])
        is_clip = np.arange(room)[None] < K
        text = words, word_lengths, ids, lengths
        tokens, length, scores, picks = self._answer(self.encoder.params, self.answerer.params, stream, is_clip, *text)
        answer = prompts.decode(np.asarray(tokens), np.asarray(length), self.answerer.tokenizer)[0]
        options = split_options(question)[1]
        picks = [pick for pick in np.asarray(picks)[0].tolist() if pick < K]
        return {
            "question": question,
            "answer": answer,
            "option": stated_letter(answer, options) if options else None,
            "clips": [list(remembered.times[pick]) for pick in picks],
            "scores": [round(float(np.asarray(scores)[0, pick]), 4) for pick in picks],
            "num_clips": K,
            "seconds_seen": remembered.times[-1][1],
            "num_visual_tokens": cfg.num_visual_tokens,
        }

    def _traced_answer(self, params, frozen, stream, is_clip, words, word_lengths, ids, lengths):
        encoder, model = merge_params(self.encoder.graphdef, params), merge_params(self.answerer.graphdef, frozen)
        with attention.computed_by(self._attention):
            chosen = encoder.select(model.language_model.embed_tokens(words), word_lengths, stream, is_clip)
            visual = encoder.visual_tokens(chosen.memories, stream.last)
            text = model.language_model.embed_tokens(jnp.maximum(ids, 0))
            x = splice(text, visual[:, None].astype(text.dtype), ids)
            logits, cache, places = model.prefill(text_prompt(x, lengths + visual.shape[1] - 1))
            decode = partial(greedy_decode, model.decode, logits, cache.extend(self._max_new_tokens), places)
            tokens, length, *_ = decode(self.answerer.generation, self._max_new_tokens)
        return tokens, length, chosen.scores, chosen.picks


# ---- saved memories ------------------------------------------------------------------------------------------------


def path_of(store: str | Path, encoder: Encoder, video: str) -> Path:
    """Where the memory of a stored video lies."""
    return Path(store) / "streams" / encoder.identity / (video + ".safetensors")


def save(path: str | Path, remembered: Remembered, encoder: Encoder, video: str = "") -> None:
    """Writes what is remembered; the file appears whole or not at all. `video` tells the content that it is of."""
    tensors = {
        "last": remembered.last,
        "memories": np.stack(remembered.memories) if remembered.memories else np.zeros((0, *remembered.last.shape)),
        "indicators": np.stack(remembered.indicators) if remembered.indicators else np.zeros((0, encoder.config.width)),
        "times": np.array(remembered.times, np.float64).reshape(-1, 2),
    }
    metadata = {"encoder": encoder.identity, "video": video, "config": json.dumps(dataclasses.asdict(encoder.config))}
    metadata["seconds"] = repr(remembered.seconds)
    frame_store.publish(Path(path), lambda partial_path: save_file(tensors, partial_path, metadata))


def load(path: str | Path, encoder: Encoder, video: str = "") -> Remembered:
    """What was remembered. Raises ValueError for a damaged file, and for memories of another encoder or video."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("last", "memories", "indicators", "times")}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is no saved memory of a stream ({error})") from error
    if metadata.get("encoder") != encoder.identity:
        raise ValueError(
            f"{path}: holds memories of another encoder or answerer ({metadata.get('encoder')}, not "
            f"{encoder.identity}); encode the video again"
        )
    if video and metadata.get("video") != video:
        raise ValueError(f"{path}: holds memories of another video of this name; encode it again")
    K, memory = len(tensors["times"]), (encoder.config.summary, encoder.config.width)
    shapes = {"last": memory, "memories": (K, *memory), "indicators": (K, memory[1]), "times": (K, 2)}
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: damaged: {name} is {list(tensors[name].shape)}, not {list(shape)}")
    times = tuple((float(start), float(end)) for start, end in tensors["times"])
    # A file of an earlier version does not tell when its last frame was; not before its clip began.
    seconds = float(metadata.get("seconds", times[-1][0] if times else 0.0))
    return Remembered(tensors["last"], tuple(tensors["memories"]), tuple(tensors["indicators"]), times, seconds)
