"""What a page shows of a question about one's own video."""

import dataclasses

import numpy as np
import pytest
import tiny_store

from tspo_jax.checkpoints.folders import load_agent
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.pages import video_page
from tspo_jax.selection import scoring
from tspo_jax.selection.video_source import stored_source


@pytest.fixture(scope="module")
def store(golden, tmp_path_factory):
    return tiny_store.make_store(tmp_path_factory.mktemp("store"), golden)


def test_each_method_shows_its_own_frames(golden, store):
    scorer = scoring.load_scorer(golden / "tspo_agent")
    source = stored_source(FrameStore(store, scorer.clip.identity), tiny_store.LONG)
    shown = video_page.example(scorer, source, "Who?\nA. a cat\nB. a dog", 4, {"aks": "B"})
    assert (shown.query, list(shown.options)) == ("Who?", ["a cat", "a dog"])
    assert [choice.colour for choice in shown.choices] == video_page.methods_of(scorer)
    assert scoring.SPAN not in video_page.methods_of(scorer)
    assert [choice.answer for choice in shown.choices] == [None, None, "B", None, None]
    candidates = source.candidates()
    clip_scores, scores = scorer.ask(candidates.features, "Who?")
    for choice in shown.choices:
        picks = scoring.pick(choice.colour, clip_scores, scores, 4)
        assert choice.times == candidates.timestamps[picks].tolist()
        np.testing.assert_array_equal(choice.frames, source.pictures(picks))
    for curve in (shown.before, shown.after):
        assert (curve.mean(), curve.std()) == pytest.approx((0, 1), abs=1e-5)


def test_an_agent_that_predicts_spans_shows_its_span(golden, store):
    scorer = dataclasses.replace(
        scoring.load_scorer(golden / "tspo_agent"), agent=load_agent(golden / "tspo_agent", kind="span")
    )
    source = stored_source(FrameStore(store, scorer.clip.identity), tiny_store.LONG)
    choice = video_page.example(scorer, source, "Who?", 4).choices[video_page.methods_of(scorer).index(scoring.SPAN)]
    candidates = source.candidates()
    first, last = scorer.span(candidates.features, scorer.clip.text_features(["Who?"])[0])
    assert choice.colour == scoring.SPAN and len(choice.times) == 4
    assert set(candidates.timestamps[first : last + 1][:4].tolist()) & set(choice.times)


def test_without_an_agent_its_methods_and_its_curve_are_left_out(golden, store):
    scorer = dataclasses.replace(scoring.load_scorer(golden / "tspo_agent"), agent=None)
    source = stored_source(FrameStore(store, scorer.clip.identity), tiny_store.SHORT)
    shown = video_page.example(scorer, source, "Who?", 2)
    assert [choice.colour for choice in shown.choices] == ["clip-topk", "uniform"]
    assert shown.after is None and [colour for colour, _ in shown.chart().keys] == ["clip-topk", "clip-topk", "uniform"]
