"""Names of the objects that a question is about, read from a Video-MLLM's answer (T*'s grounding)."""

import re
from collections.abc import Sequence

from tspo_jax.selection.tstar import objects

NUM_FRAMES = 8  # of the video that the model is shown
MAX_NEW_TOKENS = 128  # of two lines of four names each; the published code allows 512
MAX_TARGETS, MAX_CUES = 4, 4  # a fixed number of texts for the detector
_HEADING = re.compile(r"^(?:\W*\d+\s*[.)]|[*\-•#]+|\W*(?:key|cue|target)s?\s*(?:objects?)?\**\s*:)\s*", re.IGNORECASE)
_NOTHING = {"none", "n/a", "na", "nothing", "no cue", "no objects"}


def frame_numbers(num_frames: int) -> list[int]:
    """The frames that are shown, of a video of `num_frames`: evenly spaced, the first but not the last among them."""
    count = min(NUM_FRAMES, num_frames)
    return [i * num_frames // count for i in range(count)]


def request(question: str, options: Sequence[str] = ()) -> str:
    """The user's text that asks for targets and cues."""
    choices = [f"Options: {'; '.join(options)}"] if options else []
    return "\n".join(
        [
            "These frames are from a longer video. Someone will look in it for the frames that answer a question.",
            f"Question: {question}",
            *choices,
            "1. Which objects must be seen to answer it? Name at most four that a detector could find.",
            "2. Which other objects are likely to be near them in the same scenes? Name at most four.",
            "Reply with two lines of names separated by commas and nothing else: first the key objects, then the cue "
            "objects.",
        ]
    )


def parse(response: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Targets and cues of an answer of two lines (headings on lines of their own apart), at most four of each.

    Headings, numbering and marks are taken off; empty names, "none" and repetitions are left out, and cues that are
    targets.

    Raises: ValueError where the answer has another form or names no target.
    """
    lines = [line for line in map(_without_headings, response.splitlines()) if line]
    if len(lines) != 2:
        raise ValueError(f"the answer has {len(lines)} lines of names, not two: {response!r:.120}")
    targets, cues = objects(*([name for name in map(_name, line.split(",")) if name] for line in lines))
    if not targets:
        raise ValueError(f"the answer names no object: {response!r:.120}")
    return targets[:MAX_TARGETS], cues[:MAX_CUES]


def _without_headings(text: str) -> str:
    text = text.strip()
    while (shorter := _HEADING.sub("", text, count=1).strip()) != text:
        text = shorter
    return text


def _name(text: str) -> str:
    name = re.sub(r"[^\w\s'-]", "", _without_headings(text)).strip(" -'").lower()
    return "" if name in _NOTHING else " ".join(name.split())


# ---- the released rules, for comparison --------------------------------------------------------------------


def parse_released(response: str) -> tuple[list[str], list[str]]:
    """Targets and cues as the published code reads them, slips included. Raises ValueError unless there are two lines
    that are not empty."""
    lines = [line for line in map(str.strip, response.split("\n")) if line]
    if len(lines) != 2:
        raise ValueError(f"the answer has {len(lines)} lines, not two: {response!r:.120}")
    return tuple([name_released(piece) for piece in line.split(",") if piece.strip()] for line in lines)


def name_released(piece: str) -> str:
    """A name as the published code normalises it."""
    name = piece.strip().lower()
    name = re.sub(r"^(?:key objects|cue objects)?[:\-]?\s*", "", name)
    for heading in ("key objects: ", "cue objects: ", ": "):
        name = name.replace(heading, "")
    name = re.sub(r"^\d+\.\s*", "", name)
    return re.sub(r"[^\w\s-]", "", name).strip()
