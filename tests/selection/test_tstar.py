import numpy as np
import pytest
from scripted_search import detector, look

from tspo_jax.selection.search_options import SearchOptions
from tspo_jax.selection.search_rounds import spread
from tspo_jax.selection.tstar import mixed_draw, not_searched, random_draw, search

SMALL = dict(picture_size=64)


def boxes(spans, confidence=0.9, cue=None, alone=None):
    """Target 0 inside of `spans`, a cue (text 1) inside of `cue`; `alone` is the confidence in a frame alone."""

    def of(second, is_alone, cell):
        x, y, width, height, *_ = cell
        box = (x, y, x + width, y + height)
        found = []
        if any(a <= second <= b for a, b in spans):
            found.append((*box, 0, alone if alone is not None and is_alone else confidence))
        if cue and cue[0] <= second <= cue[1]:
            found.append((*box, 1, 0.8))
        return found

    return of


def find(num_seconds, boxes_of, k=8, targets=("cat",), cues=(), rng=None, **options):
    settings = SearchOptions(**SMALL | options)
    detect = detector(boxes_of, len(targets) + len(cues) + 1, settings.grid)
    return search(num_seconds, look, detect, targets, cues, k, settings, rng)


@pytest.mark.parametrize("schedule", ["mix", "random"])
def test_a_target_is_found_and_returned(schedule):
    found = find(600, boxes([(300, 340)]), schedule=schedule, share=1.0)
    assert not found.rounds[-1].remaining and not found.fallback
    assert found.num_frames == 16 * len(found.rounds) < 600
    assert found.num_detections == len(found.rounds) + sum(len(r.verified) for r in found.rounds)
    assert all(295 <= second <= 345 for second in found.picks) and len(found.picks) == 8
    (second,) = (v.second for v in found.rounds[-1].verified if v.removed == 0)
    assert 300 <= second <= 340 and second in found.picks


@pytest.mark.parametrize("schedule", ["mix", "random"])
def test_no_frame_is_looked_at_twice(schedule):
    found = find(100, boxes([]), schedule=schedule, share=1.0)
    sampled = np.concatenate([r.sampled for r in found.rounds])
    assert len(sampled) == len(set(sampled.tolist())) == 100 == found.num_frames
    assert [len(r.sampled) for r in found.rounds] == [16] * 6 + [4]  # the last grid is not full


def test_only_what_is_looked_at_is_read():
    read = []

    def watched(seconds):
        read.extend(int(s) for s in seconds)
        return look(seconds)

    options = SearchOptions(**SMALL, share=0.1)
    found = search(3600, watched, detector(boxes([]), 2, options.grid), ["cat"], [], 8, options)
    assert len(read) == len(set(read)) == found.num_frames == 360


def test_first_round_covers_the_video():
    for num_seconds in (127, 3600, 17):
        sampled = find(num_seconds, boxes([])).rounds[0].sampled
        gaps = np.diff([-sampled[0] - 1, *sampled, 2 * num_seconds - sampled[-1]])
        assert gaps.max() <= num_seconds / 16 + 2 and len(set(sampled.tolist())) == 16


def test_search_is_a_function_of_the_seed():
    first, again, other = (find(900, boxes([(411, 412)], cue=(350, 470)), cues=["mat"], seed=s) for s in (1, 1, 2))
    assert [r.sampled.tolist() for r in first.rounds] == [r.sampled.tolist() for r in again.rounds]
    assert [r.sampled.tolist() for r in first.rounds] != [r.sampled.tolist() for r in other.rounds]


def test_a_target_that_is_refuted_alone_does_not_count():
    found = find(400, boxes([(100, 200)], alone=0.1), share=0.5)
    looks = [v for r in found.rounds for v in r.verified]
    assert looks and all(v.removed == -1 and v.score == 0.1 for v in looks)
    assert all(len(r.verified) <= 4 for r in found.rounds)
    assert found.rounds[-1].remaining == (0,) and found.num_frames == 200
    seconds = [v.second for v in looks]
    assert found.score[seconds].max() < 0.5  # neither it nor what its neighbours got from it


def test_the_blank_text_earns_nothing():
    def background(second, is_alone, cell):
        return [(cell[0], cell[1], cell[0] + cell[2], cell[1] + cell[3], 1, 0.99)]

    found = find(200, background)
    assert all((r.confidence == 0).all() for r in found.rounds)
    assert found.fallback.startswith("nothing like cat was detected")


def test_several_targets():
    def two(second, is_alone, cell):
        box = (cell[0], cell[1], cell[0] + cell[2], cell[1] + cell[3])
        return [(*box, 0, 0.9)] * (second < 40) + [(*box, 1, 0.9)] * (second > 560)

    found = find(600, two, targets=("cat", "dog"), share=1.0)
    assert not found.rounds[-1].remaining
    assert (found.picks < 45).any() and (found.picks > 555).any()


def test_nothing_found_is_evenly_spaced_and_says_so():
    found = find(200, boxes([]), k=5)
    assert found.picks.tolist() == [0, 49, 99, 149, 199]
    assert "nothing like cat" in found.fallback


def test_no_target_is_evenly_spaced_and_says_so():
    found = find(200, boxes([]), targets=())
    assert len(found.picks) == 8 and not found.rounds and found.num_frames == found.num_detections == 0
    assert "no object" in found.fallback
    assert not_searched(3, 8, "because").picks.tolist() == [0, 1, 2]


def test_too_little_evidence_is_filled_up_evenly():
    found = find(1000, boxes([(500, 500)]), k=32, share=1.0, seed=3)
    assert not found.fallback and len(set(found.picks.tolist())) == 32
    near = (np.abs(found.picks - 500) <= 5).sum()
    assert near >= 11 and found.picks[0] < 100 and found.picks[-1] > 900


@pytest.mark.parametrize("num_seconds", [1, 3, 15, 16, 17])
@pytest.mark.parametrize("schedule", ["mix", "random", "released"])
def test_video_shorter_than_the_grid(num_seconds, schedule):
    found = find(num_seconds, boxes([(0, 0)]), k=4, schedule=schedule)
    assert len(found.picks) == min(4, num_seconds) and (np.diff(found.picks) > 0).all()
    assert found.num_frames <= num_seconds


def test_budget_smaller_than_a_grid_is_one_grid_and_says_so():
    found = find(60, boxes([]), share=0.1)
    assert found.num_frames == 16 and len(found.rounds) == 1
    assert found.notes == ("the budget of 6 frames is less than one grid of 16; one was looked at",)
    assert find(600, boxes([])).notes == ()


def test_black_cells_get_no_credit():
    def last_cell(pictures):
        found = detector(boxes([(0, 99)]), 2, (4, 4))(pictures)
        for one in found:
            one.boxes[:] = (60, 60, 63, 63)
        return found

    found = search(3, look, last_cell, ["cat"], [], 2, SearchOptions(**SMALL))
    assert (found.rounds[0].confidence == 0).all()


def test_arguments_that_make_no_sense():
    with pytest.raises(ValueError, match="no candidate frame"):
        find(0, boxes([]))
    with pytest.raises(ValueError, match="num_frames is 0"):
        find(10, boxes([]), k=0)
    for targets, cues in (["cat", "cat"], ()), ([" cat"], ()), (["cat"], ["cat"]), ([""], ()):
        with pytest.raises(ValueError, match="empty or repeated"):
            find(10, boxes([]), targets=targets, cues=cues)


def test_spreading_is_in_place_and_in_order():
    score = np.zeros(10)
    score[[3, 5]] = 0.9, 0.6
    spread(score, np.array([3, 5, 9]), np.array([0.9, 0.6, 0.0]))  # 0.75, the 75th percentile, leaves 5 out
    np.testing.assert_allclose(score, [0.225, 0.3, 0.45, 0.9, 0.45, 0.6, 0.225, 0.18, 0.15, 0])
    score = np.zeros(4)
    score[[0, 1]] = 0.8, 0.1
    spread(score, np.array([0, 1]), np.array([0.8, 0.8]))  # as if equal: 1 was raised to 0.4 first and hands that on
    np.testing.assert_allclose(score, [0.8, 0.4, 0.8 / 3, 0.2])


def test_draws_are_of_unseen_frames():
    rng = np.random.default_rng(0)
    unseen = np.ones(60, bool)
    unseen[[10, 30, 50]] = False
    score = np.zeros(60)
    for draw in (mixed_draw, random_draw):
        for count in (1, 2, 16, 57):
            drawn = draw(rng, score, unseen, count)
            assert len(set(drawn.tolist())) == count and unseen[drawn].all()


def test_mixed_draw_prefers_what_stands_out():
    rng = np.random.default_rng(0)
    unseen, score = np.ones(1000, bool), np.full(1000, 0.01)
    unseen[::100], score[300] = False, 0.9
    drawn = np.concatenate([mixed_draw(rng, score, unseen, 16) for _ in range(200)])
    near = np.abs(drawn - 300) < 100
    # Half of the draws, and what falls there of the other half, which is uniform.
    assert 0.5 < near.mean() < 0.7
    flat = np.concatenate([mixed_draw(rng, np.full(1000, 0.01), unseen, 16) for _ in range(200)])
    assert 0.15 < (np.abs(flat - 300) < 100).mean() < 0.25
