import pytest

from tspo_jax.answering.replies import fields_of, named_option, names_ordinal, periods_of, text_of, truth


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"Confidence": True, "Answer": "A ferry", "Time Period": [(0.0, 60.0)]}', (True, "A ferry")),
        ('{"confidence": true, "answer": "It is true", "x": null}', (True, "It is true")),
        (
            '<think>{"Confidence": false}</think>Here: {"draft": 1} ```json\n{"Confidence": true,\n"Answer": "b"}```',
            (True, "b"),
        ),
        ("{'Confidence': true, 'Answer': 'none of it',}", (True, "none of it")),
        ('{"Confidence": "no", "Answer": "two\nlines"}', ("no", "two\nlines")),
        ('{"Confidence": 1, "Answer": {"text": "x"}}', (1, {"text": "x"})),
        ('so: {"Confidence": 0, "Answer": "a { b"} {', (0, "a { b")),
        ('{"Confidence": False, "Answer": "caf\\u00e9 \\d"}', (False, "café \\d")),
    ],
)
def test_fields(reply, expected):
    fields = fields_of(reply)
    assert (fields["confidence"], fields["answer"]) == expected


@pytest.mark.parametrize("reply", ["", "I am sure.", "{", "}{", "{1, 2}", "{x: 1}", "[1]", "{" * 3000 + "}" * 3000])
def test_no_fields(reply):
    assert fields_of(reply) is None


def test_truth():
    assert all(map(truth, (True, 1, "True", " yes", "TRUE.", "1")))
    assert not any(map(truth, (False, 0, "False", "no", None, "maybe", [], 2, "0", float("nan"))))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([(120.0, 180.0)], [(120, 180)]),
        ((120, 180), [(120, 180)]),
        ([[180, 120], ["10", "20"]], [(120, 180), (10, 20)]),
        ("(120.0, 180.0) and 1:05 - 1:10", [(120, 180), (65, 70)]),
        ("120-180", [(120, 180)]),
        ([(-50, 10), (290, 400)], [(0, 10), (290, 300)]),
        ([(300, 310), (-9, -3)], []),
        ("No Time", []),
        (None, []),
        ([(1, float("nan")), (True, 5), ("a", 2), 7, {"a": 1}], []),
    ],
)
def test_periods(value, expected):
    assert periods_of(value, 300.0) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Which number is on the first key?", True),
        ("What does he do last?", True),
        ("What happens the 3rd time?", True),
        ("What falls in the second scene?", True),
        ("Who holds the plastic bag?", False),
        ("How long does it last-minute blast for 10 seconds?", True),
        ("How many seconds does the blast take?", False),
        ("What happens after 1 second?", False),
        ("What is seen a second later?", False),
        ("What is at second 15?", False),
        ("Is it breakfast at sixths?", False),
    ],
)
def test_ordinals(question, expected):
    assert names_ordinal(question) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("(b) a red key", "B"),
        ("c.", "C"),
        ("The answer is C", "C"),
        ("Option B: a red key", "B"),
        ("a red key", "B"),
        ("A red key.", "B"),
        ("It must be the red key, a red key!", "B"),
        ("The correct option is **B**", "B"),
        ("\uff22", "B"),
        ("A is wrong, so the answer is not A but C", "C"),
        ("<think>A</think>b", "B"),
        ("a cat", None),
        ("D", None),
        ("a blue hat or a red key", None),
        ("", None),
        ("**B**", "B"),
        ('["B"]', "B"),
        ("I think the answer is B because it falls", "B"),
        ("A. The hat, not the red key", "A"),
        ("A cat sits there", None),
    ],
)
def test_named_option(answer, expected):
    assert named_option(answer, ("a blue hat", "a red key", "a green bag")) == expected


def test_text():
    assert (text_of(None), text_of(" a\n"), text_of(7)) == ("", "a", "7")
