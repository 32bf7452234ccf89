import numpy as np

from benchmarks.temporal_search import CUES, LIMIT, NEEDLE, NOISE, ScriptedVideo, frames_until_found, measure


def test_a_scripted_video():
    """A needle of ten seconds, noise in the wanted share, a cue around the needle."""
    video = ScriptedVideo(3, noise=0.3, cue_reach=60)
    needle = np.flatnonzero(video.scores[:, 0] >= 0.6)
    assert len(needle) == NEEDLE == needle[-1] - needle[0] + 1
    cue = np.flatnonzero(video.scores[:, 1] >= 0.6)
    assert cue[0] == max(0, needle[0] - 60) and len(cue) == cue[-1] - cue[0] + 1
    others = np.delete(video.scores[:, 0], needle)
    assert 0.25 < (others > 0).mean() < 0.35 and others.max() <= 0.26
    (found,) = video.detector((4, 4))([video.look([needle[0]])[0]])
    assert found.scores[0, 0] == video.scores[needle[0], 0]


def test_a_cue_shortens_the_search():
    frames = {reach: [frames_until_found("mix", seed, 0.0, reach) for seed in range(6)] for reach in (None, 60)}
    assert all(count <= LIMIT for of_reach in frames.values() for count, _ in of_reach)
    assert np.mean([count for count, _ in frames[60]]) < np.mean([count for count, _ in frames[None]])


def test_a_row_for_every_setting(monkeypatch):
    monkeypatch.setitem(NOISE, "in every frame", 0.0)  # searches with less to compute
    rows = measure(2, ["mix"])
    assert len(rows) == len(NOISE) * len(CUES) * 2
    assert all(row["relative_to_random"] == 1 for row in rows if row["schedule"] == "random")
