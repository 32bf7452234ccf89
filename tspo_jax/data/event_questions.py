"""Needle questions from descriptions of events: which other event is in the video that shows this one?

The stem holds the description of one event of the target, so that it tells the target's frames from those of the other
videos of a needle sample, which a question such as "What happens at the end?" does not (TSPO, section on the
needle-in-a-haystack data). The right option describes another event of the target, the three wrong ones describe events
of other videos.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from tspo_jax.data.questions import row

NUM_OPTIONS = 4


def event_question(target: str, descriptions: Mapping[str, Sequence[str]], seed: int) -> dict | None:
    """A TSPO-10K row of type `specific` about the video `target`; a function of its arguments.

    Args:
      descriptions: of the events of every video.
    Returns: None where the target has no two different descriptions, or other videos do not have three that differ
      from the target's and from each other.
    """
    rng = np.random.default_rng((seed, int(hashlib.sha256(target.encode()).hexdigest()[:15], 16)))
    own = _different(descriptions[target])
    others = _different([text for video in sorted(descriptions) if video != target for text in descriptions[video]])
    wrong = [text for text in others if _plain(text) not in {_plain(text) for text in own}]
    if len(own) < 2 or len(wrong) < NUM_OPTIONS - 1:
        return None
    shown, right = rng.permutation(own)[:2].tolist()
    options = [right, *rng.choice(wrong, NUM_OPTIONS - 1, replace=False).tolist()]
    order = rng.permutation(NUM_OPTIONS).tolist()
    stem = f"One scene of the video: {shown.rstrip('.')}. What else does this video show?"
    answer = chr(ord("A") + order.index(0))
    return row(f"needle/{target}", target, stem, [options[i] for i in order], answer, "specific")


def _plain(text: str) -> str:
    return text.lower().rstrip(". ")


def _different(texts: Sequence[str]) -> list[str]:
    """On one line each, the first of those that differ only in case or full stop, without empty ones."""
    lines = (" ".join(text.split()) for text in texts)
    return list({_plain(line): line for line in reversed(list(lines)) if _plain(line)}.values())[::-1]
