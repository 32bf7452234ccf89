"""Chosen frames as files: those of others as selections, ours for any other tool.

Two forms are read and written:

  published  the benchmark's own annotation file with `frame_idx` in every question (frame numbers of the video,
             ascending, as floats), as the TSPO authors publish their selections and their lmms-eval fork reads them;
  neutral    JSON lines, one per question: video_id, question_id, frame_idx, timestamps (seconds), fps, scores (of the
             chosen frames), method, versions. Fields that are not known are null.

The lines of an evaluation (rows.jsonl) are read too. A row belongs to the question with its id; a row without such an
id, or with one that the benchmark does not use, to the question with its video, text and options. MLVU needs that: the
selections of its TSV file are numbered otherwise than its JSON file, and in another order.
"""

import ast
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from tspo_jax.data.video_files import without_video_suffix
from tspo_jax.evaluation import benchmarks
from tspo_jax.evaluation.benchmarks import BenchmarkError, Item, Row

# Fields that hold the file name of the video, with or without suffix; the first that a row has counts. The `video_id`
# of Video-MME is a running number, its `videoID` the name.
_VIDEO_FIELDS = ("video_path", "video_name", "videoID", "key", "video_id", "video")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Frames chosen for one question.

    Attributes:
      question_id, video_id: as in the benchmark's items; the video is a file name.
      frame_idx: frame numbers of the video, ascending.
      timestamps: seconds; fps: of the video; scores: of these frames. None where not known.
      method: that chose them, "" where not known.
      versions: program -> version.
    """

    question_id: str
    video_id: str
    frame_idx: tuple[int, ...]
    timestamps: tuple[float, ...] | None = None
    fps: float | None = None
    scores: tuple[float, ...] | None = None
    method: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check_inside(self, num_video_frames: int) -> None:
        """Raises BenchmarkError where a frame lies behind the end of the video."""
        if self.frame_idx[-1] >= num_video_frames:
            raise BenchmarkError(
                f"question {self.question_id}: frame {self.frame_idx[-1]} was chosen, but video {self.video_id} has "
                f"{num_video_frames} frames; the selection is of another file of this video"
            )


def our_versions() -> dict[str, str]:
    """What a selection of ours is labelled with."""
    try:
        own = version("tspo_jax")
    except PackageNotFoundError:
        own = "source tree"
    return {"tspo_jax": own, "jax": version("jax")}


def of_result(result: Mapping, picks: Sequence[int], video_id: str, question_id: str) -> Selection:
    """What select_frames reports for a question (selection/choosing.py), with `picks`, the indices of its frames among
    the candidates."""
    scores = result["clip_scores" if result["scores"] is None else "scores"]
    return Selection(
        question_id,
        video_id,
        tuple(result["frame_idx"]),
        tuple(result["timestamps"]),
        result["fps"],
        tuple(scores[i] for i in picks),
        result["method"],
        our_versions() | {"decoder": result["decoder"]},
    )


# ---- reading ---------------------------------------------------------------------------------------------


def read(
    path: str | Path,
    benchmark: str,
    items: Sequence[Item],
    method: str = "",
    num_frames: int = 0,
    allow_missing: bool = False,
) -> dict[str, Selection]:
    """The selections of an index file, item id -> Selection, in the order of `items`; rows of others are passed over.

    Args:
      path: file in the published or the neutral form, or rows.jsonl of an evaluation.
      benchmark: name; "" where the items are of no benchmark (their ids are `question_id`).
      method, num_frames: which selections count in a file that has several per question; "" and 0 = all.
      allow_missing: questions without a row are left out instead of being an error.

    Raises: BenchmarkError naming file, row and field.
    """
    join = _Join(benchmark, items)
    found: dict[str, Selection] = {}
    unknown: list[NoQuestionError] = []
    for row in question_rows(path):
        if (method and row.get("method", method) != method) or (num_frames and row.get("k", num_frames) != num_frames):
            continue
        try:
            item = join.item_of(row)
        except NoQuestionError as error:
            unknown.append(error)
            continue
        if item.id in found:
            raise BenchmarkError(
                f"{row.where}: question {item.id} has a second selection; take those of one method and budget with "
                "python -m tspo_jax.convert_indices --method=NAME --num_frames=K"
            )
        found[item.id] = selection(row, item.id, item.video)
    missing = [item.id for item in items if item.id not in found]
    if missing and not (allow_missing and found):
        others = f"; {len(unknown)} rows are of no question, the first: {unknown[0]}" if unknown else ""
        count = f"{len(missing)} of {len(items)} are missing"
        raise BenchmarkError(f"{path}: no row for question {missing[0]} ({count}){others}")
    return {item.id: found[item.id] for item in items if item.id in found}


def question_rows(path: str | Path) -> Iterator[Row]:
    """Rows of single questions: LVBench has its questions in a list per video."""
    for row in benchmarks.read_rows(path):
        if "qa" not in row:
            yield row
            continue
        for i, qa in enumerate(row.read("qa", list)):
            question = Row(qa, f"{row.where}, question {i}")
            yield Row({"key": row["key"]} | question, f"{row.where}, question {question.get('uid')}")


class NoQuestionError(BenchmarkError):
    """A row of an index file that is about none of the questions, or about more than one."""


class _Join:
    """Finds the item that a row of an index file is about."""

    def __init__(self, benchmark: str, items: Sequence[Item]):
        self.id_fields = benchmarks.lookup(benchmark).id_fields if benchmark else ("question_id",)
        self.by_id = {item.id: item for item in items}
        self.by_text: dict[tuple, list[Item]] = {}
        for item in items:
            self.by_text.setdefault(_text_key(item.video, item.query, item.options), []).append(item)

    def item_of(self, row: Row) -> Item:
        video = next((str(row[field]) for field in _VIDEO_FIELDS if field in row), "")
        for fields in (self.id_fields, ("question_id",), ("id",), ("index",)):
            item = self.by_id.get("".join(str(row.get(field, "")) for field in fields))
            if item and video and _name(video) != _name(item.video):
                raise BenchmarkError(f"{row.where}: question {item.id} is about {item.video}, the row about {video}")
            if item:
                return item
        options = next((field for field in ("candidates", "options") if field in row), None)
        if not video or "question" not in row or options is None:
            raise NoQuestionError(f"{row.where}: no question of the benchmark has its {' + '.join(self.id_fields)}")
        question = benchmarks.stem(row.read("question", str))
        matches = self.by_text.get(_text_key(video, question, _options(row, options)), [])
        if len(matches) != 1:
            raise NoQuestionError(f"{row.where}: {len(matches)} questions have its video {video}, question and options")
        return matches[0]


def _options(row: Row, field: str) -> tuple[str, ...]:
    """A list of texts, or a Python literal of one, as in the TSV files."""
    if isinstance(row[field], str):
        try:
            row = Row(row | {field: ast.literal_eval(row[field])}, row.where)
        except (ValueError, SyntaxError):
            raise BenchmarkError(f"{row.where}: field {field!r} is not a list of texts") from None
    return row.texts(field)


def _text_key(video: str, question: str, options: Sequence[str]) -> tuple:
    texts = (re.sub(r"^[A-Z]\. ", "", str(text)) for text in options)
    return _name(video), " ".join(question.split()), tuple(" ".join(text.split()) for text in texts)


def _name(video: str) -> str:
    return without_video_suffix(Path(video).name)


def selection(row: Row, question_id: str, video_id: str) -> Selection:
    """The selection that a row holds; raises BenchmarkError naming a field that is wrong."""
    frames = row.numbers("frame_idx")
    if not frames or frames[0] < 0 or any(f != int(f) for f in frames) or np.any(np.diff(frames) <= 0):
        raise BenchmarkError(f"{row.where}: frame_idx must be ascending frame numbers, at least one")
    times, scores = (row.numbers(name) if row.get(name) is not None else None for name in ("timestamps", "scores"))
    for name, values in (("timestamps", times), ("scores", scores)):
        if values is not None and len(values) != len(frames):
            raise BenchmarkError(f"{row.where}: field {name!r} has {len(values)} values for {len(frames)} frames")
    fps = row.get("fps")
    if fps is not None and (not isinstance(fps, int | float) or fps <= 0):
        raise BenchmarkError(f"{row.where}: field 'fps' is {fps!r}, not a frame rate")
    return Selection(
        question_id,
        video_id,
        tuple(int(frame) for frame in frames),
        times,
        None if fps is None else float(fps),
        scores,
        str(row.get("method") or ""),
        row.get("versions") or {},
    )


# ---- writing ---------------------------------------------------------------------------------------------


def write_neutral(path: str | Path, selections: Sequence[Selection]) -> None:
    """One JSON line per selection."""
    lines = []
    for chosen in selections:
        row = dataclasses.asdict(chosen) | {"method": chosen.method or None}
        lines.append(json.dumps({"video_id": row.pop("video_id"), **row}) + "\n")
    _write(path, "".join(lines))


def write_published(
    path: str | Path, benchmark: str, annotations: str | Path, selections: Mapping[str, Selection]
) -> None:
    """The annotation file with `frame_idx` in every question that has a selection (item id -> Selection)."""
    fields = benchmarks.lookup(benchmark).id_fields
    rows = [dict(row) for row in benchmarks.read_rows(annotations)]
    for row in rows:
        for question in row.get("qa", [row]):
            chosen = selections.get("".join(str((row | question)[field]) for field in fields))
            if chosen:
                question["frame_idx"] = [float(frame) for frame in chosen.frame_idx]
    by_lines = rows and "qa" in rows[0]
    _write(path, "".join(json.dumps(row) + "\n" for row in rows) if by_lines else json.dumps(rows, indent=4) + "\n")


def _write(path: str | Path, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
