"""Pairs of answers, as files.

A record is {"video", "prompt", "chosen", "rejected"}, the form of TPO's trainer (arXiv 2501.13919): a path or name, the
user's text, and two answers. Read are json (a list) and jsonl, whichever the name says, csv with these columns (as the
published LongVA-TPO-10k is), and yaml that lists such files: `datasets: [{json_path, sampling_strategy: all | first:N |
end:N | random:N}]`, N a number or `k%`. Every <image> in a prompt is dropped: the template has the place of the video.

Ours have more fields: `id`, `recipe`, `picks` {"chosen", "rejected"} (the frames that the answers were made from, as
[video, stored frame]), `shown` (the frames of training in the same form, where they are not evenly spaced ones of
`video`), `answer` (letter of the right option), `judge` (how each answer was judged) and `model` (identity of the
answerer's checkpoint).
"""

import csv
import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tspo_jax.data.letters import LETTERS
from tspo_jax.data.questions import (
    IMAGE_TAG,
    QuestionError,
    json_rows,
    raise_if_bad,
    split_options,
    text_field,
    video_path,
)

FIELDS = ("video", "prompt", "chosen", "rejected")
Frames = tuple[tuple[str, int], ...]  # (video, stored frame), in the order in which they are shown


@dataclasses.dataclass(frozen=True)
class Pair:
    """One question about one video with two answers; `prompt` has no image tag. See the module for the fields."""

    id: str
    video: str
    prompt: str
    chosen: str
    rejected: str
    recipe: str = ""
    answer: str = ""
    shown: Frames = ()
    evidence_picks: Frames = ()
    rejected_picks: Frames = ()

    @property
    def key(self) -> str:
        """A short hash of what the log-probabilities of the answers depend on."""
        parts = [self.video, self.prompt, self.chosen, self.rejected, [list(frame) for frame in self.shown]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_pairs(path: str | Path, strict: bool = True, max_bad: float = 1.0) -> tuple[list[Pair], list[str]]:
    """The good pairs of a file in their order, and one message 'file:line: field: reason' per bad one.

    Raises QuestionError where strict and a pair is bad, where more than `max_bad` (a share) of them are, and always
    where none is good; OSError.
    """
    path = Path(path)
    pairs, errors, first_of_id = [], [], {}
    for source, record in _records(path):
        try:
            if isinstance(record, QuestionError):
                raise record
            pair = pair_of_record(record, f"{path.stem}:{source.rsplit(':', 1)[1]}")
            if (first := first_of_id.setdefault(pair.id, source)) != source:
                raise QuestionError(f"id: {pair.id!r:.60} is also the id of {first}")
            pairs.append(pair)
        except QuestionError as error:
            errors.append(f"{source}: {error}")
    raise_if_bad(path, pairs, errors, strict, max_bad)
    return pairs, errors


def pairs_sha256(pairs: Iterable[Pair]) -> str:
    """Tells lists of pairs apart, in whatever form and place they are written."""
    return hashlib.sha256(" ".join(f"{pair.key}{pair.answer}" for pair in pairs).encode()).hexdigest()[:16]


def pair_of_record(record: Mapping[str, Any], number: str) -> Pair:
    """A pair of a record; `number` names one without an id. Raises QuestionError."""
    if not isinstance(record, Mapping):
        raise QuestionError(f"line: is not a json object but {type(record).__name__}")
    texts = {field: text_field(record, field) for field in FIELDS}
    prompt = re.sub(rf"{IMAGE_TAG}\n?", "", texts["prompt"]).strip()
    if not prompt:
        raise QuestionError("prompt: is empty without its image tag")
    chosen, rejected = (texts[field].strip() for field in ("chosen", "rejected"))
    if chosen == rejected:
        raise QuestionError(f"rejected: is equal to chosen ({chosen!r:.60}): there is nothing to prefer")
    for field in ("id", "recipe", "answer"):
        if record.get(field) is not None and not isinstance(record[field], str | int):
            raise QuestionError(f"{field}: must be a text, not {record[field]!r:.60}")
    answer = str(record.get("answer") or "").strip().upper()
    options = split_options(prompt)[1]
    if answer and answer not in list(LETTERS[: len(options) or None]):
        raise QuestionError(f"answer: must be the letter of the right option, not {record['answer']!r:.60}")
    picks = record.get("picks") or {}
    if not isinstance(picks, Mapping):
        raise QuestionError(f"picks: must be an object with chosen and rejected, not {picks!r:.60}")
    return Pair(
        id=str(record.get("id") or number),
        video=video_path(texts["video"]),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        recipe=str(record.get("recipe") or ""),
        answer=answer,
        shown=_frames(record.get("shown"), "shown"),
        evidence_picks=_frames(picks.get("chosen"), "picks.chosen"),
        rejected_picks=_frames(picks.get("rejected"), "picks.rejected"),
    )


def _frames(value: Any, field: str) -> Frames:
    def is_frame(x) -> bool:
        return isinstance(x, list) and len(x) == 2 and isinstance(x[0], str) and type(x[1]) is int and x[1] >= 0

    if value is None:
        return ()
    if not isinstance(value, list) or not all(map(is_frame, value)):
        raise QuestionError(f"{field}: must be [[video, stored frame], ...], not {value!r:.60}")
    return tuple((video_path(video, field), frame) for video, frame in value)


def _records(path: Path) -> Iterable[tuple[str, Any]]:
    """('file:number', record or QuestionError) of a file of any form."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of pairs")
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        yield from _listed(path)
    elif suffix == ".csv":
        try:
            yield from _of_table(path)
        except UnicodeDecodeError as error:
            raise QuestionError(f"{path}: is not UTF-8 ({error}); save the table as CSV UTF-8") from None
    elif suffix in (".json", ".jsonl"):
        yield from ((f"{path}:{number}", record) for number, record in json_rows(path, path.read_bytes()))
    else:
        raise QuestionError(f"{path}: pairs are .jsonl, .json, .csv or .yaml")


def _of_table(path: Path) -> Iterable[tuple[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            if missing := [field for field in FIELDS if field not in (reader.fieldnames or ())]:
                raise QuestionError(f"{path}: lacks the columns {', '.join(missing)}")
            for number, record in enumerate(reader, start=2):
                yield f"{path}:{number}", {name: value for name, value in record.items() if value not in (None, "")}
        except csv.Error as error:
            line = reader.reader.line_num
            raise QuestionError(f"{path}:{line}: line: a cell cannot be read ({error})") from None


def _listed(path: Path) -> Iterable[tuple[str, Any]]:
    """The records of the files that a yaml names, below its own folder where their paths are relative."""
    try:
        listed = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise QuestionError(f"{path}: not valid yaml ({error})".replace("\n", " ")) from None
    entries = listed.get("datasets") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "json_path" in e for e in entries):
        raise QuestionError(f"{path}: must be `datasets:` with a list of `json_path` and `sampling_strategy`")
    for entry in entries:
        file = path.parent / entry["json_path"]
        if file.suffix.lower() in (".yaml", ".yml"):
            raise QuestionError(f"{path}: {file} is a yaml as well; name the files themselves")
        yield from sampled(list(_records(file)), str(entry.get("sampling_strategy", "all")), path)


def sampled(records: list, strategy: str, source: Path) -> list:
    """`all`, `first:N`, `end:N` or `random:N` of the records; N is a number, or `k%` of them, rounded up."""
    if strategy == "all":
        return records
    match = re.fullmatch(r"(first|end|random):(\d+(?:\.\d+)?)(%?)", strategy)
    if not match or (not match[3] and "." in match[2]):
        raise QuestionError(f"{source}: sampling_strategy {strategy!r} is not all, first:N, end:N or random:N")
    count = -int(-float(match[2]) * len(records) // 100) if match[3] else int(match[2])
    if match[1] == "random":
        return random.Random(42).sample(records, min(count, len(records)))
    return records[:count] if match[1] == "first" else records[max(len(records) - count, 0) :]


def length_only_accuracy(lengths: Iterable[tuple[int, int]]) -> float:
    """Share of pairs (tokens of chosen, of rejected) that the better of "longer wins" and "shorter wins" ranks right;
    equal lengths count half."""
    lengths = list(lengths)
    longer = sum((a > b) + 0.5 * (a == b) for a, b in lengths) / max(len(lengths), 1)
    return max(longer, 1 - longer)
