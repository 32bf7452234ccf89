"""The letters of options, and the option that a text names."""

import re

LETTERS = "ABCDE"  # of the options that an answer can name

_LETTER = re.compile(r"(?<![a-z])[a-e](?![a-z])")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def option_letter(text: str) -> str | None:
    """The first letter A-E that stands alone, in upper case; None where there is none.

    The rule of the original: only one of a-z next to it disqualifies a letter, so "2a" gives A, and so does
    the article in "a cat".
    """
    match = _LETTER.search(text.lower())
    return match[0].upper() if match else None


def solution_letter(solution: str) -> str | None:
    """The right option of a solution text, which may stand in <answer> tags."""
    tagged = _ANSWER_TAG.search(solution)
    return option_letter(tagged[1] if tagged else solution)
