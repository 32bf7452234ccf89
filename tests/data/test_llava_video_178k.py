"""LLaVA-Video-178K's files: all kinds of turns, and one listed error per bad record."""

import json
import random

import pytest

from tspo_jax.data.llava_video_178k import CAPTION, MULTIPLE_CHOICE, OPEN_ENDED, read_conversations
from tspo_jax.data.questions import TAILS, QuestionError, question_of_row, row

RECORD = {
    "id": "ytb_1",
    "conversations": [
        {"from": "human", "value": f"<image>\nWhat colour is the cat?\nA. White.\nB. Black.\n{TAILS[0]}"},
        {"from": "gpt", "value": "B. Black."},
        {"from": "human", "value": f"At the end, who comes?\nA. A dog.\nB. No one.\nC. A man.\n{TAILS[1]}"},
        {"from": "gpt", "value": "C."},
    ],
    "data_source": "2_3_m_youtube_v0_1",
    "video": "liwei_youtube_videos/videos/youtube_video_2024/ytb_1.mp4",
}


def talk(*texts):
    who = ("human", "gpt")
    return RECORD | {"conversations": [{"from": who[i % 2], "value": text} for i, text in enumerate(texts)]}


def write(path, *records):
    path.write_text(json.dumps(records, indent=1))
    return path


def test_multiple_choice_turns(tmp_path):
    turns, errors = read_conversations(write(tmp_path / "2_3_m_youtube_mc_v0_1_qa_processed.json", RECORD))
    assert not errors and [turn.kind for turn in turns] == [MULTIPLE_CHOICE] * 2
    first, second = turns
    assert first.id == "2_3_m_youtube_v0_1/ytb_1#0" and second.id.endswith("#1")
    assert first.video == f"2_3_m_youtube_v0_1/{RECORD['video']}"
    assert (first.stem, first.options, first.answer) == ("What colour is the cat?", ("White.", "Black."), "B")
    assert (second.stem, second.options[2], second.answer) == ("At the end, who comes?", "A man.", "C")


def test_records_of_one_video_share_its_id(tmp_path):
    """As in the data set, which has more records than videos."""
    other = talk("<image>\nWho sings?\nA. A man.\nB. No one.", "B.")
    turns, errors = read_conversations(write(tmp_path / "a_mc_.json", RECORD, other, RECORD), strict=False)
    assert [turn.id.partition("#")[2] for turn in turns] == ["0", "1", "2"] and turns[2].stem == "Who sings?"
    assert len(errors) == 1 and "record 3: id: '2_3_m_youtube_v0_1/ytb_1' has been asked all of this" in errors[0]
    _, (error,) = read_conversations(write(tmp_path / "a_mc_.json", RECORD, other | {"video": "x.mp4"}), strict=False)
    assert "record 2: id: '2_3_m_youtube_v0_1/ytb_1' is also the id of another video: " in error


def test_open_ended_and_captions(tmp_path):
    record = talk("<image>\nDescribe it.\nA. and B. too.", "A cat sits.\nIt sleeps.")
    for name, kind in (("1_2_m_x_oe_v0_1_qa_processed.json", OPEN_ENDED), ("1_2_m_x_cap_processed.json", CAPTION)):
        (turn,), _ = read_conversations(write(tmp_path / name, record))
        assert (turn.kind, turn.options, turn.answer) == (kind, (), "A cat sits.\nIt sleeps.")
    mixed, _ = read_conversations(write(tmp_path / "all.json", RECORD, record | {"id": "2"}))
    assert [turn.kind for turn in mixed] == [MULTIPLE_CHOICE, MULTIPLE_CHOICE, OPEN_ENDED]


def test_one_record_per_line(tmp_path):
    path = tmp_path / "x_mc_.jsonl"
    path.write_text(json.dumps(RECORD) + "\n{broken\n\n" + json.dumps(RECORD | {"id": "2"}) + "\n")
    turns, errors = read_conversations(path, strict=False)
    assert len(turns) == 4 and len(errors) == 1 and errors[0].startswith(f"{path}:2: record 2: json: not valid")


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (3, "json"),
        ({**RECORD, "id": 3}, "id"),
        ({**RECORD, "video": "../x.mp4"}, "video"),
        ({**RECORD, "video": "/x.mp4"}, "video"),
        ({**RECORD, "data_source": ".."}, "data_source"),
        ({k: v for k, v in RECORD.items() if k != "data_source"}, "data_source"),
        (RECORD | {"conversations": {}}, "conversations"),
        (talk("Only a question?"), "conversations"),
        (RECORD | {"conversations": RECORD["conversations"][1:3]}, r"conversations\[0\]"),
        (talk("<image>\nWhat?\nA. x\nB. y", ""), r"conversations\[1\].value"),
        (talk("<image>\nWhat?", "A."), "conversations"),
        (talk("<image>\nWhat?\nA. x\nB. y", "C."), "conversations"),
        (talk("<image>\nWhat?\nA. x\nB. y", "the first"), "conversations"),
        (talk("<image>\nWhat?" + "".join(f"\n{letter}. x" for letter in "ABCDEF"), "G."), "conversations"),
        (talk("<image>\n<image>\nWhat?\nA. x\nB. y", "A."), "conversations"),
        (RECORD, "id"),
    ],
)
def test_bad_record_is_named(tmp_path, record, field):
    path = write(tmp_path / "a_mc_b.json", RECORD, record)
    turns, errors = read_conversations(path, strict=False)
    assert len(turns) == 2 and len(errors) == 1
    with pytest.raises(QuestionError, match=rf"a_mc_b.json:\d+: record 2: {field}: "):
        read_conversations(path)


def test_mutated_files_never_crash(tmp_path):
    """Each of 400 damaged records is read or listed, and its whole neighbours are read."""
    rng, path = random.Random(0), tmp_path / "a_mc_b.jsonl"
    before, good, after = (json.dumps(RECORD | {"id": name}).encode() for name in ("before", "x", "after"))
    num_bad = 0
    for _ in range(400):
        line = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            position, action = rng.randrange(len(line)), rng.randrange(3)
            if action == 0:
                line[position] = rng.randrange(256)
            elif action == 1:
                del line[position : position + rng.randint(1, 40)]
            else:
                line[position:position] = rng.choice([b"\\u0000", b'"', b"{", b"null", b"1e999", b"\xf0\x9f", b"[" * 3])
        path.write_bytes(before + b"\n" + line + b"\n" + after)
        turns, errors = read_conversations(path, strict=False)
        num_bad += bool(errors)
        read = {turn.id.rsplit("#", 1)[0] for turn in turns}
        assert {"2_3_m_youtube_v0_1/before", "2_3_m_youtube_v0_1/after"} <= read
        assert len(read) == 3 or errors
    assert num_bad > 200


def test_row_of_a_turn_reads_back():
    line = row("7", "v.mp4", "Who?", ("a cat", "a dog"), "B", "general")
    question = question_of_row(line, 0, "x:1", None)
    assert (question.query, question.options, question.answer) == ("Who?", ("a cat", "a dog"), "B")
    assert line["original_answer"] == "B. a dog" and line["problem"] == "<image>\nWho?"
