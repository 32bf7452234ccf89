"""Needle questions: the stem and the right option are of the target, the wrong options of other videos."""

from tspo_jax.data.event_questions import event_question
from tspo_jax.data.questions import question_of_row

TEXTS = {
    "a.mp4": ["A cat sleeps.", "A cat eats."],
    "b.mp4": ["A dog runs.", "a dog runs", ""],
    "c.mp4": ["A cat sleeps.", "Rain falls\nall day.", "Snow falls."],
    "d.mp4": ["The sun shines."],
}


def test_options_come_from_where_they_should():
    answers = set()
    for seed in range(20):
        line = event_question("a.mp4", TEXTS, seed)
        assert line == event_question("a.mp4", TEXTS, seed)
        question = question_of_row(line, 0, "x:1", None)
        answers.add(question.answer)
        right = question.options["ABCD".index(question.answer)]
        others = [option for option in question.options if option != right]
        assert question.kind == "specific" and len(question.options) == 4 and len(set(others)) == 3
        shown = next(text for text in TEXTS["a.mp4"] if text.rstrip(".") in question.query)
        assert {shown, right} == set(TEXTS["a.mp4"])
        assert set(others) <= {"A dog runs.", "Rain falls all day.", "Snow falls.", "The sun shines."}
    assert answers == set("ABCD")


def test_too_few_descriptions():
    assert event_question("b.mp4", TEXTS, 0) is None  # twice the same
    assert event_question("a.mp4", {"a.mp4": TEXTS["a.mp4"], "b.mp4": TEXTS["b.mp4"]}, 0) is None
