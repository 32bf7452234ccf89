"""The option that a text names: the original's rule, and as a person reads."""

import time

import pytest

from tspo_jax.data.letters import LETTERS, option_letter, solution_letter, stated_letter

OPTIONS = ("the red ball", "a dog", "none of the above", "two cats")


def test_the_originals_rule_and_more_options():
    assert [option_letter(text) for text in ("b.", "a cat", "2a", "none", "F")] == ["B", "A", "A", None, None]
    assert [option_letter(text, 10) for text in ("F", "j)", "K", "I see a J")] == ["F", "J", None, "I"]
    assert solution_letter("<answer>f</answer>", 10) == "F" and solution_letter("<answer>f</answer>") is None
    assert len(LETTERS) >= 10


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # alone, whatever marks and brackets are around it
        *((text, "B") for text in ("b", "(b)", "b.", "option b", "B", "(B)", "**B**", "\uff22", "Answer: b", "B!")),
        # announced, the last time
        ("The answer is (B).", "B"),
        ("Answer: **C**", "C"),
        ("The correct option is D) two cats", "D"),
        ("I would choose C.", "C"),
        ("I'd say B", "B"),
        ("\u9009B", "B"),
        ("\u7b54\u6848\uff1a\uff22", "B"),
        ("\u7b54\u6848\u662fC", "C"),
        ("\\boxed{A}", "A"),
        ("Final answer: $\\boxed{\\text{D}}$", "D"),
        ("A man walks in, so the answer is C", "C"),
        ("A is not correct. The correct answer is B.", "B"),
        ("Not A. The answer is B.", "B"),
        ("The answer is not A but B", "B"),
        ("Both A and C are shown; the answer is D", "D"),
        # behind reasoning
        ("<think>A is wrong, C is wrong.</think>B", "B"),
        ("\u25c1think\u25b7A is right\u25c1/think\u25b7b", "B"),
        ("[THINK]A is right[/THINK]b", "B"),
        ("<think>maybe A", None),
        ("<answer>b", "B"),
        ("{'answer': 'b'}", "B"),
        ("<answer>C</answer>", "C"),
        # at the beginning, with reasons behind it
        ("B: because a cat", "B"),
        ("b) a dog", "B"),
        ("A, because the ball is red", "A"),
        ("B\n\nOption A is about a ball, so it is wrong.", "B"),
        ("A and B are wrong. C is right.", "C"),
        ("A, B and C are wrong, D.", "D"),
        ("It is not A or B but D", "D"),
        ("B is incorrect, C is incorrect, so D", "D"),
        # called right, or the only one that is not denied
        ("A and C are possible, but B is correct.", "B"),
        ("Both B and C look right, but B is the best answer.", "B"),
        ("B or C is correct.", None),
        ("It cannot be A.", None),
        ("The answer can't be A, it is D", "D"),
        ("A\u9519\u8bef\uff0cB\u6b63\u786e", "B"),
        ("\u7b54\u6848\u4e0d\u662fA\uff0c\u800c\u662fB", "B"),
        # the text of an option
        ("A dog", "B"),
        ("The red ball.", "A"),
        ("None of the above", "C"),
        ("The answer is a dog.", "B"),
        ("red ball", "A"),
        ("The answer is A the red ball", "A"),
        # none, or several
        *(
            (text, None)
            for text in ("none", "", "I", "A and B", "(A)(B)", "C or D", "The answer is A or B", "A. x\nB. y\nC. z")
        ),
        ("A cat and a dog play.", None),
        ("I cannot determine from the video. E", None),
    ],
)
def test_as_a_person_reads(text, letter):
    assert stated_letter(text, OPTIONS) == letter


def test_ten_options():
    options = tuple(f"colour {i}" for i in range(10))
    assert stated_letter("The answer is J.", options) == "J" and stated_letter("colour 6", options) == "G"
    assert stated_letter("I think it is F", options) == "F"


def test_no_options():
    assert stated_letter("The answer is B", ()) is None


def test_an_answer_that_repeats_itself_is_read_in_time():
    since = time.perf_counter()
    assert stated_letter("so the answer is " * 4000 + "C", OPTIONS) == "C"
    assert stated_letter("the answer is x. " * 4000, OPTIONS) is None
    assert time.perf_counter() - since < 10
