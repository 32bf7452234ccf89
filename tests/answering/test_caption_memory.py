import pytest

from tspo_jax.answering.caption_memory import COARSE, FINE, ULTRA_FINE, CaptionMemory, Clip, cut, shorten


@pytest.mark.parametrize(
    ("period", "length", "fps", "pieces"),
    [
        ((0, 300), 60, 1, [(0, 60), (60, 120), (120, 180), (180, 240), (240, 300)]),
        ((0, 121), 60, 1, [(0, 60), (60, 120)]),
        ((0, 125), 60, 1, [(0, 60), (60, 120), (120, 125)]),
        ((0, 0.5), 60, 1, [(0, 0.5)]),
        ((110, 155), 10, 2, [(110, 120), (120, 130), (130, 140), (140, 150), (150, 155)]),
        ((130, 133), 1, 2, [(130, 131), (131, 132), (132, 133)]),
        ((0, 30), 10, 0.5, [(0, 10), (10, 20), (20, 30)]),
        ((0.3, 0.9), 0.1, 10, [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9)]),
    ],
)
def test_cut(period, length, fps, pieces):
    clips = cut(period, length, fps)
    assert sum((clip.period for clip in clips), ()) == pytest.approx(sum(pieces, ()))
    for clip in clips:
        start, end = clip.period
        assert clip.times == pytest.approx([start + k / fps for k in range(len(clip.times))])
        assert len(clip.times) == pytest.approx(max((end - start) * fps, 1), abs=0.51)


def add(memory, level, step, *periods, split="whole"):
    memory.add([Clip(p, (p[0],)) for p in periods], [f"{level} {step}" for _ in periods], level, step, split)


def tree(memory, **options):
    return [(row.depth, row.period, row.text) for row in memory.rows(**options)]


WINDOWS = (0, 60), (60, 120), (120, 180)


def test_a_finer_caption_stands_under_what_contains_it():
    """Also where its window was never refined, which the original loses."""
    memory = CaptionMemory()
    add(memory, COARSE, 0, *WINDOWS)
    add(memory, ULTRA_FINE, 1, (70, 80), (70, 71), (71, 72))
    assert tree(memory) == [
        (0, (0, 60), "coarse 0"),
        (0, (60, 120), "coarse 0"),
        (1, (70, 80), "ultra-fine 1"),
        (2, (70, 71), "ultra-fine 1"),
        (2, (71, 72), "ultra-fine 1"),
        (0, (120, 180), "coarse 0"),
    ]
    assert [depth for depth, *_ in tree(memory, finest=FINE)] == [0, 0, 0]


def test_crossing_periods_stand_beside_each_other():
    memory = CaptionMemory()
    add(memory, COARSE, 0, *WINDOWS)
    add(memory, FINE, 1, (110, 155), (110, 120), (120, 130), (150, 155))
    assert [(depth, period) for depth, period, _ in tree(memory)] == [
        (0, (0, 60)),
        (0, (60, 120)),
        (0, (110, 155)),
        (1, (110, 120)),
        (1, (120, 130)),
        (1, (150, 155)),
        (0, (120, 180)),
    ]


def test_finer_then_later_replaces():
    memory = CaptionMemory()
    add(memory, COARSE, 0, *WINDOWS)
    add(memory, ULTRA_FINE, 1, (60, 70))
    add(memory, FINE, 2, (60, 120), (60, 70))
    add(memory, FINE, 3, (60, 120))
    texts = {period: text for _, period, text in tree(memory)}
    assert texts[60, 120] == "fine 3" and texts[60, 70] == "ultra-fine 1"
    assert {period: text for _, period, text in tree(memory, finest=FINE)}[60, 70] == "fine 2"


def test_keep_near():
    memory = CaptionMemory()
    windows = [(60 * i, 60 * i + 60) for i in range(6)]
    add(memory, COARSE, 0, *windows)
    assert memory.keep_near([(125, 140)]) == windows[1:4]
    assert memory.keep_near([(0, 60), (360, 400)]) == windows[:2]
    assert memory.keep_near([(59, 61)]) == windows[:3]
    assert memory.keep_near([(60, 60)]) == windows[:3]
    assert [period for _, period, _ in tree(memory)] == windows[:3]
    assert [period for _, period, _ in tree(memory, all_windows=True)] == windows
    assert memory.keep_near([]) == windows and len(memory.rows()) == 6


def test_a_caption_that_failed_leaves_no_line():
    memory = CaptionMemory()
    memory.add([Clip((0, 60), (0,)), Clip((60, 90), (60,))], [None, "x"], COARSE, 0, "whole")
    assert memory.windows == [(60, 90)]


def test_shorten_cuts_far_coarse_captions_first():
    memory = CaptionMemory()
    windows = [(60 * i, 60 * i + 60) for i in range(5)]
    memory.add([Clip(w, (w[0],)) for w in windows], ["One two three. " * 5] * 5, COARSE, 0, "whole")
    memory.add([Clip((60, 120), (60,))], ["Fine four five. " * 5], FINE, 1, "whole")
    rows = memory.rows()

    def words(rows):
        return sum(len(row.text.split()) for row in rows)

    assert shorten(rows, [(60, 120)], lambda rows: words(rows) <= 75) == (rows, None)
    cut_rows, note = shorten(rows, [(60, 120)], lambda rows: words(rows) <= 63)
    assert [len(row.text.split()) for row in cut_rows] == [15, 15, 15, 15, 3] and "1 of 5" in note
    cut_rows, note = shorten(rows, [(60, 120)], lambda rows: words(rows) <= 40)
    assert [len(row.text.split()) for row in cut_rows] == [3, 15, 15, 3, 3] and "first sentence" in note
    cut_rows, note = shorten(rows, [(60, 120)], lambda rows: words(rows) <= 14)
    assert len(cut_rows) == 5 and words(cut_rows) <= 14 and "times" in note
    cut_rows, note = shorten(rows, [], lambda rows: False)
    assert len(cut_rows) == 5 and words(cut_rows) == 0 and "even cut" in note
