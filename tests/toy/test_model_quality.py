from types import SimpleNamespace

import numpy as np
import pytest
from toy_bank import reader

from tspo_jax.data.questions import question_of_row
from tspo_jax.toy import model_quality
from tspo_jax.toy.model_quality import candidate_times, measure
from tspo_jax.toy.questions import questions_for
from tspo_jax.toy.scenes import World, make_video_plan, video_seed
from tspo_jax.toy.tiny_answerers import TINY_ANSWERERS

SEEDS = [video_seed("models", 2, i) for i in range(3)]
PLANS = [make_video_plan(seed, World()) for seed in SEEDS]


def test_candidate_times_are_one_a_second():
    for plan in PLANS:
        times = candidate_times(plan)
        assert times[0] == 0 and plan.duration - 1.2 < times[-1] < plan.duration
        np.testing.assert_allclose(np.diff(times), float(round(plan.fps) / plan.fps), rtol=1e-9)


class FallingClip:
    """Frames' cosines with any text fall evenly over the video, so top-k takes its beginning."""

    def image_features(self, frames):
        cosines = np.linspace(0.5, 0.1, len(frames))
        return np.stack([cosines, np.sqrt(1 - cosines**2)], 1).astype(np.float32)

    def text_features(self, texts):
        return np.tile(np.float32([2, 0]), (len(texts), 1))


@pytest.fixture
def oracle(monkeypatch):
    """Frames that are their own time; a set is answered where it holds a frame of each span of the evidence."""
    monkeypatch.setattr(model_quality, "render_frame", lambda plan, time: np.float64(time))
    monkeypatch.setattr(model_quality.Rollout, "of", lambda answerer, **options: None)
    sizes = []

    def answers(rollout, answerer, sets):
        right = []
        for frames, times, question in sets:
            np.testing.assert_array_equal(frames, times)
            assert len(np.unique(frames)) == len(frames) and np.all(np.diff(frames) > 0)
            seen = [any(start <= time < end for time in frames) for start, end in question.evidence]
            right.append(float(all(seen)))
            sizes.append((len(frames), sum(start <= t < end for t in frames for start, end in question.evidence)))
        return right

    monkeypatch.setattr(model_quality, "_answers", answers)
    return SimpleNamespace(processor=SimpleNamespace(crop=lambda frame: frame), sizes=sizes)


@pytest.mark.parametrize("num_frames", [4, 8])
def test_sets_hold_the_evidence_or_nothing_of_it(oracle, num_frames):
    quality = measure(FallingClip(), oracle, SEEDS, World(), num_frames)
    rows = [question_of_row(row, 0, "", None) for plan in PLANS for row in questions_for(plan, "a.mp4")]
    assert set(quality["families"]) == {"lookup", "position", "relation"}
    for family, measured in quality["families"].items():
        assert measured["questions"] == sum(row.family == family for row in rows)
        assert measured["with_evidence"] == 1 and measured["without_evidence"] == 0
    assert {size for size, _ in oracle.sizes} == {num_frames}
    with_evidence = [seen for _, seen in oracle.sizes[: quality["families"]["lookup"]["questions"]]]
    assert min(with_evidence) >= 1 and max(with_evidence) <= num_frames // 2
    # The beginning is what this CLIP finds; its scene is long enough for one candidate at least.
    assert 0.5 <= quality["families"]["position"]["clip_topk_finds"] < 1
    assert quality["families"]["position"]["clip_topk"] == quality["families"]["position"]["clip_topk_finds"]
    assert quality["families"]["lookup"]["clip_topk_finds"] < 0.5
    spreads = [np.linspace(0.5, 0.1, len(candidate_times(plan))).std() for plan in PLANS]
    np.testing.assert_allclose(quality["spread"], np.mean(spreads), rtol=1e-5)


@pytest.mark.parametrize("name", list(TINY_ANSWERERS))
def test_answers_come_back_in_order_whatever_the_batch(name):
    """An answerer that says the letter of its first frame's number, asked 7 questions in batches of 3."""
    answerer = reader(name)
    tokenizer = answerer.tokenizer
    letters = [tokenizer(letter)["input_ids"][0] for letter in "ABCD"]
    shapes, told = [], []

    def rollout(params, frames, index, ids, lengths, options, steps):
        shapes.append((frames.shape, index.shape, ids.shape[:2], lengths.shape))
        assert options is None and steps is None  # both families' times are in the text, or nowhere
        np.testing.assert_array_equal(index[:, 0], np.tile(np.arange(2), (3, 1)))
        assert all(row[0, length[0] - 1] != 0 for row, length in zip(ids, lengths, strict=True))
        told.extend(
            tokenizer.decode(np.maximum(row[0, : length[0]], 0)) for row, length in zip(ids, lengths, strict=True)
        )
        tokens = [[[letters[frame.flat[0] % 4], tokenizer.eos_token_id]] for frame in frames[:, 0]]
        return SimpleNamespace(tokens=np.array(tokens), lengths=np.full((3, 1), 2))

    rows = [row for plan in PLANS for row in questions_for(plan, "a.mp4")]
    rows = [question_of_row(row, i, "", None) for i, row in enumerate(rows[:7])]
    times = [np.array([i, 20.0 + i]) for i in range(7)]
    sets = [(np.full((2, 4, 4, 3), i, np.uint8), times[i], question) for i, question in enumerate(rows)]
    right = model_quality._answers(rollout, answerer, sets, batch_size=3)
    assert right == [float("ABCD"[i % 4] == row.answer) for i, row in enumerate(rows)]
    assert 0 < sum(right) < 7
    assert shapes == [((3, 2, 4, 4, 3), (3, 1, 2), (3, 1), (3, 1))] * 3
    for i, text in enumerate(told[:7]):
        assert ((f"<{i}.0 seconds>" in text) and (f"<{20 + i}.0 seconds>" in text)) == (name == "qwen3_vl")
