"""LongVideoBench, MLVU, Video-MME and LVBench: their annotation files, prompts, answer letters and metrics.

A further benchmark is one reader and one line of BENCHMARKS. Prompts are those that produced the published TSPO
numbers (lmms-eval with TSPO's adapters, no subtitles). Answers are read by one of two protocols:

  published  exactly as in the published numbers, slips included: any capital letter counts, even that of a word;
             two pairs of phrases are fused by a missing comma (MLVU, Video-MME); an answer of LongVideoBench without
             a letter is given a random one (here a function of the seed and the question's id).
  strict     what is stated last and plainly, as a person would read it (letters.stated_letter); no letter is wrong.
"""

import dataclasses
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from tspo_jax.data.letters import LETTERS, stated_letter

PROTOCOLS = ("published", "strict")
POSITION_FPS = 24  # LongVideoBench counts `position` in frames at 24 fps, whatever the video's own rate

_PHRASES = ("The best answer is", "The correct answer is", "The answer is", "The answer")
_SEPARATE = (*_PHRASES, "The best option is", "The correct option is", "Best answer:", "Best option:")
_FUSED = (*_PHRASES, "The best option isThe correct option is", "Best answer:Best option:")


class BenchmarkError(ValueError):
    """An annotation or index file that cannot be used; the text names file, item and field."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      id: unique within the benchmark.
      video: file name.
      query: what the agent sees: the question without options.
      prompt: what the answerer sees after the image token.
      options: texts, in the order of the letters.
      answer: letter.
      groups: grouping -> the labels of this question (several only for LVBench's question types).
      duration, fps: of the video, in seconds and frames per second; None where the file does not say.
      moments: annotated evidence, spans in seconds (start = end for a point in time).
      targets, cues: names of what a search of the video looks for, and of what may be near it.
    """

    id: str
    video: str
    query: str
    prompt: str
    options: tuple[str, ...]
    answer: str
    groups: Mapping[str, tuple[str, ...]]
    duration: float | None = None
    fps: float | None = None
    moments: tuple[tuple[float, float], ...] = ()
    targets: tuple[str, ...] = ()
    cues: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How to read, ask and score one benchmark.

    Attributes:
      read: rows of the annotation file -> items.
      id_fields: the fields of a row of an index file that make up an item's id.
      published_letter: answer, random generator -> letter, "" where there is none.
      max_new_tokens: of the published runs.
      selection: method of the published runs (64 frames, window 12).
      tolerances: seconds around a moment within which a frame counts as a hit.
      published_options: a question may have where its answers are read as in the published runs.
      macro: grouping whose mean over labels is reported as `macro`, if any.
    """

    read: Callable[[Sequence["Row"]], Iterator[Item]]
    id_fields: tuple[str, ...]
    published_letter: Callable[[str, random.Random], str]
    max_new_tokens: int
    selection: str = "topk"
    tolerances: tuple[float, ...] = (1, 2, 5)
    macro: str | None = None
    published_options: int = len(LETTERS)


def read_items(benchmark: str, path: str | Path, protocol: str = "strict") -> list[Item]:
    """Items of an annotation file in file order, whose answers will be read by this protocol. Raises BenchmarkError
    with file, item and field."""
    known = lookup(benchmark).published_options if protocol == "published" else len(LETTERS)
    items = list(lookup(benchmark).read(read_rows(path)))
    if not items:
        raise BenchmarkError(f"{path}: no question")
    seen = set()
    for item in items:
        if item.id in seen:
            raise BenchmarkError(f"{path}: question {item.id} occurs twice")
        if len(item.options) > len(LETTERS):
            count = len(item.options)
            raise BenchmarkError(
                f"{path}: question {item.id}: has {count} options, at most {len(LETTERS)} can be asked"
            )
        if len(item.options) > known:
            raise BenchmarkError(
                f"{path}: question {item.id}: has {len(item.options)} options; the published runs knew {known} "
                "letters: take config.evaluation.protocol=strict"
            )
        if item.answer not in tuple(LETTERS[: len(item.options)]):
            raise BenchmarkError(f"{path}: question {item.id}: answer {item.answer!r} is not among its options")
        seen.add(item.id)
    return items


def queries_by_video(
    benchmark: str, path: str | Path, names: Sequence[str], allow_missing: bool
) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """What an annotation file asks of the videos that are there: video -> (item id, query)s; and which are not there,
    in words, "" for none.

    Raises: BenchmarkError where videos are missing that may not be, or all are.
    """
    asked: dict[str, list[tuple[str, str]]] = {}
    for item in read_items(benchmark, path):
        asked.setdefault(item.video, []).append((item.id, item.query))
    absent = sorted(asked.keys() - set(names))
    if not absent:
        return asked, ""
    told = f"{len(absent)} videos of {path} are missing: {', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}"
    if not allow_missing or len(absent) == len(asked):
        raise BenchmarkError(f"{told}; or --allow_missing")
    return {video: questions for video, questions in asked.items() if video in names}, told


def lookup(benchmark: str) -> Benchmark:
    if benchmark not in BENCHMARKS:
        raise BenchmarkError(f"benchmark is {benchmark!r}, not one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[benchmark]


# ---- readers ---------------------------------------------------------------------------------------------


class Row(dict):
    """A row of an annotation or index file that names itself and its field where that is missing or of another type.

    `where` says which row it is.
    """

    def __init__(self, row: dict, where: str):
        if not isinstance(row, dict):
            raise BenchmarkError(f"{where} is not a JSON object")
        super().__init__(row)
        self.where = where

    def __missing__(self, field):
        raise BenchmarkError(f"{self.where}: field {field!r} is missing; is this another version of the benchmark?")

    def read(self, field: str, kind: type | UnionType) -> Any:
        """The value of a field; raises BenchmarkError unless it is of this type."""
        value = self[field]
        if not isinstance(value, kind):
            wanted = getattr(kind, "__name__", str(kind))
            raise BenchmarkError(f"{self.where}: field {field!r} is {_short(value)}, which is not of type {wanted}")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts, at least one."""
        values = self.read(field, list)
        if not values or not all(isinstance(value, str) for value in values):
            raise BenchmarkError(f"{self.where}: field {field!r} is {_short(self[field])}, not a list of texts")
        return tuple(values)

    def positive(self, field: str) -> float:
        """A finite number above 0."""
        value = self[field]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise BenchmarkError(f"{self.where}: field {field!r} is {_short(value)}, not a number above 0")
        return float(value)

    def numbers(self, field: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self.read(field, list)
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise BenchmarkError(f"{self.where}: field {field!r} is {_short(self[field])}, not a list of numbers")
        return tuple(values)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSON list or of JSON lines. Raises BenchmarkError where the file is neither."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        is_list, lines = text.lstrip().startswith("["), text.split("\n")  # a text may hold other ends of lines
        rows = json.loads(text) if is_list else [json.loads(line) for line in lines if line.strip()]
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path}: not JSON ({error})") from None
    return [Row(row, f"{path}: item {i}{_named(row)}") for i, row in enumerate(rows)]


def _named(row: object) -> str:
    """How a row calls itself, in brackets; nothing where it has no name."""
    names = (row.get(field) for field in ("id", "question_id", "key")) if isinstance(row, dict) else ()
    return next((f" ({name})" for name in names if name is not None), "")


def _longvideobench(rows: Sequence[Row]) -> Iterator[Item]:
    for row in rows:
        options, question = row.texts("candidates"), row.read("question", str)
        right, duration = row.read("correct_choice", int), row.positive("duration")
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        # One position of the published file is corrupt: far behind the end of its video.
        seconds = [p / POSITION_FPS for p in row.numbers("position")]
        count = len(seconds)
        groups = {
            "duration_group": str(row["duration_group"]),
            "level": row.read("level", str),
            "num_moments": str(count) if count < 4 else "4+",
            "question_category": row.read("question_category", str),
            "topic_category": row.read("topic_category", str),
        }
        yield Item(
            id=row.read("id", str),
            video=row.read("video_path", str),
            query=question,
            prompt=f"{question}\n{lines}\nAnswer with the option's letter from the given choices directly.\n",
            options=options,
            answer=LETTERS[right : right + 1] if right >= 0 else "",
            groups={name: (label,) for name, label in groups.items()},
            duration=duration,
            moments=tuple((t, t) for t in seconds if t <= 1.05 * duration),
        )


def _mlvu(rows: Sequence[Row]) -> Iterator[Item]:
    for row in rows:
        question = row.read("question", str)
        yield Item(
            id=row.read("question_id", str),
            video=row.read("video_name", str),
            query=stem(question),
            prompt=f"\n{question}\nOnly give the best option.\n\nBest option: (",
            options=row.texts("candidates"),
            answer=row.read("answer", str),
            groups={"task_type": (row.read("task_type", str),)},
            duration=row.positive("duration"),
        )


def _videomme(rows: Sequence[Row]) -> Iterator[Item]:
    for row in rows:
        question, options = row.read("question", str), row.texts("options")
        lines, letters = "\n".join(options), LETTERS[: max(4, len(options))]
        yield Item(
            id=row.read("question_id", str),
            video=f"{row.read('videoID', str)}.mp4",
            query=question.replace("\n", " "),
            # The published runs had no subtitles; their prompt speaks of them all the same.
            prompt="Select the best answer to the following multiple-choice question based on the video and the "
            f"subtitles. Respond with only the letter ({', '.join(letters[:-1])}, or {letters[-1]}) of the correct "
            "option.\n"
            f"{question}\n{lines}\n\nAnswer with the option's letter from the given choices directly.",
            options=tuple(re.sub(r"^[A-Z]\. ", "", option) for option in options),
            answer=row.read("answer", str),
            groups={name: (row.read(name, str),) for name in ("duration", "domain", "sub_category", "task_type")},
        )


def _lvbench(rows: Sequence[Row]) -> Iterator[Item]:
    for video in rows:
        key, info = video.read("key", str), Row(video["video_info"], f"{video.where}, video_info")
        seconds, fps = 60 * info.positive("duration_minutes"), info.positive("fps")
        for qa in video.read("qa", list):
            row = Row(qa, f"{video.where}, question {qa.get('uid') if isinstance(qa, dict) else qa!r}")
            question, moments = row.read("question", str), _time_reference(row.read("time_reference", str))
            length = "none" if not moments else "<= 60 s" if moments[0][1] - moments[0][0] <= 60 else "> 60 s"
            yield Item(
                id=f"{key}{row['uid']}",
                video=f"{key}.mp4",
                query=stem(question),
                # Neither LVBench nor TSPO gives a prompt; this is the one of lmms-eval's own LVBench task.
                prompt=f"{question}\nAnswer the question with the option letter",
                options=tuple(re.findall(r"\n\([A-Z]\) ?(.*)", question)),
                answer=row.read("answer", str),
                groups={
                    "question_type": row.texts("question_type"),
                    "video_type": (video.read("type", str),),
                    "reference_length": (length,),
                },
                duration=seconds,
                fps=fps,
                moments=moments,
            )


def stem(question: str) -> str:
    """A question without its options "(A) ..".."""
    return re.split(r"\n\(A\)", question)[0].rstrip()


def _time_reference(text: str) -> tuple[tuple[float, float], ...]:
    """'MM:SS-MM:SS' -> one span in seconds, none where an end is missing; the file has 13 with swapped ends."""
    ends = re.fullmatch(r"((?:\d+:)+\d+)-((?:\d+:)+\d+)", text.strip())
    if not ends:
        return ()
    seconds = [float(np.polyval([int(part) for part in end.split(":")], 60)) for end in ends.groups()]
    return ((min(seconds), max(seconds)),)


def permuted(item: Item, order: Sequence[int]) -> Item:
    """The question with option order[i] in place i; prompt and right letter accordingly.

    Raises BenchmarkError where the prompt does not hold the options one after the other, each behind its letter.
    """
    parts, rest = [], item.prompt
    for letter, option, new in zip(LETTERS, item.options, order, strict=False):
        found = re.search(rf"^(?:\({letter}\)|{letter}[.):])[^\S\n]*(?={re.escape(option)})", rest, re.MULTILINE)
        if not found:
            raise BenchmarkError(f"question {item.id}: option {letter} is not in its prompt, so it cannot be moved")
        parts += [rest[: found.end()], item.options[new]]
        rest = rest[found.end() + len(option) :]
    right = list(order).index(LETTERS.index(item.answer))
    options = tuple(item.options[new] for new in order)
    return dataclasses.replace(item, prompt="".join([*parts, rest]), options=options, answer=LETTERS[right])


# ---- answers ---------------------------------------------------------------------------------------------


def answer_letter(benchmark: str, item: Item, text: str, protocol: str = "strict", seed: int = 0) -> str | None:
    """The option that an answer names, None where it names none.

    Args:
      benchmark: "" = none: questions of one's own, which no run was published for and which are read strictly.

    Raises BenchmarkError for an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise BenchmarkError(f"protocol is {protocol!r}, not one of {', '.join(PROTOCOLS)}")
    if protocol == "published" and benchmark:
        return lookup(benchmark).published_letter(text, random.Random(f"{seed} {item.id}")) or None
    return stated_letter(text, item.options)


def _first_capital(letters: str, phrases: Sequence[str], guess: str = "") -> Callable[[str, random.Random], str]:
    """The first of `letters` anywhere in the answer without the phrases, else a random one of `guess`."""

    def letter(text: str, rng: random.Random) -> str:
        for phrase in phrases:
            text = text.replace(phrase, "")
        found = re.search(f"[{letters}]", text)
        if found:
            return found[0]
        return rng.choice(guess) if guess else ""

    return letter


def _lvbench_letter(text: str, rng: random.Random) -> str:
    """LVBench's own cleaning: before ')', after '(', first word, first character."""
    words = text.split(")")[0].split("(")[-1].split()
    return words[0][0] if words else ""


# ---- metrics ---------------------------------------------------------------------------------------------


def accuracies(benchmark: str, items: Sequence[Item], letters: Mapping[str, str | None]) -> dict:
    """Accuracy in [0, 1], overall (every question counts the same) and by every grouping.

    Args:
      benchmark: name.
      items: all questions.
      letters: item id -> letter; questions without an entry are left out of every mean (and counted).

    Returns: {"n", "missing", "overall", "groups": {grouping: {label: {"n", "accuracy"}}}} and, for MLVU, "macro", the
      mean of its task accuracies ("overall" is its micro average). A question of LVBench counts for each of its types.

    Raises: BenchmarkError where nothing is answered or an id is unknown.
    """
    if unknown := letters.keys() - {item.id for item in items}:
        raise BenchmarkError(f"an answer is given for {min(unknown)!r}, which {benchmark} does not have")
    answered = [item for item in items if item.id in letters]
    if not answered:
        raise BenchmarkError("no question is answered")
    correct = [letters[item.id] == item.answer for item in answered]
    hits: dict[str, dict[str, list[bool]]] = {}
    for item, hit in zip(answered, correct, strict=True):
        for grouping, labels in item.groups.items():
            for label in labels:
                hits.setdefault(grouping, {}).setdefault(label, []).append(hit)
    groups = {
        grouping: {label: {"n": len(h), "accuracy": float(np.mean(h))} for label, h in sorted(by_label.items())}
        for grouping, by_label in hits.items()
    }
    result = {"n": len(answered), "missing": len(items) - len(answered), "overall": float(np.mean(correct))}
    if macro := lookup(benchmark).macro:
        result["macro"] = float(np.mean([group["accuracy"] for group in groups[macro].values()]))
    return {**result, "groups": groups}


BENCHMARKS = {
    "longvideobench": Benchmark(
        _longvideobench, ("id",), _first_capital("ABCDE", _SEPARATE, guess="ABCDE"), 32, published_options=5
    ),
    "mlvu": Benchmark(
        _mlvu, ("question_id",), _first_capital("ABCD", _FUSED), 16, macro="task_type", published_options=4
    ),
    "videomme": Benchmark(
        _videomme, ("question_id",), _first_capital("ABCD", _FUSED), 16, selection="bin-max", published_options=4
    ),
    "lvbench": Benchmark(_lvbench, ("key", "uid"), _lvbench_letter, 16, tolerances=(0, 2, 5)),
}
