"""What the agents of backtracking are asked: prompts about a memory of captions, each for one flat dictionary.

The tasks and the fields of the replies are those of VideoLucy (arXiv 2510.12422); the words are ours.
"""

import dataclasses
from collections.abc import Sequence

from tspo_jax.answering.caption_memory import Row
from tspo_jax.answering.replies import Period

COARSE_INSTRUCTION = "Describe everything that can be seen in this clip. Mention all text that is visible."
FINE_INSTRUCTION = "Mention all text that is visible. {instruction}"

NO_ANSWER, NO_TIME = "No Answer", "No Time"

_RULES = (
    "Judge by what the descriptions say, not by what is likely. Periods and their numbers only order the descriptions: "
    "a word such as first or third in the question counts events, not periods."
)
_ANSWER = (
    "Answer the question from the descriptions. Be confident only if they say it without a doubt.",
    {
        "Confidence": "True or False",
        "Answer": 'the answer, or "No Answer"',
        "Time Period": 'a list of (start, end) in seconds where it is seen, or "No Time"',
        "Reason": "one sentence",
    },
)
_TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "coarse_answer": _ANSWER,
    "answer": _ANSWER,
    "type": (
        "The descriptions do not answer the question yet. Would a closer look at two periods be enough to answer it?\n"
        "It would for a detail: What does the woman put into her bag? Which word is on the door? What colour is the "
        "car that stops?\n"
        "It would not for an overview of a long stretch: How many dishes are cooked in all? What is the video about? "
        "How does the weather change over the day?",
        {
            "Flag": "True if two periods are enough, else False",
            "Time Period": 'a list of these two periods as (start, end), copied from the descriptions, or "No Time"',
            "Reason": "one sentence",
        },
    ),
    "localize": (
        "The descriptions do not answer the question yet. Choose one period for a closer look, and say what to look "
        "for there. A period of {fine:g} seconds or less is shown in its finest detail.",
        {
            "Time Period": "a list with one (start, end) in seconds",
            "Instruction": "one sentence: what to look for and describe",
            "Reason": "one sentence",
        },
    ),
    "force": (
        "Give the best answer that the descriptions allow, even if they leave a doubt.",
        {
            "Answer": "the answer",
            "Time Period": 'a list of (start, end) in seconds where it is seen, or "No Time"',
            "Reason": "one sentence",
        },
    ),
}
_TASKS["flat"] = _TASKS["force"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about a video: `text` without its options, which may be none."""

    id: str
    video: str
    text: str
    options: tuple[str, ...] = ()


def prompt(
    agent: str,
    asked: Asked,
    rows: Sequence[Row],
    duration: float,
    *,
    fine_window: float = 10.0,
    excluded: Sequence[Period] = (),
    fault: str | None = None,
) -> str:
    """The text for an agent of _TASKS.

    Args:
      rows: of the memory.
      duration: of the video in seconds.
      excluded: periods that were looked at before (localize).
      fault: what was wrong with the reply to this prompt before.
    """
    task, fields = _TASKS[agent]
    lines = [
        f"A video of {_time(duration)} seconds is described below, a period a line, with closer looks nested in it.",
        "",
        *(shown(rows) or ["(there are no descriptions)"]),
        "",
        f"Question: {asked.text}",
    ]
    if asked.options:
        letters = [chr(ord("A") + i) for i in range(len(asked.options))]
        lines += [f"{letter}. {option}" for letter, option in zip(letters, asked.options, strict=True)]
        lines += [f"The answer must be one letter of {', '.join(letters)}."]
    lines += ["", task.format(fine=fine_window), _RULES]
    if excluded:
        lines += [f"Looked at before, choose another: {', '.join(map(_span, excluded))}."]
    form = ", ".join(f'"{name}": <{value}>' for name, value in fields.items())
    lines += ["Reply with one flat dictionary and nothing else:", "{" + form + "}"]
    if fault:
        lines += [f"Your last reply could not be used: {fault}. Reply again, in this form."]
    return "\n".join(lines)


def shown(rows: Sequence[Row]) -> list[str]:
    """The lines of a memory: numbered where they stand alone, indented where they are part of the one above."""
    lines, number = [], 0
    for row in rows:
        number += row.depth == 0
        head = f"{number}." if row.depth == 0 else "  " * row.depth + "-"
        text = " ".join(row.text.split())  # a line break would look like another period
        lines.append(f"{head} [{_time(row.period[0])} s to {_time(row.period[1])} s] {text}".rstrip())
    return lines


def _span(period: Period) -> str:
    return f"({_time(period[0])}, {_time(period[1])})"


def _time(seconds: float) -> str:
    return f"{seconds:.1f}"
