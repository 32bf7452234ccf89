"""Question files: the original's texts, and one listed error per bad line."""

import json
import random

import pytest

from tspo_jax.data.questions import TAILS, QuestionError, read_questions, split_options

ROW = {
    "video": "demo/208.mp4",
    "original_question": "<image>\nWhat is shown first?\nA. A shore.\nB. a forest.\nC. Grass.\nD. elephants.",
    "original_answer": "A. A shore.",
    "problem": "<image>\nWhat is shown first?",
    "solution": "<answer>a</answer>",
    "complete_answer": "A shore.",
    "type": "general",
}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_one(tmp_path, **changes):
    questions, errors = read_questions(write(tmp_path / "q.jsonl", ROW | changes))
    assert not errors
    return questions[0]


def test_real_format(annotations):
    questions, errors = read_questions(annotations / "tspo_10k_format.jsonl")
    assert len(questions) == 10 and not errors
    assert [question.index for question in questions] == list(range(10))
    first = questions[0]
    assert first.query == "What is the scene at the beginning of the video?"
    assert first.options[0] == "Windswept sandy shore." and first.answer == "A" and first.kind == "general"
    assert first.question.startswith(first.query + "\nA. Windswept") and first.question.endswith(
        "D. trumpeting elephants."
    )


def test_texts_of_agent_and_mllm(tmp_path):
    question = read_one(tmp_path, original_question=ROW["original_question"] + "\n" + TAILS[1], evidence=[[1, 2.5]])
    assert question.query == "What is shown first?"
    assert question.question == "What is shown first?\nA. A shore.\nB. a forest.\nC. Grass.\nD. elephants.\n"
    assert question.options == ("A shore.", "a forest.", "Grass.", "elephants.")
    assert question.evidence == ((1.0, 2.5),) and question.family is None
    assert (question.targets, question.cues) == ((), ())


def test_names_to_search_for(tmp_path):
    question = read_one(tmp_path, targets=["red ball", "dog"], cues=["lawn"])
    assert (question.targets, question.cues) == (("red ball", "dog"), ("lawn",))
    for names in ("dog", [""], [3], {"dog": 1}):
        with pytest.raises(QuestionError, match="targets: must be a list of names"):
            read_one(tmp_path, targets=names)


@pytest.mark.parametrize(
    ("text", "stem", "options"),
    [
        ("What?\n(A) x\n(B) y", "What?", ("x", "y")),
        ("What?\nA) x\nB) y\nC) z", "What?", ("x", "y", "z")),
        ("A man walks.\nAt the end, what?\nA. x\nB. y", "A man walks.\nAt the end, what?", ("x", "y")),
        ("A. Smith enters.\nWho is it?\nA. x\nB. y", "A. Smith enters.\nWho is it?", ("x", "y")),
        ("What?\nA. first\nline two\nB. y\n", "What?", ("first\nline two", "y")),
        ("What?\nA. x", "What?\nA. x", ()),
        ("What?", "What?", ()),
    ],
)
def test_split_at_the_options(text, stem, options):
    assert split_options(text) == (stem, options)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"video": "/etc/passwd"}, "video"),
        ({"video": "a/../../b.mp4"}, "video"),
        ({"video": "C:\\b.mp4"}, "video"),
        ({"video": "..\\b.mp4"}, "video"),
        ({"video": ""}, "video"),
        ({"video": "a\u0000.mp4"}, "video"),
        ({"video": 3}, "video"),
        ({"type": "needle"}, "type"),
        ({"solution": "<answer>e</answer>"}, "solution"),
        ({"solution": "<answer>42</answer>"}, "solution"),
        ({"solution": "<answer>a forest</answer>"}, "solution"),
        ({"original_question": "What is it?"}, "original_question"),
        ({"original_question": "A. x\nB. y"}, "original_question"),
        ({"original_question": ROW["original_question"] + "<image>"}, "original_question"),
        ({"original_question": "\ud800" + ROW["original_question"]}, "original_question"),
        ({"evidence": [[3, 1]]}, "evidence"),
        ({"evidence": "soon"}, "evidence"),
        ({"family": 5}, "family"),
    ],
)
def test_bad_field_is_named(tmp_path, changes, field):
    path = write(tmp_path / "q.jsonl", ROW, ROW | changes)
    questions, errors = read_questions(path, strict=False)
    assert len(questions) == 1 and len(errors) == 1
    assert errors[0].startswith(f"{path}:2: {field}: ")
    with pytest.raises(QuestionError, match=f"q.jsonl:2: {field}: "):
        read_questions(path)


@pytest.mark.parametrize("solution", ["<answer>b</answer>", "<answer>B. a forest</answer>", "(b)", " B "])
def test_solutions(tmp_path, solution):
    assert read_one(tmp_path, solution=solution).answer == "B"


def test_windows_lines(tmp_path):
    row = ROW | {"original_question": ROW["original_question"].replace("\n", "\r\n"), "id": None}
    path = write(tmp_path / "q.jsonl", "\ufeff" + json.dumps(row) + "\r", "\r", json.dumps(row) + "\r")
    questions, errors = read_questions(path)
    assert len(questions) == 2 and not errors
    assert questions[0].question == ROW["original_question"].removeprefix("<image>\n")


def test_bad_lines_are_all_listed(tmp_path):
    missing = {key: value for key, value in ROW.items() if key != "solution"}
    path = write(tmp_path / "q.jsonl", ROW, "{broken", "", "[1]", missing, "[" * 100_000, ROW)
    path.write_bytes(path.read_bytes() + b'{"video": "\xff"}\n')
    questions, errors = read_questions(path, strict=False)
    assert [question.index for question in questions] == [0, 1]
    assert [error.split(": ")[0].rsplit(":", 1)[1] for error in errors] == ["2", "4", "5", "6", "8"]
    assert "solution: is missing" in errors[2]
    with pytest.raises(QuestionError, match="30 bad") as caught:
        read_questions(write(tmp_path / "r.jsonl", *["{"] * 30), strict=False)
    assert "... and 10 more" in str(caught.value)


def test_ids_are_unique_and_videos_exist(tmp_path):
    path = write(tmp_path / "q.jsonl", ROW | {"id": 7}, ROW | {"id": "7"}, ROW | {"id": 8, "video": "here.mp4"})
    assert "id: '7' is also the id of line 1" in read_questions(path, strict=False)[1][0]
    (tmp_path / "here.mp4").touch()
    questions, errors = read_questions(path, tmp_path, strict=False)
    assert [question.video for question in questions] == ["here.mp4"] and "no file demo/208.mp4" in errors[0]


def test_mutated_lines_never_crash(tmp_path):
    """Every one of 400 damaged lines is either read or listed."""
    rng, good = random.Random(0), json.dumps(ROW)
    lines = []
    for _ in range(400):
        line = bytearray(good.encode())
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(len(line))
            action = rng.randrange(3)
            if action == 0:
                line[position] = rng.randrange(256)
            elif action == 1:
                del line[position : position + rng.randint(1, 40)]
            else:
                line[position:position] = rng.choice([b"\\u0000", b'"', b"{", b"null", b"1e999", b"\xf0\x9f"])
        lines.append(bytes(line).replace(b"\n", b" ") or b"x")
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\n".join([good.encode(), *lines]))
    questions, errors = read_questions(path, strict=False)
    assert len(questions) + len(errors) == 401
    assert len(errors) > 100


def as_list(path, rows, **how):
    path.write_text(json.dumps(rows, **how))
    return path


@pytest.mark.parametrize("how", [{"indent": 1}, {}])
def test_one_json_list(tmp_path, how):
    questions, errors = read_questions(as_list(tmp_path / "q.json", [ROW, ROW, 3], **how), strict=False)
    assert len(questions) == 2 and questions[0].query == "What is shown first?"
    assert errors == [f"{tmp_path / 'q.json'}:3: item: is not a json object but int"]


def test_fields_that_nobody_reads_are_not_looked_at(tmp_path):
    questions, errors = read_questions(
        write(tmp_path / "q.jsonl", ROW | {"original_answer": "", "problem": 3, "complete_answer": ["x"]})
    )
    assert len(questions) == 1 and not errors


def test_a_file_of_mostly_bad_lines_is_a_wrong_file(tmp_path):
    path = write(tmp_path / "q.jsonl", *[ROW] * 17, "{", "{")
    assert len(read_questions(path, strict=False)[0]) == 17
    with pytest.raises(QuestionError, match=r"2 bad question\(s\) of 19"):
        read_questions(path, strict=False, max_bad=0.1)
    assert len(read_questions(path, strict=False, max_bad=0.2)[0]) == 17


def test_ten_options(tmp_path):
    text = ROW["original_question"] + "".join(f"\n{letter}. colour {letter}" for letter in "EFGHIJ")
    question = read_one(tmp_path, original_question=text, solution="<answer>j</answer>")
    assert len(question.options) == 10 and question.answer == "J"


def test_written_by_hand(tmp_path):
    plain = {"video": "a.mp4", "question": "What is it?", "options": ["A cat", "A dog"], "answer": "b"}
    (question,) = read_questions(write(tmp_path / "q.jsonl", plain))[0]
    assert (question.query, question.options, question.answer) == ("What is it?", ("A cat", "A dog"), "B")
    assert question.question == "What is it?\nA. A cat\nB. A dog" and question.kind == "general"
    assert read_questions(write(tmp_path / "q.jsonl", plain | {"answer": "A cat"}))[0][0].answer == "A"
    for change, field in (
        ({"options": ["x"]}, "options: "),
        ({"options": ["B. A dog", "A. A cat"]}, "options: they begin with their letters, but in the order B, A"),
        ({"answer": "C"}, "answer: "),
        ({"options": "x|y"}, "options: "),
    ):
        with pytest.raises(QuestionError, match=field):
            read_questions(write(tmp_path / "q.jsonl", plain | change))
    with pytest.raises(QuestionError, match="options: there are 27, at most 26"):
        read_questions(write(tmp_path / "q.jsonl", plain | {"options": [str(i) for i in range(27)], "answer": "A"}))


def test_a_table(tmp_path):
    path = tmp_path / "q.csv"
    path.write_bytes(
        b"\xef\xbb\xbfVideo,Question,Options,Answer,Evidence\r\n"
        b'a.mp4,"What, exactly?",cat | dog,B,"[[1, 2]]"\r\n'
        b'b.mp4,Who?,"A. Ann\nB. Bob\nC. Cy",Bob,\r\n'
        b",,,,\r\n"
    )
    questions, errors = read_questions(path)
    assert [(q.query, q.options, q.answer, q.evidence) for q in questions] == [
        ("What, exactly?", ("cat", "dog"), "B", ((1.0, 2.0),)),
        ("Who?", ("Ann", "Bob", "Cy"), "B", ()),
    ]
    path.write_text("video;question;A;B;answer\na.mp4;Who?;Ann;Bob;a\n")
    assert read_questions(path)[0][0].options == ("Ann", "Bob")
    path.write_text("video,question\na.mp4,Who?\n")
    with pytest.raises(QuestionError, match="q.csv:1: answer: no such column; the first line has video, question"):
        read_questions(path)
    path.write_text("video,question,options,answer\na.mp4,Who?,Ann|Bob,C\na.mp4,Who?,Ann|Bob,A\n")
    with pytest.raises(QuestionError, match="q.csv:2: answer: 'C' is neither"):
        read_questions(path)


HEADER = "video,question,A,B,C,answer\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # An empty option would give the letters behind it to other texts.
        (HEADER + "a.mp4,Who?,Ann,,Cy,B\n", "q.csv:2: B: this option is empty, but C is not"),
        ("video,question,A,B,answer,answer\na.mp4,Who?,Ann,Bob,A,B\n", "q.csv:1: answer: two columns have this name"),
        ("video,question,options,A,B,answer\na.mp4,Who?,x|y,Ann,Bob,A\n", "q.csv:2: options: given in a column of"),
        # A quotation mark that is not closed: the next question would be a part of this one.
        (HEADER + 'a.mp4,"Who?,Ann,Bob,Cy,A\nb.mp4,"Why?",x,y,z,B\n', "q.csv:[23]: line: a cell cannot be read"),
        (HEADER + "a.mp4,Who?," + "x" * 200_000 + ",y,z,A\n", "q.csv:2: line: a cell cannot be read"),
        ("video,question,options,answer\na.mp4,Which letter?,B|A|C,A\n", "q.csv:2: answer: 'A' is the letter of one"),
        # The number is that of the spreadsheet's row.
        (HEADER + "\n,,,,,\na.mp4,Who?,Ann,Bob,Cy,Zoe\n", "q.csv:4: answer: 'Zoe' is neither"),
    ],
)
def test_tables_that_would_be_read_as_something_else(tmp_path, text, said):
    path = tmp_path / "q.csv"
    path.write_text(text)
    with pytest.raises(QuestionError, match=said):
        read_questions(path)


def test_lists_in_the_cells_of_a_table(tmp_path):
    path = tmp_path / "q.tsv"
    path.write_text(
        "\nvideo\tquestion\toptions\tanswer\ttargets\tcues\na.mp4\tWho?\tAnn|Bob\tBob\tred ball|dog\tlawn\n"
    )
    (question,) = read_questions(path)[0]
    assert (question.answer, question.targets, question.cues) == ("B", ("red ball", "dog"), ("lawn",))


def test_letters_in_the_options(tmp_path):
    """They are dropped where all options have their own, and only there."""
    plain = {"video": "a.mp4", "question": "What?", "options": ["(A) a cat", "(B) a dog"], "answer": "a dog"}
    (question,) = read_questions(write(tmp_path / "q.jsonl", plain))[0]
    assert (question.options, question.answer) == (("a cat", "a dog"), "B")
    species = plain | {"options": ["C. elegans", "D. rerio"], "answer": "C. elegans"}
    (question,) = read_questions(write(tmp_path / "q.jsonl", species))[0]
    assert (question.options, question.answer) == (("C. elegans", "D. rerio"), "A")
    for options in (["x\nB. y", "z"], ["x", "y\nC. z"]):
        with pytest.raises(QuestionError, match="q.jsonl:1: options: a line of one of them begins as an option does"):
            read_questions(write(tmp_path / "q.jsonl", plain | {"options": options, "answer": "A"}))


def test_the_form_of_a_file_is_looked_at_before_its_lines(tmp_path):
    path = tmp_path / "q.json"
    path.write_text(json.dumps([ROW] * 40, indent=1)[:-30])
    with pytest.raises(QuestionError) as caught:
        read_questions(path, strict=False)
    assert str(caught.value).startswith(f"{path}: file: begins as a JSON list, but is none") and "\n" not in str(
        caught.value
    )
    path.write_text(json.dumps(ROW, indent=1) + "\n" + json.dumps(ROW | {"video": "b.mp4"}, indent=1))
    assert [question.video for question in read_questions(path)[0]] == ["demo/208.mp4", "b.mp4"]
    for data, kind in ((b"PK\3\4\0", "a spreadsheet"), (json.dumps(ROW).encode("utf-16"), "UTF-16")):
        for name in ("q.csv", "q.jsonl"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(QuestionError, match=f"{name}: file: is {kind}"):
                read_questions(tmp_path / name)


def test_a_colon_is_part_of_a_name(tmp_path):
    assert read_one(tmp_path, video="T: intro.mp4").video == "T: intro.mp4"
