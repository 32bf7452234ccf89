import json
from collections import Counter

import numpy as np
import pytest

from tspo_jax.toy.questions import questions_for
from tspo_jax.toy.scenes import World, make_video_plan
from tspo_jax.toy.settings import SETTINGS
from tspo_jax.toy.sprites import BALLS

PLANS = [make_video_plan(seed, World()) for seed in range(150)]
ROWS = [(plan, row) for plan in PLANS for row in questions_for(plan, f"videos/{plan.seed}.mp4", num_specific=3)]


def _answer(row: dict) -> str:
    return row["original_answer"].split(". ", 1)[1]


def test_rows_have_the_tspo_10k_form(annotations):
    example = json.loads((annotations / "tspo_10k_format.jsonl").read_text().splitlines()[0])
    for plan, row in ROWS:
        assert set(row) == set(example) | {"family", "evidence"}
        assert row["video"] == f"videos/{plan.seed}.mp4"


def test_options_and_letters_agree():
    for _, row in ROWS:
        tag, stem, *options = row["original_question"].split("\n")
        assert f"{tag}\n{stem}" == row["problem"] and tag == "<image>"
        assert [option[:3] for option in options] == ["A. ", "B. ", "C. ", "D. "]
        words = [option[3:] for option in options]
        assert len(set(words)) == 4 and words.count(_answer(row)) == 1
        assert row["original_answer"] in options
        assert row["solution"] == f"<answer>{row['original_answer'][0].lower()}</answer>"


def test_letters_and_colours_are_uniform():
    """Four standard deviations of a fair draw: guessing a letter or a colour gains nothing."""
    letters = Counter(row["solution"] for _, row in ROWS)
    colors = Counter(_answer(row) for _, row in ROWS if row["family"] == "lookup")
    for counts, sides in ((letters, 4), (colors, len(BALLS))):
        n, p = sum(counts.values()), 1 / sides
        assert len(counts) == sides
        assert max(abs(count - n * p) for count in counts.values()) < 4 * np.sqrt(n * p * (1 - p))


def test_evidence_is_short_and_shows_the_answer():
    for plan, row in ROWS:
        spans = row["evidence"]
        assert sum(end - start for start, end in spans) <= 0.05 * plan.duration
        scenes = [plan.scenes[plan.scene_index((start + end) / 2)] for start, end in spans]
        assert [[scene.start, scene.end] for scene in scenes] == spans
        stem = row["problem"]
        if row["family"] == "lookup":
            assert stem.endswith(f"ball shown with the {scenes[0].thing}?") and _answer(row) == scenes[0].ball
        elif "beginning" in stem:
            assert spans[0][0] == 0 and _answer(row) == scenes[0].thing
        elif "end of the video" in stem:
            assert spans[0][1] == plan.duration and _answer(row) == scenes[0].thing
        else:
            assert row["family"] == "relation" and stem.endswith(f"right after the {scenes[0].thing}?")
            assert scenes[0].end == scenes[1].start and _answer(row) == scenes[1].thing


def test_wrong_things_are_shown_elsewhere_in_the_video():
    for plan, row in ROWS:
        if row["family"] != "lookup":
            words = {line[3:] for line in row["original_question"].split("\n")[2:]}
            assert words <= {scene.thing for scene in plan.scenes}
            assert all(word not in row["problem"] for word in words if row["family"] == "relation")


def test_kinds_and_families():
    assert Counter((row["type"], row["family"]) for _, row in ROWS) == {
        ("general", "lookup"): 4 * len(PLANS),
        ("general", "position"): 2 * len(PLANS),
        ("general", "relation"): 2 * len(PLANS),
        ("specific", "lookup"): 3 * len(PLANS),
    }
    for plan, row in ROWS:
        if row["type"] == "specific":
            assert row["problem"].startswith(f"<image>\n{SETTINGS[plan.setting].capitalize()}, what colour is")


def test_no_question_is_asked_twice():
    assert len({(row["video"], row["problem"]) for _, row in ROWS}) == len(ROWS)


def test_questions_are_a_function_of_the_plan():
    assert questions_for(PLANS[3], "a.mp4", 2) == questions_for(make_video_plan(3, World()), "a.mp4", 2)
    assert questions_for(PLANS[3], "a.mp4") == questions_for(PLANS[3], "a.mp4", 2)[:8]


def test_too_many_specific_questions_are_refused():
    with pytest.raises(ValueError, match="num_specific is 99, but a.mp4"):
        questions_for(PLANS[0], "a.mp4", 99)
