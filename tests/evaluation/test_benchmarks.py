"""Readers, prompts, answer letters and metrics of the benchmarks, on their real annotations where these are present."""

import collections
import csv
import json
import random

import pytest

from tspo_jax.evaluation import benchmarks
from tspo_jax.evaluation.benchmarks import BenchmarkError, Item

FILES = {
    "longvideobench": ("lvb_val.json", "LongVideoBench.tsv"),
    "mlvu": ("mlvu.json", "MLVU.tsv"),
    "videomme": ("videomme.json", "VideoMME.tsv"),
    "lvbench": ("video_info.meta.jsonl", "LVBench.tsv"),
}


@pytest.fixture(scope="module")
def items(annotations):
    return {name: benchmarks.read_items(name, annotations / file) for name, (file, _) in FILES.items()}


def item(*options, answer="A", id="q0", **groups):
    return Item(id, "v.mp4", "What?", "What?", options, answer, {k: (v,) for k, v in groups.items()})


def test_counts(items):
    counts = {name: (len(i), len({x.video for x in i})) for name, i in items.items()}
    assert counts == {
        "longvideobench": (1337, 753),
        "mlvu": (2174, 1122),
        "videomme": (2700, 900),
        "lvbench": (1549, 103),
    }
    labels = {name: collections.Counter() for name in items}
    for name, rows in items.items():
        labels[name].update(label for row in rows for group in row.groups.values() for label in group)
    lvb = labels["longvideobench"]
    assert [lvb[g] for g in ("15", "60", "600", "3600", "L1-Perception", "L2-Relation")] == [
        189,
        172,
        412,
        564,
        625,
        712,
    ]
    assert [lvb[m] for m in ("1", "2", "3", "4+")] == [622, 523, 123, 69]
    assert labels["mlvu"]["plotQA"] == 539 and labels["videomme"]["long"] == 900
    types = ("entity recognition", "event understanding", "temporal grounding", "summarization")
    assert [labels["lvbench"][t] for t in types] == [677, 647, 220, 58]


def test_query_is_the_question_that_the_published_agent_saw(items, annotations):
    """The TSV files are what the published frame indices were made from."""
    for name, (_, file) in FILES.items():
        with open(annotations / file, newline="", encoding="utf-8") as rows:
            asked = collections.Counter(
                (r["video_name"], r["question"].split()[0]) for r in csv.DictReader(rows, delimiter="\t")
            )
        ours = collections.Counter((i.video, i.query.split()[0]) for i in items[name])
        assert ours == asked, name
        with open(annotations / file, newline="", encoding="utf-8") as rows:
            texts = collections.Counter(" ".join(r["question"].split()) for r in csv.DictReader(rows, delimiter="\t"))
        assert collections.Counter(" ".join(i.query.split()) for i in items[name]) == texts, name


def test_prompts_byte_by_byte(items):
    lvb, mlvu, vmme, lvbench = (items[name][0].prompt for name in FILES)
    assert lvb == (
        "In the video, which subtitles appear at the same time as the man with black hair, dressed in grey clothes "
        "with black sleeves, on stage?\n"
        "A. promisc has come to an end, in and run away countless times, i was just scared, i still\n"
        "B. run away countless times, i was just scared, i still and front of our crown, like a world of souls,\n"
        "C. promisc has come to an end, in and front of our crown, like a world of souls,\n"
        "D. promisc has come to an end, in and captain of the godson, three three three three three three\n"
        "Answer with the option's letter from the given choices directly.\n"
    )
    assert mlvu == (
        "\nWhat does the hand coming out of the computer do?\n(A) Delivers a product\n(B) Shakes the woman's hand\n"
        "(C) Takes the woman's credit card\n(D) Points at something on the screen\n\n"
        "Only give the best option.\n\nBest option: ("
    )
    assert vmme == (
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
        "Respond with only the letter (A, B, C, or D) of the correct option.\nWhen demonstrating the Germany modern "
        "Christmas tree is initially decorated with apples, candles and berries, which kind of the decoration has the "
        "largest number?\nA. Apples.\nB. Candles.\nC. Berries.\nD. The three kinds are of the same number.\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert lvbench == (
        "What year appears in the opening caption of the video?\n(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633\n"
        "Answer the question with the option letter"
    )


def test_moments_are_seconds(items):
    by_id = {i.id: i for i in items["longvideobench"]}
    assert by_id["86CxyhFV9MI_0"].moments == ((854 / 24,) * 2, (948 / 24,) * 2, (1373 / 24,) * 2)
    corrupt = by_id["Z-1lgAXOEc8_0"]
    assert corrupt.moments and all(end <= corrupt.duration for _, end in corrupt.moments)
    lvbench = {i.id: i for i in items["lvbench"]}
    assert lvbench["Cm73ma6Ibcs62"].moments and lvbench["Cm73ma6Ibcs55"].moments == ((15.0, 19.0),)
    assert sum(not i.moments for i in items["lvbench"]) == 2
    assert benchmarks._time_reference("61:05-60:58") == ((3658.0, 3665.0),)
    assert benchmarks._time_reference("08:17-None") == ()


@pytest.mark.parametrize(
    ("text", "strict", "lvb", "mlvu"),
    [
        ("B", "B", "B", "B"),
        (" (C) a cat", "C", "C", "C"),
        ("D. dog", "D", "D", "D"),
        ("The answer is B.", "B", "B", "B"),
        ("the best option is C", "C", "C", "C"),
        ("Best answer: C", "C", "C", "B"),  # the missing comma: the B of "Best" stays in
        ("Best option: C", "C", "C", "B"),
        ("Because of the rain, D", "D", "B", "B"),  # a capital inside a word
        ("A man walks in, so it is D", "D", "A", "A"),
        ("A is right", "A", "A", "A"),
        ("A\nthe man walks in", "A", "A", "A"),  # an article would stand on the line of its noun
        ("I don't know", None, None, None),
        ("dog", "D", None, None),
        ("", None, None, None),
    ],
)
def test_letters(text, strict, lvb, mlvu):
    question = item("ant", "bee", "cat", "dog", "eel")
    assert benchmarks.answer_letter("mlvu", question, text) == strict
    assert benchmarks.answer_letter("mlvu", question, text, "published") == mlvu
    assert benchmarks.answer_letter("videomme", question, text, "published") == mlvu
    if lvb is not None:
        assert benchmarks.answer_letter("longvideobench", question, text, "published") == lvb


def test_published_longvideobench_guesses_where_there_is_no_letter():
    """One of A-E even where there are fewer options; a function of seed and question, so that resuming repeats it."""
    draws = [
        benchmarks.answer_letter("longvideobench", item("x", "y", "z", id=f"q{i}"), "no idea", "published", seed=1)
        for i in range(2000)
    ]
    again = benchmarks.answer_letter("longvideobench", item("x", "y", "z", id="q7"), "no idea", "published", seed=1)
    assert draws[7] == again
    assert all(320 < n < 480 for n in collections.Counter(draws).values()) and set(draws) == set("ABCDE")


def test_lvbench_letters_follow_its_own_script():
    published = [
        benchmarks.answer_letter("lvbench", item("x", "y"), t, "published") for t in ("(B) foo", "A", "B) x", "")
    ]
    assert published == ["B", "A", "B", None]


def test_accuracies_of_a_fixed_list(items):
    """Always A: MLVU's micro and macro differ; LVBench counts a question for each of its types."""
    mlvu = benchmarks.accuracies("mlvu", items["mlvu"], {i.id: "A" for i in items["mlvu"]})
    assert mlvu["overall"] == 548 / 2174
    tasks = collections.Counter(i.groups["task_type"][0] for i in items["mlvu"])
    right = collections.Counter(i.groups["task_type"][0] for i in items["mlvu"] if i.answer == "A")
    assert mlvu["macro"] == pytest.approx(sum(right[t] / n for t, n in tasks.items()) / 7)
    assert mlvu["macro"] != pytest.approx(mlvu["overall"], abs=1e-6)
    lvbench = benchmarks.accuracies("lvbench", items["lvbench"], {i.id: i.answer for i in items["lvbench"]})
    assert sum(group["n"] for group in lvbench["groups"]["question_type"].values()) == 677 + 647 + 291 + 220 + 201 + 58
    letters = collections.Counter(i.answer for i in items["videomme"])
    best, count = letters.most_common(1)[0]
    vmme = benchmarks.accuracies("videomme", items["videomme"], {i.id: best for i in items["videomme"]})
    assert round(100 * vmme["overall"], 1) == round(100 * count / 2700, 1) == 27.2
    assert set(vmme["groups"]) == {"duration", "domain", "sub_category", "task_type"}


def test_accuracies_leave_unanswered_questions_out_and_say_so():
    questions = [item("x", "y", id=f"q{i}", answer="B", level="l1") for i in range(4)]
    result = benchmarks.accuracies("longvideobench", questions, {"q0": "B", "q1": "A", "q2": None})
    assert (result["n"], result["missing"], result["overall"]) == (3, 1, 1 / 3)
    assert result["groups"] == {"level": {"l1": {"n": 3, "accuracy": 1 / 3}}}
    with pytest.raises(BenchmarkError, match="'q9', which longvideobench does not have"):
        benchmarks.accuracies("longvideobench", questions, {"q9": "A"})
    with pytest.raises(BenchmarkError, match="no question is answered"):
        benchmarks.accuracies("longvideobench", questions, {})


MLVU_ROW = {
    "video_name": "a.mp4",
    "duration": 9.5,
    "question": "What?\n(A) x\n(B) y\n",
    "candidates": ["x", "y"],
    "answer": "B",
    "task_type": "ego",
    "question_id": "Q0",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("candidates") and [row], r"item 0 \(Q0\): field 'candidates' is missing"),
        (lambda row: [row, row], "question Q0 occurs twice"),
        (lambda row: [row | {"answer": "AB"}], "answer 'AB' is not among its options"),
        (lambda row: [row | {"answer": "C"}], "question Q0: answer 'C' is not among its options"),
        (lambda row: [row | {"duration": 0}], "field 'duration' is 0, not a number above 0"),
        (lambda row: [7], "item 0 is not a JSON object"),
        (lambda row: [], "no question"),
    ],
)
def test_bad_annotations_name_the_place(tmp_path, change, message):
    (tmp_path / "mlvu.json").write_text(json.dumps(change(dict(MLVU_ROW))))
    with pytest.raises(BenchmarkError, match=message):
        benchmarks.read_items("mlvu", tmp_path / "mlvu.json")


def test_lines_of_other_programs(tmp_path):
    """A byte order mark, empty lines, and an end of line of Unicode inside a text."""
    line = json.dumps(MLVU_ROW | {"task_type": "e\u2028go"}, ensure_ascii=False)
    (tmp_path / "mlvu.jsonl").write_text(f"\ufeff{line}\n\n", encoding="utf-8")
    assert [item.id for item in benchmarks.read_items("mlvu", tmp_path / "mlvu.jsonl")] == ["Q0"]
    (tmp_path / "mlvu.jsonl").write_bytes(b"\xff")
    with pytest.raises(BenchmarkError, match="mlvu.jsonl: not JSON"):
        benchmarks.read_items("mlvu", tmp_path / "mlvu.jsonl")


def test_files_and_names_that_do_not_exist(tmp_path):
    (tmp_path / "broken.json").write_text('[{"video_name": ')
    with pytest.raises(BenchmarkError, match="broken.json: not JSON"):
        benchmarks.read_items("mlvu", tmp_path / "broken.json")
    with pytest.raises(BenchmarkError, match="benchmark is 'egoschema', not one of longvideobench"):
        benchmarks.read_items("egoschema", tmp_path / "broken.json")
    with pytest.raises(BenchmarkError, match="protocol is 'loose'"):
        benchmarks.answer_letter("mlvu", item("x"), "A", "loose")


def test_published_generators_are_seeded():
    letter = benchmarks.lookup("longvideobench").published_letter
    assert letter("?", random.Random("1 q")) == letter("?", random.Random("1 q"))


@pytest.mark.parametrize("benchmark", FILES)
def test_options_of_every_question_can_be_permuted(items, benchmark):
    """There and back gives the prompt as it was; the right option stays right."""
    for item in items[benchmark]:
        order = list(range(len(item.options)))[::-1]
        turned = benchmarks.permuted(item, order)
        assert turned.options[ord(turned.answer) - 65] == item.options[ord(item.answer) - 65]
        assert len(turned.prompt) == len(item.prompt) and sorted(turned.prompt) == sorted(item.prompt)
        assert benchmarks.permuted(turned, order) == item


def test_questions_by_video_and_videos_that_are_not_there(tmp_path):
    rows = [
        {"video_name": name, "question": "What?\n(A) x\n(B) y\n", "candidates": ["x", "y"], "answer": "A"}
        | {"duration": 9.0, "task_type": "ego", "question_id": f"Q{i}"}
        for i, name in enumerate(("v.mp4", "w.mp4"))
    ]
    path = tmp_path / "mlvu.json"
    path.write_text(json.dumps(rows))
    asked = {"v.mp4": [("Q0", "What?")], "w.mp4": [("Q1", "What?")]}
    assert benchmarks.queries_by_video("mlvu", path, ["w.mp4", "v.mp4"], False) == (asked, "")
    found, absent = benchmarks.queries_by_video("mlvu", path, ["v.mp4"], True)
    assert found == {"v.mp4": [("Q0", "What?")]} and absent == f"1 videos of {path} are missing: w.mp4"
    for names, allow_missing in ((["v.mp4"], False), (["u.mp4"], True)):
        with pytest.raises(BenchmarkError, match="videos of .* are missing: .*w.mp4; or --allow_missing"):
            benchmarks.queries_by_video("mlvu", path, names, allow_missing)


def test_eight_options_of_video_mme(tmp_path):
    """Each is asked and can be moved; the published way of reading answers knows four letters."""
    row = {"question_id": "1", "videoID": "v", "question": "Which?", "answer": "H", "duration": "long", "domain": "d"}
    row |= {"sub_category": "s", "task_type": "t", "options": [f"{letter}. thing {letter}" for letter in "ABCDEFGH"]}
    path = tmp_path / "v2.json"
    path.write_text(json.dumps([row]))
    (item,) = benchmarks.read_items("videomme", path)
    assert item.options == tuple(f"thing {letter}" for letter in "ABCDEFGH")
    assert "only the letter (A, B, C, D, E, F, G, or H) of" in item.prompt
    assert benchmarks.permuted(item, [7, *range(7)]).answer == "A"
    with pytest.raises(benchmarks.BenchmarkError, match="question 1: has 8 options; the published runs knew 4 letters"):
        benchmarks.read_items("videomme", path, "published")
