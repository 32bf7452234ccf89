"""Needle questions: the stem and the right option are of the target, the wrong options of other videos."""

from tspo_jax.data.event_questions import event_questions
from tspo_jax.data.questions import question_of_row

TEXTS = {
    "a.mp4": ["A cat sleeps.", "A cat eats."],
    "b.mp4": ["A dog runs.", "a dog runs", ""],
    "c.mp4": ["A cat sleeps.", "Rain falls\nall day.", "Snow falls."],
    "d.mp4": ["The sun shines."],
}


def test_options_come_from_where_they_should():
    answers, wrong = set(), set()
    for seed in range(20):
        lines = list(event_questions(TEXTS, seed))
        assert lines == list(event_questions(dict(reversed(TEXTS.items())), seed))
        assert [line["video"] for line in lines] == ["a.mp4", "c.mp4"]  # the others have one description
        question = question_of_row(lines[0], 0, "x:1", None)
        answers.add(question.answer)
        right = question.options["ABCD".index(question.answer)]
        others = [option for option in question.options if option != right]
        assert question.kind == "specific" and len(question.options) == 4 and len(set(others)) == 3
        shown = next(text for text in TEXTS["a.mp4"] if text.rstrip(".") in question.query)
        assert {shown, right} == set(TEXTS["a.mp4"])
        wrong |= set(others)
    assert answers == set("ABCD")
    assert wrong == {"A dog runs.", "Rain falls all day.", "Snow falls.", "The sun shines."}


def test_too_few_descriptions_of_other_videos():
    assert not list(event_questions({name: TEXTS[name] for name in ("a.mp4", "b.mp4", "d.mp4")}, 0))
