"""Replies of a language model that was asked for one flat dictionary, read with patience.

What a reply may look like: thinking before it, a code fence around it, Python's or JSON's spelling of constants and
quotes, trailing commas. Nothing here raises: what cannot be read is None, and the loop that asked decides what then.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

from tspo_jax.data.letters import LETTERS, stated_letter

Period = tuple[float, float]  # seconds, start <= end

_THINKING = "</think>"
_TRIES = 20  # spans that are tried before a reply is given up
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_CONSTANTS = re.compile(r"\b(?:true|false|null|none)\b", re.IGNORECASE)
_OF_PYTHON = {"true": "True", "false": "False", "null": "None", "none": "None"}
_STRINGS = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", re.DOTALL)

_WORDS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth "
    "ninetieth hundredth last"
)
_ORDINAL = re.compile(rf"\b(?:{'|'.join(_WORDS.split())}|\d+(?:st|nd|rd|th))\b", re.IGNORECASE)
# "1 second", "a second later" and "per second" are times.
_NUMBERS = r"\d+(?:\.\d+)?|an?|one|per|each|every|half"
_SECOND_AS_TIME = re.compile(
    rf"\b(?:(?:{_NUMBERS})[\s-]+second|second\s+\d+(?:\.\d+)?|split[\s-]+second)\b", re.IGNORECASE
)


def fields_of(reply: str) -> dict[str, Any] | None:
    """The last dictionary in a reply, its keys in lower case; None where there is none that can be read."""
    text = reply.rsplit(_THINKING, 1)[-1]
    for start, end in _candidates(text):
        if (fields := _read(text[start:end])) is not None:
            return {str(key).strip().lower(): value for key, value in fields.items()}
    return None


def _candidates(text: str) -> list[tuple[int, int]]:
    """Spans that may be a dictionary, the likeliest first: balanced braces from the back, an outer pair before what is
    in it; then, as a text may hold a single brace, from any brace to the last one."""
    spans, open_at = [], []
    for i, char in enumerate(text):
        if char == "{":
            open_at.append(i)
        elif char == "}" and open_at:
            spans.append((open_at.pop(), i + 1))
    last = text.rfind("}") + 1
    to_last = [(match.start(), last) for match in re.finditer("{", text[:last])]
    return spans[: -_TRIES - 1 : -1] + to_last[:_TRIES]


def _read(text: str) -> dict | None:
    # JSON first, then a Python literal, whose constants are only renamed outside of its strings.
    without_commas = _TRAILING_COMMA.sub(r"\1", text)
    for read, form in (
        (_json, text),
        (_json, without_commas),
        (ast.literal_eval, text),
        (ast.literal_eval, _with_python_constants(text)),
    ):
        try:
            with warnings.catch_warnings(action="ignore"):  # an odd escape in a text is a SyntaxWarning
                value = read(form)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict):
            return value
    return None


def _json(text: str) -> Any:
    return json.loads(text, strict=False)  # a line break inside a text is no reason to lose the reply


def _with_python_constants(text: str) -> str:
    out, place = [], 0
    for string in _STRINGS.finditer(text):
        out += [_rename(text[place : string.start()]), string[0].replace("\n", " ")]
        place = string.end()
    return "".join([*out, _rename(text[place:])]).strip()


def _rename(code: str) -> str:
    return _CONSTANTS.sub(lambda match: _OF_PYTHON[match[0].lower()], code).replace("\n", " ")


def truth(value: Any) -> bool:
    """True for True, 1, "true" and "yes" in any case; everything else, also what makes no sense, is False."""
    if isinstance(value, str):
        return value.strip().strip(".").lower() in ("true", "yes", "1")
    return isinstance(value, bool | int | float) and value == 1


def text_of(value: Any) -> str:
    """A value as text without outer white space; "" for None."""
    return "" if value is None else str(value).strip()


def periods_of(value: Any, duration: float) -> list[Period]:
    """Every (start, end) in a value, as floats in order inside [0, duration]; what is no period is left out.

    A bare pair counts, as do lists of pairs, texts of both, and "M:SS" for a time. A period outside the video is none.
    """
    if isinstance(value, str):
        value = _numbers_in(value)
    if not isinstance(value, list | tuple):
        return []
    times = [_seconds(x) for x in value]
    if len(times) == 2 and None not in times:
        start, end = sorted(times)
        if end < 0 or start >= duration:
            return []
        return [(max(start, 0.0), min(end, duration))]
    return [period for x in value if not isinstance(x, int | float) for period in periods_of(x, duration)]


def _numbers_in(text: str) -> list[list[str]]:
    times = re.findall(r"\d+(?::\d\d)+(?:\.\d+)?|-?\d+(?:\.\d+)?", re.sub(r"(?<=[\d\s])[-–](?=[\s\d])", " ", text))
    return [times[i : i + 2] for i in range(0, len(times) - 1, 2)]


def _seconds(value: Any) -> float | None:
    if isinstance(value, str) and re.fullmatch(r"\d+(?::\d\d)+(?:\.\d+)?", value.strip()):
        seconds = 0.0
        for part in value.split(":"):
            seconds = 60 * seconds + float(part)
        return seconds
    try:
        seconds = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if seconds is not None and math.isfinite(seconds) else None


def names_ordinal(question: str) -> bool:
    """Whether a question counts events ("the second time", "last", "3rd"); the unit second does not."""
    return _ORDINAL.search(_SECOND_AS_TIME.sub(" ", question)) is not None


def named_option(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer states, or whose text alone stands in its sentences; None for none or
    several."""
    if letter := stated_letter(answer, options):
        return letter
    said = _plain(answer)
    inside = [
        letter
        for letter, option in zip(LETTERS, map(_plain, options), strict=False)
        if option and re.search(rf"\b{re.escape(option)}\b", said)
    ]
    return inside[0] if len(inside) == 1 else None


def _plain(text: str) -> str:
    """Words in lower case without articles."""
    return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))
