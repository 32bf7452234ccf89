"""Rows of an evaluation -> neutral -> published, by the command line."""

import json
import subprocess
import sys

QUESTION = {
    "video_name": "v.mp4", "duration": 30.0, "question": "What?\n(A) x\n(B) y\n", "candidates": ["x", "y"],
    "answer": "B", "task_type": "ego", "question_id": "Q0",
}  # fmt: skip


def convert(tmp_path, **options):
    options = dict(benchmark="mlvu", annotations=tmp_path / "mlvu.json") | options
    command = [sys.executable, "-m", "tspo_jax.convert_indices", *(f"--{k}={v}" for k, v in options.items())]
    return subprocess.run(command, capture_output=True, text=True)


def test_there_and_back(tmp_path):
    (tmp_path / "mlvu.json").write_text(json.dumps([QUESTION]))
    rows = [
        {"id": "Q0", "video": "v.mp4", "method": method, "k": 2, "frame_idx": [0, i], "timestamps": [0, i / 25]}
        for i, method in enumerate(("uniform", "topk"), start=25)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    neutral, published = tmp_path / "idx.jsonl", tmp_path / "idx.json"
    done = convert(tmp_path, frame_idx=tmp_path / "rows.jsonl", method="topk", output=neutral)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert json.loads(neutral.read_text())["frame_idx"] == [0, 26]
    assert convert(tmp_path, frame_idx=neutral, form="published", output=published).returncode == 0
    assert json.loads(published.read_text()) == [QUESTION | {"frame_idx": [0.0, 26.0]}]
    failed = convert(tmp_path, frame_idx=tmp_path / "rows.jsonl", output=neutral)
    assert failed.returncode == 1 and "question Q0 has a second selection; take those of one method" in failed.stderr
