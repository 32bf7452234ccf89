"""Which files of a folder are videos."""

import os

from tspo_jax.data.video_files import is_video_name, not_taken, videos_below, without_video_suffix


def test_names():
    for name in ("a.mp4", "b/A.MTS", "c.m2ts", "d.vob", "e.GIF", "f.wmv", "g.mpg", "h.ogv", "i.3gp"):
        assert is_video_name(name)
    assert not any(map(is_video_name, ("a.txt", "mp4", "a.mp4.part", "")))
    assert without_video_suffix("a.b.MTS") == "a.b" and without_video_suffix("v1.5") == "v1.5"


def test_everything_is_taken_or_named(tmp_path):
    for name in ("b.mp4", "a.mts", "sub/c.mkv", "notes.txt", "sub/cover.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "store" / "frames").mkdir(parents=True)
    (tmp_path / "store" / "store.json").write_text("{}")  # a frame store in the folder is not part of it
    (tmp_path / "store" / "frames" / "b.mp4.array_record").write_bytes(b"x")
    os.symlink(tmp_path, tmp_path / "sub" / "circle")
    videos, others = videos_below(tmp_path)
    assert list(videos) == ["a.mts", "b.mp4", "sub/c.mkv"] and videos["sub/c.mkv"] == tmp_path / "sub" / "c.mkv"
    assert others == ["notes.txt", "sub/cover.jpg"]
    assert not_taken(tmp_path, others) == f"{tmp_path}: 2 files are not taken for videos: notes.txt, sub/cover.jpg"
    assert not_taken(tmp_path, ["x"] * 7).endswith("x, x, x, x, x and 2 more") and not_taken(tmp_path, []) == ""
