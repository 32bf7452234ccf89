import json

import pytest

from tspo_jax.data.caption_files import Example, drawn, read_examples


def test_read(tmp_path):
    path = tmp_path / "captions.jsonl"
    row = {"video": "a.mp4", "start": 0, "end": 2.5, "caption": "a ball"}
    path.write_text(json.dumps(row) + "\n\n")
    assert read_examples(path) == [Example("a.mp4", 0.0, 2.5, "a ball")]
    for wrong, message in ((row | {"end": -1}, "line 2"), ({"video": "a"}, "line 2 is no caption")):
        path.write_text(json.dumps(row) + "\n" + json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            read_examples(path)
    path.write_text("\ufeff" + json.dumps([row, row | {"caption": "a\u2028ball"}], ensure_ascii=False))
    assert [example.caption for example in read_examples(path)] == ["a ball", "a\u2028ball"]


def test_order():
    order = [drawn(3, i, 5) for i in range(15)]
    assert all(sorted(order[i : i + 5]) == list(range(5)) for i in (0, 5, 10))
    assert order[:5] != order[5:10] or order[5:10] != order[10:]
    assert order == [drawn(3, i, 5) for i in range(15)]
