"""Index files: the published ones in and out again, MLVU's join, the neutral form, and what is wrong in bad ones."""

import ast
import csv
import json
import random

import pytest

from tspo_jax.evaluation import benchmarks, frame_indices
from tspo_jax.evaluation.benchmarks import BenchmarkError, Item
from tspo_jax.evaluation.frame_indices import Selection

PUBLISHED = {
    "longvideobench": ("lvb_val.json", "TSPO_LongVideoBench_frameIdx.json"),
    "mlvu": ("mlvu.json", "TSPO_MLVU_frameIdx.json"),
    "videomme": ("videomme.json", "TSPO_VideoMME_frameIdx.json"),
}


@pytest.mark.parametrize("benchmark", PUBLISHED)
def test_published_files_come_out_as_they_went_in(annotations, tmp_path, benchmark):
    """Read, written as JSON lines, read again, written in the published form: equal to the file of the authors."""
    plain, published = (annotations / name for name in PUBLISHED[benchmark])
    items = benchmarks.read_items(benchmark, plain)
    selections = frame_indices.read(published, benchmark, items)
    frame_indices.write_neutral(tmp_path / "neutral.jsonl", list(selections.values()))
    again = frame_indices.read(tmp_path / "neutral.jsonl", benchmark, items)
    assert again == selections
    frame_indices.write_published(tmp_path / "published.json", benchmark, plain, again)
    assert json.loads((tmp_path / "published.json").read_text()) == json.loads(published.read_text())


def test_mlvu_is_joined_by_video_question_and_options(annotations, tmp_path):
    """Selections numbered and ordered as in the TSV file, from which the published ones were made."""
    items = benchmarks.read_items("mlvu", annotations / "mlvu.json")
    published = frame_indices.read(annotations / "TSPO_MLVU_frameIdx.json", "mlvu", items)
    by_text = {(item.video, " ".join(item.query.split()), item.options): item.id for item in items}
    with open(annotations / "MLVU.tsv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows:
        options = tuple(map(str, ast.literal_eval(row["candidates"])))
        row["frame_idx"] = published[by_text[row["video_name"], " ".join(row["question"].split()), options]].frame_idx
    assert {row["question_id"] for row in rows} == {"0"}  # so joining by it would put one selection everywhere
    random.Random(0).shuffle(rows)
    path = tmp_path / "by_tsv.json"
    path.write_text(json.dumps(rows))
    joined = frame_indices.read(path, "mlvu", items)
    assert {i: s.frame_idx for i, s in joined.items()} == {i: s.frame_idx for i, s in published.items()}


def test_lvbench_has_its_questions_in_a_list_per_video(annotations, tmp_path):
    plain = annotations / "video_info.meta.jsonl"
    items = benchmarks.read_items("lvbench", plain)
    selections = {item.id: Selection(item.id, item.video, (0, i + 1)) for i, item in enumerate(items)}
    frame_indices.write_published(tmp_path / "lvbench.jsonl", "lvbench", plain, selections)
    read = frame_indices.read(tmp_path / "lvbench.jsonl", "lvbench", items)
    assert {i: s.frame_idx for i, s in read.items()} == {i: s.frame_idx for i, s in selections.items()}


ITEMS = [
    Item("q0", "v.mp4", "What?", "What?", ("x", "y"), "A", {}),
    Item("q1", "w.mp4", "What?", "What?", ("x", "y"), "A", {}),
]
ROWS = [
    {"question_id": "q0", "video_id": "v.mp4", "frame_idx": [0, 30], "timestamps": [0.0, 1.0], "fps": 30},
    {"question_id": "q1", "video_id": "w", "frame_idx": [0.0], "scores": [0.5], "method": "aks"},
]


def write(tmp_path, *rows):
    (tmp_path / "idx.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "idx.jsonl"


def test_neutral_form(tmp_path):
    read = frame_indices.read(write(tmp_path, *reversed(ROWS)), "", ITEMS)
    assert list(read.values()) == [
        Selection("q0", "v.mp4", (0, 30), (0.0, 1.0), 30.0),
        Selection("q1", "w.mp4", (0,), scores=(0.5,), method="aks"),
    ]
    frame_indices.write_neutral(tmp_path / "new" / "out.jsonl", list(read.values()))
    first = json.loads((tmp_path / "new" / "out.jsonl").read_text().splitlines()[0])
    assert first == {
        "video_id": "v.mp4", "question_id": "q0", "frame_idx": [0, 30], "timestamps": [0.0, 1.0], "fps": 30.0,
        "scores": None, "method": None, "versions": {},
    }  # fmt: skip


def test_one_of_several_selections_of_an_evaluation(tmp_path):
    rows = [
        {"id": item.id, "video": item.video, "method": method, "k": k, "frame_idx": list(range(k))}
        for item in ITEMS
        for method in ("uniform", "topk")
        for k in (2, 3)
    ]
    path = write(tmp_path, *rows)
    read = frame_indices.read(path, "", ITEMS, "topk", 3)
    assert {(s.method, s.frame_idx) for s in read.values()} == {("topk", (0, 1, 2))}
    with pytest.raises(
        BenchmarkError, match=r"item 1 \(q0\): question q0 has a second selection; .*convert_indices --method=NAME"
    ):
        frame_indices.read(path, "", ITEMS)


def test_rows_of_other_questions_are_passed_over(tmp_path):
    path = write(tmp_path, ROWS[0], {"question_id": "q7", "frame_idx": [0]}, ROWS[1])
    assert list(frame_indices.read(path, "", ITEMS[:1])) == ["q0"]
    # MLVU's TSV file calls all its questions 0.
    rows = [{"index": "q1", "question_id": "0", "video_id": "w.mp4", "frame_idx": [3]}]
    assert frame_indices.read(write(tmp_path, *rows), "", ITEMS[1:])["q1"].frame_idx == (3,)


def test_missing_rows(tmp_path):
    path = write(tmp_path, ROWS[1])
    assert list(frame_indices.read(path, "", ITEMS, allow_missing=True)) == ["q1"]
    with pytest.raises(BenchmarkError, match=r"no row for question q0 \(1 of 2 are missing\)"):
        frame_indices.read(path, "", ITEMS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_idx": [2, 1]}, r"item 0 \(q0\): frame_idx must be ascending frame numbers, at least one"),
        ({"frame_idx": [0, 1.5]}, r"item 0 \(q0\): frame_idx must be ascending frame numbers"),
        ({"frame_idx": None}, r"item 0 \(q0\): field 'frame_idx' is None"),
        ({"timestamps": [0.0]}, r"item 0 \(q0\): field 'timestamps' has 1 values for 2 frames"),
        ({"fps": 0}, r"item 0 \(q0\): field 'fps' is 0, not a frame rate"),
        ({"video_id": "w.mp4"}, r"item 0 \(q0\): question q0 is about v.mp4, the row about w.mp4"),
        ({"question_id": "q7"}, r"item 0 \(q7\): no question of the benchmark has its question_id"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    with pytest.raises(BenchmarkError, match=message):
        frame_indices.read(write(tmp_path, ROWS[0] | change, ROWS[1]), "", ITEMS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "v.mp4", "question": 3, "options": ["x", "y"]}, "field 'question' is 3, which is not of type str"),
        ({"video": "v.mp4", "question": "What?", "options": "['x', "}, "field 'options' is not a list of texts"),
        (
            {"video": "v.mp4", "question": "What?", "candidates": 3},
            "field 'candidates' is 3, which is not of type list",
        ),
        ({"key": "v", "qa": None}, "field 'qa' is None"),
        ({"key": "v", "qa": ["What?"]}, "question 0 is not a JSON object"),
    ],
)
def test_rows_without_an_id_that_are_no_question(tmp_path, row, message):
    with pytest.raises(BenchmarkError, match=message):
        frame_indices.read(write(tmp_path, row | {"frame_idx": [0]}), "", ITEMS)


def test_a_frame_behind_the_end():
    Selection("q0", "v.mp4", (0, 99)).check_inside(100)
    with pytest.raises(BenchmarkError, match="question q0: frame 100 was chosen, but video v.mp4 has 100 frames"):
        Selection("q0", "v.mp4", (0, 100)).check_inside(100)
