import json

from benchmarks.answer_shapes import cost, measure


def test_cost_by_hand():
    """Of batches of four, three are not full."""
    assert cost([2] * 5 + [7], batch_size=4) == {"programs": 2, "batches": 3, "frames": 2 * 4 * 2 + 7 * 4}


def test_an_index_file_of_many_lengths(tmp_path):
    path = tmp_path / "idx.jsonl"
    counts = [8] * 40 + list(range(1, 8))
    path.write_text(
        "".join(json.dumps({"question_id": str(i), "frame_idx": [*range(n)]}) + "\n" for i, n in enumerate(counts))
    )
    found = measure(path, 4)
    assert (found["questions"], found["frames_asked_about"], found["shapes"]) == (47, 348, [8])
    assert found["each"] == {"programs": 8, "batches": 17, "frames": 10 * 32 + 28 * 4, "computed_per_asked": 1.241}
    assert found["few"] == {"programs": 1, "batches": 12, "frames": 384, "computed_per_asked": 1.103}
