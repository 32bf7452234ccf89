"""Question files in the TSPO-10K jsonl format: one multiple-choice question about one video per line.

Keys of a line: `video` (path below the video folder), `original_question` ("<image>\n{stem}\nA. ..\nB. .." and maybe
one of two closing sentences), `solution` ("<answer>a</answer>"), `type` ("general" or "specific"). `original_answer`,
`problem` and `complete_answer` are part of the format but no one reads them. Optional: `id` (unique), `family` (name of
a group to report apart) and `evidence` ([[start, end], ...] in seconds).
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from tspo_jax.data.letters import LETTERS, solution_letter

KINDS = ("general", "specific")
IMAGE_TAG = "<image>"
# The closing sentences of LLaVA-Video-178K, which the original removes from the text of the agent and of the MLLM.
TAILS = (
    "Please provide your answer by stating the letter followed by the full option.",
    "Please respond with only the letter of the correct answer.",
)
_OPTION = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s*(.*)", re.DOTALL)
_SHOWN_ERRORS = 20


class QuestionError(ValueError):
    """Unusable question lines, listed as 'file:line: field: reason'."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one video.

    Attributes:
      index: position in the list that `read_questions` returns; arrays computed per question are indexed by it.
      video: path below the video folder, with forward slashes.
      query: the stem alone, the text for CLIP and the agent.
      question: stem and options, the text for the MLLM (without image tag; removing a closing sentence leaves the
        newline before it, as in the original).
      options: option texts without their letters.
      answer: upper-case letter of the right option.
      kind: "general" (accuracy reward) or "specific" (needle sample, accuracy and temporal location).
      source: 'file:line', for messages.
    """

    index: int
    video: str
    query: str
    question: str
    options: tuple[str, ...]
    answer: str
    kind: str
    source: str
    family: str | None = None
    evidence: tuple[tuple[float, float], ...] = ()


def read_questions(
    path: str | Path, video_folder: str | Path | None = None, strict: bool = True
) -> tuple[list[Question], list[str]]:
    """The good questions of a file in their order, and one message 'file:line: field: reason' per bad line.

    With a `video_folder`, every video must be a file in it. Blank lines are skipped.
    Raises QuestionError where strict and a line is bad, and always where no line is good.
    """
    path = Path(path)
    questions, errors, first_line_of_id = [], [], {}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            row = _json_object(line)
            question = question_of_row(row, len(questions), source, video_folder)
            if row.get("id") is not None and number != (first := first_line_of_id.setdefault(str(row["id"]), number)):
                raise QuestionError(f"id: {row['id']!r:.60} is also the id of line {first}")
            questions.append(question)
        except QuestionError as error:
            errors.append(f"{source}: {error}")
    raise_if_bad(path, questions, errors, strict)
    return questions, errors


def raise_if_bad(path: Path, questions: list, errors: list[str], strict: bool) -> None:
    """Raises QuestionError that lists the errors, where strict or no question is good."""
    if not questions and not errors:
        errors.append(f"{path}: file: has no questions")
    if errors and (strict or not questions):
        more = f"\n... and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
        raise QuestionError(f"{len(errors)} bad question(s)\n" + "\n".join(errors[:_SHOWN_ERRORS]) + more)


def video_path(name: str, field: str = "video") -> str:
    """A path below a folder, normalised; QuestionError for one that is absolute or leaves the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not name.strip() or any(ord(c) < 32 for c in name):
        raise QuestionError(f"{field}: {name!r:.200} is not a file name")
    if path.is_absolute() or re.match(r"[A-Za-z]:", name) or ".." in path.parts:
        raise QuestionError(f"{field}: {name!r:.200} must be a path below the video folder, not absolute or with ..")
    return str(path)


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Stem and option texts of 'stem\nA. ..\nB. ..' (also '(A) ..', 'A) ..', 'A: ..').

    The original cuts at the first line that starts with an A, which also hits a stem line such as "At the end ...".
    Here the options start at the last line that reads as option A and has a line of option B after it. Lines between
    two options belong to the upper one. No options: (text, ()).
    """
    lines = text.split("\n")
    for start in reversed(range(len(lines))):
        options: list[str] = []
        for line in lines[start:]:
            match = _OPTION.match(line)
            if match and (match[1] or match[2]) == chr(ord("A") + len(options)):
                options.append(match[3])
            elif options:
                options[-1] += "\n" + line
            else:
                break
        if len(options) > 1:
            return "\n".join(lines[:start]).strip(), tuple(option.strip() for option in options)
    return text.strip(), ()


def without_tags(text: str, field: str = "original_question") -> str:
    """A question without its image tag and closing sentences; raises QuestionError for a second tag."""
    text = text.replace("\r\n", "\n").replace(f"{IMAGE_TAG}\n", "", 1)
    for tail in TAILS:
        text = text.replace(tail, "")
    if IMAGE_TAG in text:
        raise QuestionError(f"{field}: {IMAGE_TAG} stands elsewhere than on a line of its own at the start")
    return text


def solution_of_option(answer: str) -> str | None:
    """The letter that an answer such as 'A.', '(A) Black.' or 'A' begins with; None where it begins with none."""
    match = _OPTION.match(answer.strip()) or re.fullmatch("()([A-Z])", answer.strip())
    return (match[1] or match[2]) if match else None


def row(id: str, video: str, stem: str, options: Sequence[str], answer: str, kind: str) -> dict:
    """A line of a TSPO-10K file; `answer` is the letter."""
    lines = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    right = lines[ord(answer) - ord("A")]
    return {
        "id": id,
        "video": video,
        "original_question": "\n".join([IMAGE_TAG, stem, *lines]),
        "original_answer": right,
        "problem": f"{IMAGE_TAG}\n{stem}",
        "solution": f"<answer>{answer.lower()}</answer>",
        "complete_answer": right,
        "type": kind,
    }


def question_of_row(row: dict, index: int, source: str, video_folder: str | Path | None) -> Question:
    texts = {field: text_field(row, field) for field in ("video", "original_question", "solution", "type")}
    for field in ("original_answer", "problem", "complete_answer", "family"):
        if row.get(field) is not None:
            text_field(row, field)
    video = video_path(texts["video"])
    if video_folder is not None and not (Path(video_folder) / video).is_file():
        raise QuestionError(f"video: no file {video} in {video_folder}")
    if texts["type"] not in KINDS:
        raise QuestionError(f"type: {texts['type']!r:.60} is neither {' nor '.join(KINDS)}")
    question = without_tags(texts["original_question"])
    query, options = split_options(question)
    if not options:
        raise QuestionError("original_question: has no options (lines 'A. ...' and 'B. ...')")
    if not query:
        raise QuestionError("original_question: has no text before its options")
    answer = solution_letter(texts["solution"])
    # The original takes the first lone letter a-e: of "a forest" its article.
    named = solution_of_option(re.sub("</?answer>", "", texts["solution"]).upper())
    if answer != named or named not in list(LETTERS[: len(options)]):
        last = LETTERS[: len(options)][-1]
        raise QuestionError(f"solution: {texts['solution']!r:.60} does not name one of the options A-{last}")
    evidence = tuple(_spans(row.get("evidence") or []))
    return Question(index, video, query, question, options, answer, texts["type"], source, row.get("family"), evidence)


def _json_object(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise QuestionError(f"line: not UTF-8 ({error})") from None
    except (ValueError, RecursionError) as error:
        raise QuestionError(f"line: not valid json ({error})") from None
    if not isinstance(row, dict):
        raise QuestionError(f"line: is not a json object but {type(row).__name__}")
    return row


def text_field(row: dict, field: str) -> str:
    """A text that is not empty; raises QuestionError."""
    if field not in row:
        raise QuestionError(f"{field}: is missing")
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise QuestionError(f"{field}: must be a text that is not empty, not {value!r:.60}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise QuestionError(f"{field}: has half of a surrogate pair, or bytes that are not UTF-8") from None
    return value


def _spans(value: object) -> Iterator[tuple[float, float]]:
    for span in value if isinstance(value, list) else [value]:
        numbers = isinstance(span, list) and len(span) == 2 and all(type(x) in (int, float) for x in span)
        if not numbers or not all(map(math.isfinite, span)) or not 0 <= span[0] <= span[1]:
            raise QuestionError(f"evidence: must be [[start, end], ...] in seconds, not {span!r:.60}")
        yield float(span[0]), float(span[1])
