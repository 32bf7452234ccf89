"""LongVideoBench, MLVU, Video-MME and LVBench: their annotation files, prompts, answer letters and metrics.

A further benchmark is one reader and one line of BENCHMARKS. Prompts are those that produced the published TSPO
numbers (lmms-eval with TSPO's adapters, no subtitles). Answers are read by one of two protocols:

  published  exactly as in the published numbers, slips included: any capital letter counts, even that of a word;
             two pairs of phrases are fused by a missing comma (MLVU, Video-MME); an answer of LongVideoBench without
             a letter is given a random one (here a function of the seed and the question's id).
  strict     only a letter that stands for an option counts, else the text of exactly one option; no letter is wrong.
"""

import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

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
      duration: of the video in seconds, None where the file does not say.
      moments: annotated evidence, spans in seconds (start = end for a point in time).
    """

    id: str
    video: str
    query: str
    prompt: str
    options: tuple[str, ...]
    answer: str
    groups: Mapping[str, tuple[str, ...]]
    duration: float | None = None
    moments: tuple[tuple[float, float], ...] = ()


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
      macro: grouping whose mean over labels is reported as `macro`, if any.
    """

    read: Callable[[Sequence["_Row"]], Iterator[Item]]
    id_fields: tuple[str, ...]
    published_letter: Callable[[str, random.Random], str]
    max_new_tokens: int
    selection: str = "topk"
    tolerances: tuple[float, ...] = (1, 2, 5)
    macro: str | None = None


def read_items(benchmark: str, path: str | Path) -> list[Item]:
    """Items of an annotation file in file order. Raises BenchmarkError with file, item and field."""
    items = list(lookup(benchmark).read(read_rows(path)))
    if not items:
        raise BenchmarkError(f"{path}: no question")
    seen = set()
    for item in items:
        if item.id in seen:
            raise BenchmarkError(f"{path}: question {item.id} occurs twice")
        if item.answer not in "ABCDEFGH"[: len(item.options)]:
            raise BenchmarkError(f"{path}: question {item.id}: answer {item.answer!r} is not among its options")
        seen.add(item.id)
    return items


def lookup(benchmark: str) -> Benchmark:
    if benchmark not in BENCHMARKS:
        raise BenchmarkError(f"benchmark is {benchmark!r}, not one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[benchmark]


# ---- readers ---------------------------------------------------------------------------------------------


class _Row(dict):
    """A row that names itself when a field is missing."""

    def __init__(self, row: dict, where: str):
        if not isinstance(row, dict):
            raise BenchmarkError(f"{where} is not a JSON object")
        super().__init__(row)
        self.where = where

    def __missing__(self, field):
        raise BenchmarkError(f"{self.where}: field {field!r} is missing; is this another version of the benchmark?")


def read_rows(path: str | Path) -> list[_Row]:
    """The rows of a JSON list or of JSON lines. Raises BenchmarkError where the file is neither."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{path}: not JSON ({error})") from None
    return [_Row(row, f"{path}: item {i}") for i, row in enumerate(rows)]


def _longvideobench(rows: Sequence[_Row]) -> Iterator[Item]:
    for row in rows:
        options = tuple(row["candidates"])
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=False))
        # One position of the published file is corrupt: far behind the end of its video.
        positions = [p / POSITION_FPS for p in row["position"] if p / POSITION_FPS <= 1.05 * row["duration"]]
        count = len(row["position"])
        groups = {
            "duration_group": str(row["duration_group"]),
            "level": row["level"],
            "num_moments": str(count) if count < 4 else "4+",
            "question_category": row["question_category"],
            "topic_category": row["topic_category"],
        }
        yield Item(
            id=row["id"],
            video=row["video_path"],
            query=row["question"],
            prompt=f"{row['question']}\n{lines}\nAnswer with the option's letter from the given choices directly.\n",
            options=options,
            answer="ABCDE"[row["correct_choice"]],
            groups={name: (label,) for name, label in groups.items()},
            duration=float(row["duration"]),
            moments=tuple((p, p) for p in positions),
        )


def _mlvu(rows: Sequence[_Row]) -> Iterator[Item]:
    for row in rows:
        yield Item(
            id=row["question_id"],
            video=row["video_name"],
            query=_stem(row["question"]),
            prompt=f"\n{row['question']}\nOnly give the best option.\n\nBest option: (",
            options=tuple(row["candidates"]),
            answer=row["answer"],
            groups={"task_type": (row["task_type"],)},
            duration=float(row["duration"]),
        )


def _videomme(rows: Sequence[_Row]) -> Iterator[Item]:
    for row in rows:
        options = "\n".join(row["options"])
        yield Item(
            id=row["question_id"],
            video=f"{row['videoID']}.mp4",
            query=row["question"].replace("\n", " "),
            # The published runs had no subtitles; their prompt speaks of them all the same.
            prompt="Select the best answer to the following multiple-choice question based on the video and the "
            "subtitles. Respond with only the letter (A, B, C, or D) of the correct option.\n"
            f"{row['question']}\n{options}\n\nAnswer with the option's letter from the given choices directly.",
            options=tuple(re.sub(r"^[A-D]\. ", "", option) for option in row["options"]),
            answer=row["answer"],
            groups={name: (row[name],) for name in ("duration", "domain", "sub_category", "task_type")},
        )


def _lvbench(rows: Sequence[_Row]) -> Iterator[Item]:
    for video in rows:
        for qa in video["qa"]:
            row = _Row(qa, f"{video.where}, question {qa.get('uid')}")
            moments = _time_reference(row["time_reference"])
            length = "none" if not moments else "<= 60 s" if moments[0][1] - moments[0][0] <= 60 else "> 60 s"
            yield Item(
                id=f"{video['key']}{row['uid']}",
                video=f"{video['key']}.mp4",
                query=_stem(row["question"]),
                # Neither LVBench nor TSPO gives a prompt; this is the one of lmms-eval's own LVBench task.
                prompt=f"{row['question']}\nAnswer the question with the option letter",
                options=tuple(re.findall(r"\n\([A-Z]\) ?(.*)", row["question"])),
                answer=row["answer"],
                groups={
                    "question_type": tuple(row["question_type"]),
                    "video_type": (video["type"],),
                    "reference_length": (length,),
                },
                duration=60 * float(video["video_info"]["duration_minutes"]),
                moments=moments,
            )


def _stem(question: str) -> str:
    return re.split(r"\n\(A\)", question)[0].rstrip()


def _time_reference(text: str) -> tuple[tuple[float, float], ...]:
    """'MM:SS-MM:SS' -> one span in seconds, none where an end is missing; the file has 13 with swapped ends."""
    ends = re.fullmatch(r"((?:\d+:)+\d+)-((?:\d+:)+\d+)", text.strip())
    if not ends:
        return ()
    seconds = [float(np.polyval([int(part) for part in end.split(":")], 60)) for end in ends.groups()]
    return ((min(seconds), max(seconds)),)


# ---- answers ---------------------------------------------------------------------------------------------


def answer_letter(benchmark: str, item: Item, text: str, protocol: str = "strict", seed: int = 0) -> str | None:
    """The option that an answer names, None where it names none.

    Raises BenchmarkError for an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise BenchmarkError(f"protocol is {protocol!r}, not one of {', '.join(PROTOCOLS)}")
    if protocol == "published":
        return lookup(benchmark).published_letter(text, random.Random(f"{seed} {item.id}")) or None
    return _strict_letter(text, item.options)


def _strict_letter(text: str, options: Sequence[str]) -> str | None:
    letters = "ABCDEFGH"[: len(options)]
    text = re.sub("|".join(map(re.escape, _SEPARATE)), " ", text, flags=re.IGNORECASE).strip()
    # Inside a sentence "A" may be the article, and then a word follows it.
    named = re.match(rf"\(?([{letters}])(?:$|[).:,])", text) or re.search(
        rf"\(([{letters}])\)|(?<![A-Za-z'])(A(?!\s+(?!is\b)[a-z])|[{letters[1:]}])(?![A-Za-z'])", text
    )
    if named:
        return next(filter(None, named.groups()))
    said = [
        letter
        for letter, option in zip(letters, options, strict=True)
        if option.strip(" .").casefold() == text.strip(" .").casefold()
    ]
    return said[0] if len(said) == 1 else None


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
    "longvideobench": Benchmark(_longvideobench, ("id",), _first_capital("ABCDE", _SEPARATE, guess="ABCDE"), 32),
    "mlvu": Benchmark(_mlvu, ("question_id",), _first_capital("ABCD", _FUSED), 16, macro="task_type"),
    "videomme": Benchmark(_videomme, ("question_id",), _first_capital("ABCD", _FUSED), 16, selection="bin-max"),
    "lvbench": Benchmark(_lvbench, ("key", "uid"), _lvbench_letter, 16, tolerances=(0, 2, 5)),
}
