"""Few lengths of prompts: which ones pay, and what they are for requests of several numbers of frames."""

import dataclasses

import numpy as np
import pytest

from tspo_jax.answering import prompts
from tspo_jax.answering.shapes import Shapes, chances, ladder, least, rounded_up
from tspo_jax.checkpoints.folders import load_answerer


def test_one_long_prompt_does_not_set_the_length_of_all():
    lengths = [60] * 999 + [1000]
    assert ladder(lengths, multiple=32) == (64, 1024)
    assert ladder(lengths, multiple=32, beside=3359) == (64, 1024)
    assert ladder(lengths, multiple=32, beside=20_000) == (1024,), "with many frames it does not count"


def test_lengths_that_hardly_differ_are_one():
    assert ladder(range(200, 210)) == (209,) and ladder([7]) == (7,) and ladder([]) == ()


def test_the_last_rung_holds_all_and_there_are_few():
    rng = np.random.default_rng(0)
    for most in (1, 2, 3, 5):
        lengths = rng.integers(1, 1000, 50)
        rungs = ladder(lengths, multiple=8, rungs=most)
        assert len(rungs) <= most and rungs[-1] >= lengths.max() and list(rungs) == sorted(set(rungs))
        assert all(rung % 8 == 0 for rung in rungs)


def test_a_further_rung_saves_what_it_must():
    """Of 10 * 14 frames, 9 saves 25; the third would save too little (7: 6 of 115)."""
    lengths = range(5, 15)
    assert ladder(lengths) == (9, 14)
    padded = sum(least(ladder(lengths), n) for n in lengths)
    assert padded == 5 * 9 + 5 * 14


def test_chances_of_a_batch():
    """One of ten is long: of batches of four drawn by chance, 0.9 ** 4 hold none."""
    lengths = [10] * 9 + [100]
    np.testing.assert_allclose(chances(lengths, (10, 100), together=4), [0.9**4, 1 - 0.9**4])
    drawn = np.random.default_rng(0).choice(lengths, (20_000, 4)).max(axis=1)
    assert np.mean(drawn == 10) == pytest.approx(0.9**4, abs=0.02)
    assert ladder([10] * 9 + [100]) == (10, 100) and ladder([10] * 9 + [100], together=64) == (100,)


def test_a_lone_request_is_rounded_up():
    assert [rounded_up(n) for n in (1, 32, 33, 64, 65, 1000)] == [32, 32, 64, 64, 128, 1024]


def test_shapes_of_an_answerers_prompts(golden):
    answerer = load_answerer(golden / "llava_video_grid")
    rendered = [prompts.render("Why?"), prompts.render("Why " * 300 + "?")]
    tokens = [len(prompts.tokenize(text, answerer.tokenizer)) for text in rendered]
    asked = Shapes.of(answerer, rendered, [5, 5, 5, 64, 64], 90.0, lambda k: 10 * k)
    assert asked.frames == (5, 64) and [asked.num_frames(k) for k in (1, 5, 6, 64, 65)] == [5, 5, 64, 64, 65]
    assert [asked.num_tokens(5, n) for n in tokens] == [-(-n // 32) * 32 for n in tokens]
    assert asked.num_tokens(5, tokens[1] + 100) >= tokens[1] + 100, "more than was told before is no error"
    assert asked.num_tokens(7, 70) == 128, "a number of frames that was not told before"

    video = dataclasses.replace(answerer.config.video, merge=(1, 1))
    merging = dataclasses.replace(answerer, config=dataclasses.replace(answerer.config, video=video))
    assert Shapes.of(merging, rendered, [5, 64], 90.0, lambda k: 10 * k).frames == ()
