"""Four-option questions about a toy video, as rows of a TSPO-10K jsonl file.

Beyond the keys of TSPO-10K a row holds `family` ("lookup", "position" or "relation") and `evidence`, the spans of
the scenes that one must have seen: [[start, end], ...] in seconds, together at most 5 % of the video.
"""

from collections.abc import Sequence

import numpy as np

from tspo_jax.toy.scenes import Scene, VideoPlan
from tspo_jax.toy.settings import SETTINGS
from tspo_jax.toy.sprites import BALLS

_STREAM = 2**32 - 1  # keeps the questions' random numbers apart from those of the frames, which count from 0


def questions_for(plan: VideoPlan, video: str, num_specific: int = 0) -> list[dict]:
    """The questions of a video, a function of its plan; `video` is its path in the rows.

    Of kind "general": one lookup per plan.lookup_things, two positions, one relation per plan.relation_things.
    Of kind "specific" (for needle samples): num_specific lookups that name the setting, so that the frames of this
    video can be told from those of others. Raises ValueError for more of them than the video has events.
    """
    rng = np.random.default_rng((plan.seed, _STREAM))
    events = [scene for scene in plan.scenes if scene.kind == "event"]
    things = [scene.thing for scene in events]
    if num_specific > len(events):
        raise ValueError(f"num_specific is {num_specific}, but {video} has {len(events)} events only")

    def lookup(scene: Scene, place: str, kind: str) -> dict:
        stem = f"hat colour is the ball shown with the {scene.thing}?"
        stem = f"{place.capitalize()}, w{stem}" if place else f"W{stem}"
        return _row(rng, video, kind, "lookup", stem, scene.ball, list(BALLS), [scene])

    rows = [lookup(plan.scenes[plan.event(thing)], "", "general") for thing in plan.lookup_things]
    for moment, scene in (("beginning", plan.scenes[0]), ("end", plan.scenes[-1])):
        stem = f"What is shown at the {moment} of the video?"
        rows.append(_row(rng, video, "general", "position", stem, scene.thing, things, [scene]))
    for thing in plan.relation_things:
        i = plan.event(thing)
        others = [other for other in things if other != thing]
        stem = f"What is shown right after the {thing}?"
        evidence = plan.scenes[i : i + 2]
        rows.append(_row(rng, video, "general", "relation", stem, evidence[1].thing, others, evidence))
    asked = rng.choice(len(events), num_specific, replace=False)
    return rows + [lookup(events[i], SETTINGS[plan.setting], "specific") for i in asked]


def _row(
    rng: np.random.Generator,
    video: str,
    kind: str,
    family: str,
    stem: str,
    answer: str,
    vocabulary: Sequence[str],
    evidence: Sequence[Scene],
) -> dict:
    """One question: the answer among three other words of the vocabulary, in random order."""
    wrong = rng.choice([word for word in vocabulary if word != answer], 3, replace=False)
    options = [str(option) for option in rng.permutation([answer, *wrong])]
    letter = "ABCD"[options.index(answer)]
    lines = [f"{a}. {option}" for a, option in zip("ABCD", options, strict=True)]
    return {
        "video": video,
        "original_question": "\n".join(["<image>", stem, *lines]),
        "original_answer": f"{letter}. {answer}",
        "problem": f"<image>\n{stem}",
        "solution": f"<answer>{letter.lower()}</answer>",
        "complete_answer": f"{letter}. {answer}",
        "type": kind,
        "family": family,
        "evidence": [[scene.start, scene.end] for scene in evidence],
    }
