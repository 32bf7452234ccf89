from tspo_jax.data.overlap import shared

TRAINED = [("a.mp4", "Who opens the door?"), ("a.mp4", "Why?"), ("b.mp4", "Why?"), ("c.mp4", "When?")]


def test_questions_and_videos_are_counted_once():
    held_out = [("a.mp4", "who  opens\nthe door?"), ("a.mp4", "Who?"), ("b.mp4", "Who?"), ("d.mp4", "Why?")]
    assert shared(TRAINED, [*held_out, held_out[0]]) == [
        "1 of the 4 held-out questions are trained on as well (about a.mp4)",
        "2 of the 3 held-out videos are trained on as well (a.mp4, b.mp4)",
    ]


def test_a_video_alone():
    (line,) = shared(TRAINED, [("c.mp4", "Why?")])
    assert line == "1 of the 1 held-out videos are trained on as well (c.mp4)"


def test_nothing_shared():
    assert shared(TRAINED, [("d.mp4", "Why?")]) == [] == shared([], TRAINED)


def test_many_names_are_cut():
    many = [(f"{i}.mp4", "Why?") for i in range(5)]
    assert [line.endswith("0.mp4, 1.mp4, 2.mp4, ...)") for line in shared(many, many)] == [True, True]
