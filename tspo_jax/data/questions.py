"""Question files: multiple-choice questions about videos, one object per line, one JSON list of them, or a CSV table.

Keys in the TSPO-10K format: `video` (path below the video folder), `original_question` ("<image>\n{stem}\nA. ..\nB. .."
and maybe one of two closing sentences), `solution` ("<answer>a</answer>"), `type` ("general" or "specific").
`original_answer`, `problem` and `complete_answer` are part of the format but no one reads them. Optional: `id`
(unique), `family` (name of a group to report apart), `evidence` ([[start, end], ...] in seconds), `targets` and `cues`
(names of what a search of the video looks for, and of what may be near it).

Written by hand, and as the columns of a table: `video`, `question`, `options` (a list; in a table one per line of the
cell, or separated by |, as are `targets` and `cues`) or a column for each (A, B, C ...), `answer` (a letter, or the
text of the right option); `type` is general where it is not there.
"""

import codecs
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from tspo_jax.data.letters import LETTERS, solution_letter
from tspo_jax.models.video_tags import IMAGE_TAG

KINDS = ("general", "specific")
# The closing sentences of LLaVA-Video-178K, which the original removes from the text of the agent and of the MLLM.
TAILS = (
    "Please provide your answer by stating the letter followed by the full option.",
    "Please respond with only the letter of the correct answer.",
)
_OPTION = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s*(.*)", re.DOTALL)
_SHOWN_ERRORS = 20
_NO_TEXT = {  # what a file begins with that is saved in another form
    b"PK\3\4": "a spreadsheet or another zip archive",
    b"\xd0\xcf\x11\xe0": "a spreadsheet",
    b"\x1f\x8b": "compressed (gzip)",
    b"PAR1": "a Parquet file",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_TABLES = {".csv": None, ".tsv": "\t"}  # suffix -> what separates cells, None: told by the first line


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
    targets: tuple[str, ...] = ()
    cues: tuple[str, ...] = ()


def read_questions(
    path: str | Path, video_folder: str | Path | None = None, strict: bool = True, max_bad: float = 1.0
) -> tuple[list[Question], list[str]]:
    """The good questions of a file in their order, and one message 'file:line: field: reason' per bad line.

    With a `video_folder`, every video must be a file in it. Blank lines are skipped.
    Raises QuestionError where strict and a line is bad, where more than `max_bad` (a share) of the lines are, and
    always where no line is good.
    """
    path = Path(path)
    questions, errors, first_line_of_id = [], [], {}
    for number, row in _rows(path):
        source = f"{path}:{number}"
        try:
            if isinstance(row, QuestionError):
                raise row
            question = question_of_row(row, len(questions), source, video_folder)
            if row.get("id") is not None and number != (first := first_line_of_id.setdefault(str(row["id"]), number)):
                raise QuestionError(f"id: {row['id']!r:.60} is also the id of line {first}")
            questions.append(question)
        except QuestionError as error:
            errors.append(f"{source}: {error}")
    raise_if_bad(path, questions, errors, strict, max_bad)
    return questions, errors


def _rows(path: Path) -> Iterator[tuple[int, Mapping | QuestionError]]:
    """(line, or number in a JSON list or table; object) of a file's questions."""
    data = path.read_bytes()
    return _table_rows(path, data) if path.suffix.lower() in _TABLES else json_rows(path, data)


def json_rows(path: Path, data: bytes) -> Iterator[tuple[int, Mapping | QuestionError]]:
    """(number, object) of a file that is one JSON list, one object per line, or objects one after another.

    Raises QuestionError for a file that is none of these.
    """
    _check_text(path, data)
    data = data.removeprefix(codecs.BOM_UTF8)
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    begins = data.lstrip()[:1]
    if begins in (b"[", b"{") and not (len(lines) > 1 and begins == b"{" and _is_json(lines[0][1])):
        try:
            rows = _values(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if begins == b"[" and not _is_json(lines[0][1]):
                raise QuestionError(f"{path}: file: begins as a JSON list, but is none ({error})") from None
        else:
            if begins == b"{" or len(rows) == 1 and isinstance(rows[0], list):
                for number, row in enumerate(rows[0] if begins == b"[" else rows, start=1):
                    yield number, row if isinstance(row, dict) else QuestionError(f"item: {_is_no_object(row)}")
                return
    for number, line in lines:
        yield number, _json_object(line)


def _values(text: str) -> list:
    """The JSON values of a text that holds nothing but them; raises ValueError."""
    text, decoder, found, place = text.rstrip(), json.JSONDecoder(), [], 0
    while place < len(text):
        value, place = decoder.raw_decode(text, re.compile(r"\s*").match(text, place).end())
        found.append(value)
    return found


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _check_text(path: Path, data: bytes) -> None:
    for begin, kind in _NO_TEXT.items():
        if data.startswith(begin):
            raise QuestionError(f"{path}: file: is {kind}, not text in UTF-8; save it as CSV UTF-8 or as JSON")


def _table_rows(path: Path, data: bytes) -> Iterator[tuple[int, Mapping | QuestionError]]:
    _check_text(path, data)
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise QuestionError(f"{path}: is not UTF-8 ({error}); save the table as CSV UTF-8") from None
    header = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = _TABLES[path.suffix.lower()] or max(",;\t", key=header.count)  # spreadsheets of some countries write ;
    # Strict: a quotation mark that is not closed would make one cell of many lines.
    reader, names = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), None
    try:
        for number, cells in enumerate(reader, start=1):
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if names is None:
                names = _column_names(f"{path}:{number}", cells)
            elif any(cells[len(names) :]):
                yield number, QuestionError("line: has more cells than the first line has names")
            else:
                yield number, _row_of_cells(dict(itertools.zip_longest(names, cells[: len(names)], fillvalue="")))
    except csv.Error as error:
        raise QuestionError(f"{path}:{reader.line_num}: line: a cell cannot be read ({error})") from None
    if names is None:
        _column_names(f"{path}:1", [])


def _column_names(source: str, cells: Sequence[str]) -> list[str]:
    names = [name if len(name) == 1 else name.lower() for name in cells]
    if missing := [name for name in ("video", "question", "answer") if name not in names]:
        there = ", ".join(cells) or "none"
        raise QuestionError(f"{source}: {missing[0]}: no such column; the first line has {there}")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise QuestionError(f"{source}: {twice[0]}: two columns have this name")
    return names


def _row_of_cells(cells: Mapping[str, str]) -> dict | QuestionError:
    row = {name: cell for name, cell in cells.items() if cell and name and name not in LETTERS}
    by_letter = [cells.get(letter, "") for letter in LETTERS]
    by_letter = by_letter[: max((place for place, cell in enumerate(by_letter, start=1) if cell), default=0)]
    if "" in by_letter:
        empty, last = LETTERS[by_letter.index("")], LETTERS[len(by_letter) - 1]
        return QuestionError(f"{empty}: this option is empty, but {last} is not")
    for field in ("options", "targets", "cues"):
        if cell := cells.get(field):
            separator = "\n" if "\n" in cell else "|"
            row[field] = [part.strip() for part in cell.split(separator) if part.strip()]
    if by_letter and "options" in row:
        return QuestionError("options: given in a column of their own and in those of the letters")
    row["options"] = by_letter or row.get("options", [])
    if "evidence" in row:
        try:
            row["evidence"] = json.loads(row["evidence"])
        except (ValueError, RecursionError):
            return QuestionError(f"evidence: must be [[start, end], ...] in seconds, not {row['evidence']!r:.60}")
    return row


def raise_if_bad(path: Path, questions: list, errors: list[str], strict: bool, max_bad: float) -> None:
    """Raises QuestionError that lists the errors, where strict, no question is good, or more than `max_bad` of all are
    bad."""
    if not questions and not errors:
        errors.append(f"{path}: file: has no questions")
    total = len(questions) + len(errors)
    if errors and (strict or not questions or len(errors) > max_bad * total):
        more = f"\n... and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
        of_all = f" of {total}" if questions else ""
        of_all += f", above max_bad = {max_bad:.0%}" if questions and not strict else ""
        raise QuestionError(f"{len(errors)} bad question(s){of_all}\n" + "\n".join(errors[:_SHOWN_ERRORS]) + more)


def questions_sha256(questions: Sequence[Question]) -> str:
    """Tells lists of questions apart, in whatever form and place they are written."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr(dataclasses.astuple(dataclasses.replace(question, source=""))).encode())
    return digest.hexdigest()[:16]


def video_path(name: str, field: str = "video") -> str:
    """A path below a folder, normalised; QuestionError for one that is absolute or leaves the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not name.strip() or any(ord(c) < 32 for c in name):
        raise QuestionError(f"{field}: {name!r:.200} is not a file name")
    if path.is_absolute() or re.match(r"[A-Za-z]:[\\/]", name) or ".." in path.parts:
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
            if match and (match[1] or match[2]) == LETTERS[len(options) : len(options) + 1]:
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


def option_lines(options: Sequence[str]) -> list[str]:
    """'A. ..', 'B. ..' and so on; raises QuestionError for more options than there are letters."""
    if len(options) > len(LETTERS):
        raise QuestionError(f"options: there are {len(options)}, at most {len(LETTERS)} can be asked")
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]


def _of_plain_row(row: Mapping) -> dict:
    """The TSPO-10K form of a row written by hand: question, options, answer."""
    options = row.get("options")
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise QuestionError(f"options: must be a list of texts, at least two, not {options!r:.60}")
    if len(options) < 2:
        raise QuestionError(f"options: {len(options)} given, at least two are needed")
    options = _without_letters([option.strip() for option in options])
    question, answer = text_field(row, "question"), text_field(row, "answer").strip()
    same = [letter for letter, option in zip(LETTERS, options, strict=False) if option == answer]
    if len(same) == 1 and len(answer) == 1 and answer != same[0] and answer in LETTERS[: len(options)]:
        raise QuestionError(f"answer: {answer!r} is the letter of one option and the text of another")
    named = same[0] if len(same) == 1 else solution_of_option(answer.upper() if len(answer) == 1 else answer)
    if named not in list(LETTERS[: len(options)]):
        raise QuestionError(f"answer: {answer!r:.60} is neither the letter nor the text of one of the options")
    text = "\n".join([question, *option_lines(options)])
    if split_options(text.replace("\r\n", "\n"))[1] != tuple(option.replace("\r\n", "\n") for option in options):
        raise QuestionError("options: a line of one of them begins as an option does ('A. ...')")
    return {
        "type": "general",
        **row,
        "original_question": text,
        "solution": f"<answer>{named.lower()}</answer>",
    }


def _without_letters(options: Sequence[str]) -> list[str]:
    """Options without the letters that all of them begin with; raises QuestionError where another order has them."""
    found = [re.fullmatch(r"(?:\(([A-Z])\)|([A-Z])[.):])\s+(\S.*)", option, re.DOTALL) for option in options]
    letters = [match[1] or match[2] for match in found if match]
    if sorted(letters) != list(LETTERS[: len(options)]):
        return list(options)
    if letters != sorted(letters):
        raise QuestionError(f"options: they begin with their letters, but in the order {', '.join(letters)}")
    return [match[3] for match in found]


def row(id: str, video: str, stem: str, options: Sequence[str], answer: str, kind: str) -> dict:
    """A line of a TSPO-10K file; `answer` is the letter."""
    lines = option_lines(options)
    right = lines[LETTERS.index(answer)]
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
    if "question" in row and "original_question" not in row:
        row = _of_plain_row(row)
    texts = {field: text_field(row, field) for field in ("video", "original_question", "solution", "type")}
    if row.get("family") is not None:
        text_field(row, "family")
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
    answer = solution_letter(texts["solution"], len(options))
    # The original takes the first lone letter: of "a forest" its article.
    named = solution_of_option(re.sub("</?answer>", "", texts["solution"]).upper())
    if answer != named or named not in list(LETTERS[: len(options)]):
        last = LETTERS[: len(options)][-1]
        raise QuestionError(f"solution: {texts['solution']!r:.60} does not name one of the options A-{last}")
    evidence = tuple(_spans(row.get("evidence") or []))
    targets, cues = (_names(row, field) for field in ("targets", "cues"))
    return Question(
        index,
        video,
        query,
        question,
        options,
        answer,
        texts["type"],
        source,
        row.get("family"),
        evidence,
        targets,
        cues,
    )


def _json_object(line: bytes) -> dict | QuestionError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return QuestionError(f"line: not UTF-8 ({error})")
    except (ValueError, RecursionError) as error:
        return QuestionError(f"line: not valid json ({error})")
    return row if isinstance(row, dict) else QuestionError(f"line: {_is_no_object(row)}")


def _is_no_object(row: object) -> str:
    return f"is not a json object but {type(row).__name__}"


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


def _names(row: dict, field: str) -> tuple[str, ...]:
    names = row.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise QuestionError(f"{field}: must be a list of names, not {names!r:.60}")
    return tuple(names)


def _spans(value: object) -> Iterator[tuple[float, float]]:
    for span in value if isinstance(value, list) else [value]:
        numbers = isinstance(span, list) and len(span) == 2 and all(type(x) in (int, float) for x in span)
        if not numbers or not all(map(math.isfinite, span)) or not 0 <= span[0] <= span[1]:
            raise QuestionError(f"evidence: must be [[start, end], ...] in seconds, not {span!r:.60}")
        yield float(span[0]), float(span[1])
