"""The few shapes that prompts are padded to. A program is compiled for each shape, and what is padded is computed for
nothing: this is the one place that weighs the two.

A prompt has K frames and N tokens of text. Where all that will be asked is known before the first answer, both get a
ladder of at most RUNGS lengths, of which a prompt takes the least that holds it; for a lone request N is rounded up.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.models.video_prompt import FrameTimes

MULTIPLE = 32  # tokens: prompts are padded to a multiple of it
RUNGS = 3
WORTH = 0.1  # of all that is computed: the least that one more length must save, to be worth a program


def ladder(
    lengths: Iterable[int], multiple: int = 1, beside: float = 0, together: int = 1, rungs: int = RUNGS
) -> tuple[int, ...]:
    """At most `rungs` lengths, ascending, the last of which holds all; () of nothing.

    Args:
      lengths: of all that will be asked.
      multiple: lengths are rounded up to it.
      beside: what is computed with each besides its length, in the same unit.
      together: how many of `lengths` one batch holds, drawn by chance; it takes the least rung that holds all of them.
    """
    lengths = np.fromiter(lengths, int)
    sizes = np.unique(-(-lengths // multiple) * multiple).tolist()

    def cost(rungs: Sequence[int]) -> float:
        return float(chances(lengths, rungs, together) @ (np.array(rungs) + beside))

    chosen = sizes[-1:]
    while len(chosen) < min(rungs, len(sizes)):
        more = min((sorted([*chosen, size]) for size in sizes if size not in chosen), key=cost)
        if cost(more) > (1 - WORTH) * cost(chosen):
            break
        chosen = more
    return tuple(chosen)


def chances(lengths: Iterable[int], rungs: Sequence[int], together: int = 1) -> np.ndarray:
    """How likely each rung is to be the least one that holds all `lengths` of a batch: float [rungs]."""
    below = np.searchsorted(np.sort(np.asarray(lengths)), rungs, side="right") / len(lengths)
    return np.diff(below**together, prepend=0)


def least(rungs: Iterable[int], length: int) -> int:
    """The least rung that holds `length`; where none does, that itself."""
    return min((rung for rung in rungs if rung >= length), default=length)


def rounded_up(tokens: int) -> int:
    """N where nobody knows what else will be asked: MULTIPLE times a power of two."""
    return MULTIPLE * 2 ** max(0, (-(-tokens // MULTIPLE) - 1).bit_length())


def text_tokens(rendered: Iterable[str], answerer: Answerer, num_frames: int, latest: float) -> np.ndarray:
    """Tokens int [Q] that rendered prompts take at most with so many frames, each place of visual tokens being one: the
    times that take the most words are the latest, in seconds."""
    times = FrameTimes.of([latest] * num_frames, latest)
    write, tokenizer = answerer.config.write_times, answerer.tokenizer
    return np.array([len(prompts.tokenize(write(text, times), tokenizer)) for text in rendered], int)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Of requests that will be made.

    Attributes:
      frames: ladder of K; () = each number of frames is a shape of its own.
      texts: K of that ladder -> ladder of N.
    """

    frames: tuple[int, ...] = ()
    texts: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        answerer: Answerer,
        rendered: Sequence[str],
        num_frames: Iterable[int],
        latest: float,
        visual_tokens: Callable[[int], int],
        rungs: int = RUNGS,
    ) -> "Shapes":
        """Shapes for rendered prompts.

        Args:
          num_frames: of all requests.
          latest: seconds; no frame is later.
          visual_tokens: K -> visual tokens of a prompt.
          rungs: most numbers of frames. An answerer that merges frames (answerer.video.merge) would merge padding with
            them: there each number is a shape of its own.
        """
        num_frames = list(num_frames)
        frames = () if answerer.config.video.merge else ladder(num_frames, rungs=rungs)
        texts = {
            k: ladder(text_tokens(rendered, answerer, k, latest), MULTIPLE, visual_tokens(k))
            for k in frames or set(num_frames)
        }
        return cls(frames, texts)

    def num_frames(self, k: int) -> int:
        """Places for k frames."""
        return least(self.frames, k)

    def num_tokens(self, k: int, tokens: int) -> int:
        """Places for so many tokens of text, in a prompt with places for k frames."""
        rungs = self.texts.get(k)
        return -(-least(rungs, tokens) // MULTIPLE) * MULTIPLE if rungs else rounded_up(tokens)
