"""Row files: what was appended is there after a kill."""

import errno
import os

import pytest

from tspo_jax.data.row_file import RowFile


def test_a_line_cut_off_is_dropped(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with RowFile(path) as file:
        file.append([{"id": "a", "text": "é"}, {"id": "b"}])
    path.write_bytes(path.read_bytes() + b'{"id": "c", "te')
    with RowFile(path) as file:
        assert list(file.rows) == ["a", "b"] and file.rows["a"]["text"] == "é"
        file.append([{"id": "c"}])
    assert path.read_text().splitlines()[2] == '{"id": "c"}'


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with RowFile(tmp_path / "rows.jsonl") as file, pytest.raises(OSError, match="No space left .*rows.jsonl"):
        file.append([{"id": "a"}])


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"name": 1}'])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"id": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: no row with an id"):
        RowFile(tmp_path / "rows.jsonl")
