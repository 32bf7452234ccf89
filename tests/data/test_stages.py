"""Rows that keep their order and side whatever other rows there are."""

import hashlib
import json

from tspo_jax.data.stages import shuffled, split_by_video, write_rows


def test_split_does_not_depend_on_other_videos():
    lines = [{"id": str(i), "video": f"{i // 2}.mp4"} for i in range(200)]
    whole = split_by_video(lines, 0.2, 0)
    assert 20 <= len(whole["heldout"]) <= 60
    part = split_by_video(lines[:50], 0.2, 0)
    assert {row["id"] for row in part["heldout"]} == {row["id"] for row in whole["heldout"]} & set(map(str, range(50)))


def test_order_does_not_depend_on_other_rows():
    lines = [{"id": str(i)} for i in range(50)]
    whole, part = (shuffled(rows, seed=3) for rows in (lines, lines[10:30]))
    assert [row for row in whole if row in part] == part and whole != lines
    assert shuffled(lines, 3, count=5) == whole[:5] != shuffled(lines, 4, count=5)


def test_rows_are_written_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    digest = write_rows(path, [{"id": "ä"}, {"id": "b"}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"id": "ä"}, {"id": "b"}]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
