"""Needle questions from descriptions of events: which other event is in the video that shows this one?

The stem holds the description of one event of the target, so that it tells the target's frames from those of the other
videos of a needle sample, which a question such as "What happens at the end?" does not (TSPO, section on the
needle-in-a-haystack data). The right option describes another event of the target, the three wrong ones describe events
of other videos.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tspo_jax.data.questions import row

NUM_OPTIONS = 4


def event_questions(descriptions: Mapping[str, Sequence[str]], seed: int) -> Iterator[dict]:
    """TSPO-10K rows of type `specific`, one about every video in the order of their names.

    Left out are videos that have no two different descriptions, and those for which other videos do not have three that
    differ from theirs and from each other.

    Args:
      descriptions: of the events of every video.
    """
    of_video = {video: _different(descriptions[video]) for video in sorted(descriptions)}
    events = [text for texts in of_video.values() for text in texts]
    for target, own in of_video.items():
        rng = np.random.default_rng((seed, int(hashlib.sha256(target.encode()).hexdigest()[:15], 16)))
        taken, wrong = {_plain(text) for text in own}, []
        for i in rng.permutation(len(events)):
            if _plain(events[i]) not in taken:
                taken.add(_plain(events[i]))
                wrong.append(events[i])
            if len(wrong) == NUM_OPTIONS - 1:
                break
        if len(own) > 1 and len(wrong) == NUM_OPTIONS - 1:
            shown, right = rng.permutation(own)[:2].tolist()
            order = rng.permutation(NUM_OPTIONS).tolist()
            stem = f"One scene of the video: {shown.rstrip('.')}. What else does this video show?"
            options, answer = [right, *wrong], chr(ord("A") + order.index(0))
            yield row(f"needle/{target}", target, stem, [options[i] for i in order], answer, "specific")


def _plain(text: str) -> str:
    return text.lower().rstrip(". ")


def _different(texts: Sequence[str]) -> list[str]:
    """On one line each, the first of those that differ only in case or full stop, without empty ones."""
    lines = (" ".join(text.split()) for text in texts)
    return list({_plain(line): line for line in reversed(list(lines)) if _plain(line)}.values())[::-1]
