"""LLaVA-Video-178K's own annotation files: conversations about a video, flattened into turns.

A file is a JSON list (or one object per line) of records {"id", "conversations": [{"from": "human", "value"}, {"from":
"gpt", "value"}, ...], "data_source": bucket, "video": path below the bucket's folder}. Names of files tell what is
asked: `*_mc_*` multiple choice, `*_oe_*` open-ended, `*_cap_*` captions; with other names, each turn's text does.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tspo_jax.data.letters import LETTERS
from tspo_jax.data.questions import (
    QuestionError,
    raise_if_bad,
    solution_of_option,
    split_options,
    text_field,
    video_path,
    without_tags,
)

MULTIPLE_CHOICE, OPEN_ENDED, CAPTION = "multiple_choice", "open_ended", "caption"
_KIND_OF_FILE = {"mc": MULTIPLE_CHOICE, "oe": OPEN_ENDED, "cap": CAPTION}
_RECORD_STARTS = re.compile(r'\{\s*"(?:id|conversations|data_source|video)"\s*:')
_FILLING = re.compile(r"[\s,\[\]]*")


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question about a video and its answer.

    Attributes:
      id: 'bucket/record#turn', unique: turns are counted through the records of one id.
      video: path below the data set's folder, its bucket first.
      kind: MULTIPLE_CHOICE, OPEN_ENDED or CAPTION.
      stem: the question without its options.
      options: of multiple choice, without letters.
      answer: upper-case letter of the right option, else the answer's text.
      source: 'file:line: record n', for messages.
    """

    id: str
    video: str
    kind: str
    stem: str
    options: tuple[str, ...]
    answer: str
    source: str


def read_conversations(path: str | Path, strict: bool = True, max_bad: float = 1.0) -> tuple[list[Turn], list[str]]:
    """The turns of a file's good records in order, and one message 'file:line: record n: field: reason' per bad one.

    A record is good as a whole or not at all. Where the JSON itself is broken, reading goes on at the next record.
    Raises QuestionError where strict and a record is bad, where bad ones are more than `max_bad` (a share), and always
    where none is good.
    """
    path = Path(path)
    turns, errors, of_id = [], [], {}
    kind = next((_KIND_OF_FILE[part] for part in re.split(r"[_.]", path.name) if part in _KIND_OF_FILE), None)
    records = _records(path.read_bytes().decode("utf-8-sig", errors="surrogateescape"))
    for number, (line, record) in enumerate(records, start=1):
        source = f"{path}:{line}: record {number}"
        try:
            if isinstance(record, QuestionError):
                raise record
            new = turns_of_record(record, kind, source)
            earlier = of_id.setdefault(new[0].id, [])
            _check_same_id(new, earlier)
            turns += [dataclasses.replace(turn, id=f"{turn.id}#{i}") for i, turn in enumerate(new, start=len(earlier))]
            earlier += new
        except QuestionError as error:
            errors.append(f"{source}: {error}")
    raise_if_bad(path, turns, errors, strict, max_bad)
    return turns, errors


def _check_same_id(new: list[Turn], earlier: list[Turn]) -> None:
    """The id is the video's: its records may share it, but with different questions."""
    asked = {(turn.stem, turn.options) for turn in earlier}
    if earlier and earlier[0].video != new[0].video:
        raise QuestionError(f"id: {new[0].id!r} is also the id of another video: {earlier[0].source}")
    if all((turn.stem, turn.options) in asked for turn in new):
        raise QuestionError(f"id: {new[0].id!r} has been asked all of this before: {earlier[0].source}")


def _records(text: str) -> Iterator[tuple[int, object]]:
    """(line, record or QuestionError) of every JSON value of a list, or of one per line."""
    decoder, position, line, counted = json.JSONDecoder(), 0, 1, 0
    while (position := _FILLING.match(text, position).end()) < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            record = QuestionError(f"json: not valid ({error})")
            following = _RECORD_STARTS.search(text, position + 1)
            position = following.start() if following else len(text)
        yield line, record


def turns_of_record(record: object, kind: str | None, source: str) -> list[Turn]:
    """The turns of one record, with its id; `kind` is that of its file, None = by each turn. Raises QuestionError."""
    if not isinstance(record, dict):
        raise QuestionError(f"json: is not an object but {type(record).__name__}")
    name, bucket, video = (text_field(record, field) for field in ("id", "data_source", "video"))
    video = video_path(video)
    if not video.startswith(f"{bucket}/"):
        video = video_path(f"{bucket}/{video}", "data_source")
    said = record.get("conversations")
    if not isinstance(said, list) or not said or len(said) % 2:
        raise QuestionError("conversations: must be a list of turns in pairs, human then gpt")
    turns = []
    for i in range(0, len(said), 2):
        question, answer = (_said(said, i + j, who) for j, who in enumerate(("human", "gpt")))
        turns.append(_turn(f"{bucket}/{name}", video, kind, question, answer, source))
    return turns


def _said(said: list, position: int, who: str) -> str:
    field = f"conversations[{position}]"
    if not isinstance(said[position], dict) or said[position].get("from") != who:
        raise QuestionError(f"{field}: must be an object with from = {who!r}")
    try:
        return text_field(said[position], "value")
    except QuestionError as error:
        raise QuestionError(f"{field}.{error}") from None


def _turn(name: str, video: str, kind: str | None, question: str, answer: str, source: str) -> Turn:
    stem, options = split_options(without_tags(question, "conversations"))
    letter = solution_of_option(answer)
    if kind is None:
        kind = MULTIPLE_CHOICE if options and letter else OPEN_ENDED
    if kind != MULTIPLE_CHOICE:
        stem, options = without_tags(question, "conversations").strip(), ()
    if not stem:
        raise QuestionError("conversations: a question is empty")
    if kind == MULTIPLE_CHOICE:
        if not options:
            raise QuestionError("conversations: a multiple-choice question has no options (lines 'A. ...', 'B. ...')")
        if letter not in list(LETTERS[: len(options)]):
            raise QuestionError(f"conversations: the answer {answer!r:.60} does not name one of the options")
    return Turn(name, video, kind, stem, options, letter if kind == MULTIPLE_CHOICE else answer.strip(), source)
