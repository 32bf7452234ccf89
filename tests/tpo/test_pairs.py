"""Files of pairs: every published form, what is wrong with a record, sampling."""

import json

import pytest

from tspo_jax.data.questions import QuestionError
from tspo_jax.tpo.pairs import length_only_accuracy, read_pairs, sampled

RECORD = {"video": "v.mp4", "prompt": "<image>\nWhy?\n<image>", "chosen": "Because.", "rejected": "No, why not"}


def write(path, text):
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_every_form(tmp_path):
    other = RECORD | {"video": "w.mp4", "id": 7}
    csv = 'video,prompt,chosen,rejected\nv.mp4,"<image>\nWhy?",Because.,"No, why not"\n'
    files = [
        write(tmp_path / "a.json", [RECORD, other]),
        write(tmp_path / "a.jsonl", f"{json.dumps(RECORD)}\n\n{json.dumps(other)}\n"),
        write(tmp_path / "list.jsonl", [RECORD, other]),
        write(tmp_path / "lines.json", f"{json.dumps(RECORD)}\n{json.dumps(other)}\n"),
        write(tmp_path / "a.csv", csv + 'w.mp4,Why?,Because.,"No, why not"\n'),
        write(tmp_path / "all.yaml", "datasets:\n- json_path: a.json\n  sampling_strategy: first:2\n"),
    ]
    for file in files:
        pairs, errors = read_pairs(file)
        assert not errors and [pair.video for pair in pairs] == ["v.mp4", "w.mp4"]
        assert pairs[0].prompt == "Why?" and (pairs[0].chosen, pairs[0].rejected) == ("Because.", "No, why not")
    assert read_pairs(files[0])[0][1].id == "7"


def test_our_fields(tmp_path):
    record = RECORD | {"picks": {"chosen": [["v.mp4", 3]], "rejected": []}, "shown": [["w.mp4", 0]], "answer": "B"}
    (pair,) = read_pairs(write(tmp_path / "a.json", [record]))[0]
    assert (pair.evidence_picks, pair.rejected_picks, pair.shown) == ((("v.mp4", 3),), (), (("w.mp4", 0),))
    plain = read_pairs(write(tmp_path / "b.json", [RECORD]))[0][0]
    assert (pair.answer, plain.answer) == ("B", "")
    lower = RECORD | {"prompt": "Why?\nA. x\nB. y", "answer": "b"}
    assert read_pairs(write(tmp_path / "b.json", [lower]))[0][0].answer == "B"
    assert plain.key != pair.key, "other frames, other log-probabilities"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"video": ""}, "video: must be a text"),
        ({"video": "/abs.mp4"}, "video: .* must be a path below the video folder"),
        ({"prompt": "<image>\n"}, "prompt: is empty without its image tag"),
        ({"chosen": None}, "chosen: must be a text"),
        ({"rejected": " Because. "}, "rejected: is equal to chosen"),
        ({"answer": "a dog"}, "answer: must be the letter of the right option"),
        ({"prompt": "Why?\nA. x\nB. y", "answer": "C"}, "answer: must be the letter of the right option"),
        ({"picks": [1]}, "picks: must be an object"),
        ({"shown": [["v.mp4", -1]]}, "shown: must be"),
    ],
)
def test_bad_records_are_named(tmp_path, change, said):
    path = write(tmp_path / "a.json", [RECORD, RECORD | change])
    with pytest.raises(QuestionError, match=f"a.json:2: {said}"):
        read_pairs(path)
    pairs, errors = read_pairs(path, strict=False)
    assert len(pairs) == len(errors) == 1


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.json", "{", "not valid json"),
        ("a.json", {"video": 1}, "a.json:1: video: must be a text"),
        ("a.json", '[{"video": 1},', "a.json: file: begins as a JSON list, but is none"),
        ("a.jsonl", "{\n", "a.jsonl:1: line: not valid json"),
        ("a.csv", "video,prompt\nv,w\n", "lacks the columns chosen, rejected"),
        ("a.csv", 'video,prompt,chosen,rejected\nv.mp4,"Why?,a,b\n', "a.csv:2: line: a cell cannot be read"),
        ("a.txt", "x", "pairs are .jsonl, .json, .csv or .yaml"),
        ("a.yaml", "a: 1", "must be `datasets:`"),
        ("a.yaml", "datasets: [", "not valid yaml"),
        ("a.json", [], "has no questions"),
    ],
)
def test_files_that_are_no_pairs(tmp_path, name, text, said):
    with pytest.raises(QuestionError, match=said):
        read_pairs(write(tmp_path / name, text))


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of pairs"):
        read_pairs(tmp_path / "none.jsonl")


def test_sampling(tmp_path):
    rows = list(range(10))
    assert sampled(rows, "first:3", tmp_path) == [0, 1, 2]
    assert sampled(rows, "end:25%", tmp_path) == [7, 8, 9]
    assert sampled(rows, "first:99", tmp_path) == rows
    assert len(set(sampled(rows, "random:4", tmp_path))) == 4
    for strategy in ("last:3", "first:1.5", "first:-1"):
        with pytest.raises(QuestionError, match="is not all, first:N"):
            sampled(rows, strategy, tmp_path)


def test_length_only_accuracy():
    assert length_only_accuracy([(3, 2), (4, 1), (1, 5)]) == pytest.approx(2 / 3)
    assert length_only_accuracy([(1, 2), (1, 3)]) == 1
    assert length_only_accuracy([(2, 2)]) == 0.5
