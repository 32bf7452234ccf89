"""Keyframe metrics: small cases by hand, and the figures known for the published selections to the last digit."""

import json

import numpy as np
import pytest

from tspo_jax.data.frame_store import FrameStore, StoreSettings, VideoEntry, encode_jpeg, open_settings, write_frames
from tspo_jax.evaluation import benchmarks, keyframe_metrics
from tspo_jax.evaluation.benchmarks import BenchmarkError
from tspo_jax.evaluation.keyframe_metrics import Clock


def test_hits_of_two_moments():
    rows = keyframe_metrics.hits(np.array([0.0, 10.0, 20.0]), [(11.5, 11.5), (24.0, 24.0)], (1, 2, 5))
    assert rows["distance"] == (1.5 + 4) / 2
    assert [rows[f"any@{t}"] for t in (1, 2, 5)] == [0, 1, 1]
    assert [rows[f"all@{t}"] for t in (1, 2, 5)] == [0, 0, 1]
    assert [rows[f"frac@{t}"] for t in (1, 2, 5)] == [0, 0.5, 1]


def test_a_frame_inside_a_span_hits_it():
    assert keyframe_metrics.hits(np.array([5.0]), [(4.0, 9.0)], (0,))["any@0"] == 1
    assert keyframe_metrics.hits(np.array([3.0]), [(4.0, 9.0)], (0, 1))["distance"] == 1
    assert keyframe_metrics.hits(np.array([3.0]), [], (0,)) == {}


def test_spread():
    rows = keyframe_metrics.spread(np.array([2.0, 3.0, 4.0, 10.0]), 16.0)
    assert rows["runs"] == 2 and rows["adjacent"] == 2 / 3
    assert rows["largest_gap"] == 6.0 and rows["widest_gap"] == 6.0 and rows["gap_ratio"] == 6 / (8 / 3)
    assert rows["coverage_16"] == 4 / 16 and rows["span"] == 0.5 and rows["position"] == 4.75 / 16
    assert rows["starts_at_zero"] == 0
    edge = keyframe_metrics.spread(np.array([7.0]), 8.0)
    assert edge["largest_gap"] == 7.0 and "runs" not in edge
    assert "largest_gap" not in keyframe_metrics.spread(np.array([0.0, 1.0]), None)


def test_clock_is_recovered_from_frame_numbers():
    assert Clock.recover([0, 25, 75], 4.0) == Clock(25)
    assert Clock.recover([30, 90], None) == Clock(30)
    numbers = np.linspace(0, round(6000.3 * 30000 / 1001) - 1, 5000, dtype=int)[[3, 10, 11, 700, 4998]]
    clock = Clock.recover(numbers, 6000.3)
    assert clock.fps == 30000 / 1001 and clock.spacing == pytest.approx(1.2, abs=1e-3)
    with pytest.raises(ValueError, match="add 'fps'"):
        Clock.recover([0, 7, 1200], 50.0)
    with pytest.raises(ValueError, match="add 'fps'"):
        Clock.recover([0], 50.0)
    with pytest.raises(ValueError, match="do not tell the frame rate"):
        Clock.recover([300], 50.0)  # one frame, at 10 s of a video at 30 fps


@pytest.fixture(scope="module")
def longvideobench(annotations):
    return keyframe_metrics.evaluate(
        "longvideobench", annotations / "lvb_val.json", annotations / "TSPO_LongVideoBench_frameIdx.json"
    )["selections"]


def rates(table, kind):
    return list(table[kind].values())


def test_longvideobench_hit_rates(longvideobench):
    """Frames per second = step of the candidates, so no other file is needed."""
    chosen = longvideobench["frame_idx"]["duration_group"]
    assert {label: table["n"] for label, table in chosen.items()} == {
        "15": 189, "60": 172, "600": 412, "3600": 564, "600+3600": 976,
    }  # fmt: skip
    for kind, tables in {
        "any": {"600": [83.0, 89.8, 93.9], "3600": [61.0, 68.8, 76.1]},
        "all": {"600": [60.0, 68.7, 78.6], "3600": [38.1, 46.5, 56.2]},
        "frac": {"600": [71.1, 79.5, 86.5], "3600": [48.8, 57.1, 65.5]},
    }.items():
        for group, expected in tables.items():
            assert rates(chosen[group], kind) == expected, (kind, group)
    for kind in ("any", "all", "frac"):
        assert rates(chosen["15"], kind) == rates(chosen["60"], kind) == [100, 100, 100]
    uniform = longvideobench["uniform_64"]["duration_group"]
    assert rates(uniform["600"], "frac") == [37.2, 68.4, 100]
    assert rates(uniform["3600"], "frac") == [10.9, 22.8, 53.7]


def test_another_questions_frames_hit_far_less(longvideobench):
    """Within what exact frame rates change of the known 14.5/19.9/29.3 and 36.1/45.4/58.5."""
    control = longvideobench["other_question"]["duration_group"]
    np.testing.assert_allclose(rates(control["3600"], "any"), [14.5, 19.9, 29.3], atol=0.5)
    np.testing.assert_allclose(rates(control["600"], "any"), [36.1, 45.4, 58.5], atol=0.6)
    assert control["600"]["n_annotated"] == 410  # two videos have one question only


def test_longvideobench_spread(longvideobench):
    medium, long = (longvideobench["frame_idx"]["duration_group"][group] for group in ("600", "3600"))
    names = ("adjacent", "largest_gap_share", "span", "coverage_16", "coverage_64")
    assert [round(medium[name]) for name in names] == [68, 25, 83, 66, 37] and medium["largest_gap_share"] == 24.7
    assert [round(long[name]) for name in names] == [57, 31, 77, 55, 27]
    assert (round(medium["runs"], 1), round(long["runs"], 1)) == (21.1, 27.8)
    assert (round(medium["largest_gap_s"], 1), round(long["largest_gap_s"])) == (98.7, 474)
    assert (medium["overlap"], long["overlap"]) == (37.5, 19.1)
    tables = longvideobench["frame_idx"]["duration_group"]
    assert tables["15"]["starts_at_zero"] == tables["60"]["starts_at_zero"] == 100
    assert round(tables["600+3600"]["starts_at_zero"]) == 17


def test_every_grouping_covers_all_questions(longvideobench):
    for table in longvideobench.values():
        for grouping in ("level", "num_moments", "question_category", "topic_category"):
            assert sum(group["n"] for group in table[grouping].values()) == table["all"]["n"] == 1337


def mlvu_spread(annotations, time_base):
    files = annotations / "mlvu.json", annotations / "TSPO_MLVU_frameIdx.json"
    return keyframe_metrics.evaluate("mlvu", *files, time_base=time_base)["selections"]["frame_idx"]


def test_mlvu_spread_as_published(annotations):
    """The known figures take the divisor of the frame numbers as frame rate, also of the 36 capped videos."""
    tables = mlvu_spread(annotations, "step")
    names = ("largest_gap_share", "span", "coverage_16", "coverage_64", "position")
    assert [round(tables["all"][name]) for name in names] == [26, 80, 67, 38, 43]
    assert round(tables["all"]["runs"], 1) == 27.5 and round(tables["all"]["largest_gap_s"]) == 236
    expected = {
        "order": (37.5, 59), "anomaly_reco": (31.1, 74), "needle": (24.9, 86), "count": (24.5, 86),
        "ego": (24.4, 82), "topic_reasoning": (23.2, 83), "plotQA": (22.6, 85),
    }  # fmt: skip
    for task, (largest_gap_share, span) in expected.items():
        assert tables["task_type"][task]["largest_gap_share"] == largest_gap_share
        assert tables["task_type"][task]["span"] == pytest.approx(span, abs=0.51)


def test_mlvu_clock_of_capped_videos(annotations):
    """With the right frame rate no time lies behind its video, and the tasks with such videos look less extreme."""
    items = benchmarks.read_items("mlvu", annotations / "mlvu.json")
    chosen = keyframe_metrics.read_chosen("mlvu", annotations / "TSPO_MLVU_frameIdx.json", items)
    capped = [item for item in items if item.duration > keyframe_metrics.CANDIDATE_CAP]
    assert len({item.video for item in capped}) == 36 and len(capped) == 40
    rate = {round(chosen[item.id].clock.fps, 2) for item in capped}
    assert rate == {25, 29.97, 30}
    assert all(chosen[item.id].times[-1] <= item.duration * 1.01 for item in items)
    exact, step = mlvu_spread(annotations, "capped")["task_type"], mlvu_spread(annotations, "step")["task_type"]
    assert exact["plotQA"] == step["plotQA"]
    assert exact["order"]["largest_gap_share"] < step["order"]["largest_gap_share"]


def test_videomme_spread(annotations):
    """bin-max bounds the widest gap to about twice the mean gap."""
    files = annotations / "videomme.json", annotations / "TSPO_VideoMME_frameIdx.json"
    items = benchmarks.read_items("videomme", files[0])
    chosen = keyframe_metrics.read_chosen("videomme", files[1], items)
    spreads: dict[str, list] = {"short": [], "medium": [], "long": []}
    for item in items:
        if len(chosen[item.id].frames) == 64:
            spreads[item.groups["duration"][0]].append(keyframe_metrics.spread(chosen[item.id].times, None))
    assert [900 - len(rows) for rows in spreads.values()] == [261, 0, 0]
    assert [round(np.median([r["gap_ratio"] for r in rows]), 2) for rows in spreads.values()] == [1.67, 1.89, 1.91]
    assert max(r["gap_ratio"] for rows in spreads.values() for r in rows) < 2.02
    assert [round(np.mean([r["mean_gap"] for r in rows]), 1) for rows in spreads.values()] == [1.5, 8.1, 38.8]
    assert [round(np.mean([r["widest_gap"] for r in rows]), 1) for rows in spreads.values()] == [2.5, 15.3, 73.7]
    tables = keyframe_metrics.evaluate("videomme", *files)["selections"]["frame_idx"]["duration"]
    assert [round(tables[group]["overlap"]) for group in spreads] == [88, 32, 14]


def test_lvbench_uniform_reference(annotations):
    budgets = {
        16: [25.9, 27.5, 29.4], 32: [34.4, 36.9, 40.6], 64: [46.2, 51.3, 57.9],
        128: [59.3, 65.7, 77.4], 256: [67.7, 80.5, 91.4], 768: [79.1, 95.1, 100],
    }  # fmt: skip
    report = keyframe_metrics.evaluate("lvbench", annotations / "video_info.meta.jsonl", num_frames=tuple(budgets))
    tables = report["selections"]
    assert {k: rates(tables[f"uniform_{k}"]["all"], "any") for k in budgets} == budgets
    short = tables["uniform_64"]["reference_length"]["<= 60 s"]
    assert short["n"] == 1119 and rates(short, "any") == [25.8, 32.8, 41.8]
    types = tables["uniform_64"]["question_type"]
    assert {t: rates(table, "any") for t, table in types.items()} == {
        "entity recognition": [37.8, 43.1, 50.5],
        "event understanding": [53.1, 58.5, 65.2],
        "key information retrieval": [35.7, 42.3, 47.8],
        "temporal grounding": [38.4, 42.5, 48.9],
        "reasoning": [49.0, 54.5, 58.5],
        "summarization": [89.7, 89.7, 91.4],
    }


def annotated(tmp_path, **index):
    """A benchmark of one question about a 100 s video with a moment at 50 s, and an index file of one row."""
    row = {
        "video_path": "v.mp4", "question": "What?", "candidates": ["x", "y"], "correct_choice": 0,
        "position": [24 * 50], "topic_category": "t", "question_category": "q", "level": "L1", "id": "v_0",
        "duration_group": 600, "duration": 100.0,
    }  # fmt: skip
    (tmp_path / "lvb.json").write_text(json.dumps([row]))
    (tmp_path / "idx.json").write_text(json.dumps([row | index]))
    return "longvideobench", tmp_path / "lvb.json", tmp_path / "idx.json"


def test_a_row_may_bring_its_own_clock(tmp_path):
    by_fps = keyframe_metrics.evaluate(*annotated(tmp_path, frame_idx=[0, 1501], fps=30))
    by_time = keyframe_metrics.evaluate(*annotated(tmp_path, frame_idx=[0, 1501], timestamps=[0, 50.03], fps=30))
    assert by_fps == by_time
    assert by_fps["selections"]["frame_idx"]["all"]["mean_distance_s"] == 0.03
    assert by_fps["selections"]["frame_idx"]["all"]["frac_interval_95"]["1"] == [None, None]  # one video


def lvbench(tmp_path, **index):
    """A question about a 100 s video of 29.97 frames per second with a reference from 50 to 52 s, frames chosen."""
    qa = {
        "uid": "7", "question": "What?\n(A) x\n(B) y", "answer": "A", "question_type": ["reasoning"],
        "time_reference": "00:50-00:52",
    }  # fmt: skip
    info = {"duration_minutes": 100 / 60, "fps": 29.97}
    row = {"key": "v", "type": "tv", "qa": [qa], "video_info": info}
    (tmp_path / "lvbench.jsonl").write_text(json.dumps(row))
    (tmp_path / "idx.jsonl").write_text(json.dumps(row | {"qa": [qa | index]}))
    return "lvbench", tmp_path / "lvbench.jsonl", tmp_path / "idx.jsonl"


def test_lvbench_tells_the_frame_rate(tmp_path):
    """So frame numbers need not lie on a grid, and the evenly spaced frames are those of the annotations alone."""
    files = lvbench(tmp_path, frame_idx=[7, round(54 * 29.97), 2000])
    found = keyframe_metrics.evaluate(*files)["selections"]
    assert rates(found["frame_idx"]["all"], "any") == [0, 100, 100]
    assert found["frame_idx"]["all"]["mean_distance_s"] == 1.99
    assert found["uniform_3"] == keyframe_metrics.evaluate(*files[:2], num_frames=[3])["selections"]["uniform_3"]
    with pytest.raises(BenchmarkError, match=r"question v7: frame 3100 is at 103.4 s, behind the end .*100.0 s"):
        keyframe_metrics.evaluate(*lvbench(tmp_path, frame_idx=[0, 3100]))


def test_questions_without_a_row_may_be_left_out(tmp_path):
    files = annotated(tmp_path, frame_idx=[30, 1500])
    rows = json.loads(files[1].read_text())
    files[1].write_text(json.dumps(rows + [rows[0] | {"id": "v_1", "question": "Why?"}]))
    with pytest.raises(BenchmarkError, match=r"no row for question v_1 \(1 of 2 are missing\)"):
        keyframe_metrics.evaluate(*files)
    report = keyframe_metrics.evaluate(*files, allow_missing=True)
    assert (report["num_questions"], report["num_missing"]) == (1, 1)
    assert report["selections"]["frame_idx"]["all"]["n"] == report["selections"]["uniform_2"]["all"]["n"] == 1


def test_pictures_beside_times(tmp_path):
    """A question whose moment is second 50 of a video that is white there and noise elsewhere: the frame of that second
    is its picture again, another one is not; an empty store names the video."""
    files = annotated(tmp_path, frame_idx=[10 * 30, 50 * 30], fps=30)
    open_settings(tmp_path / "store", StoreSettings())
    with pytest.raises(BenchmarkError, match="store lacks 1 of the 1 videos: v.mp4"):
        keyframe_metrics.evaluate(*files, store=FrameStore(tmp_path / "store"))
    rng, numbers = np.random.default_rng(0), np.arange(100)
    pictures = [rng.integers(0, 256, (24, 32, 3), np.uint8) for _ in numbers]
    pictures[50] = np.full((24, 32, 3), 255, np.uint8)
    entry = VideoEntry("v.mp4", 30, 3000, numbers.astype(float), 30 * numbers, 32, 24, "none", 0, "")
    write_frames(tmp_path / "store", entry, (encode_jpeg(picture, 95) for picture in pictures))
    store = FrameStore(tmp_path / "store")
    found = keyframe_metrics.evaluate(*files, store=store)["selections"]
    own, even = found["frame_idx"]["all"], found["uniform_2"]["all"]
    assert own["ssim_recall"] == 100 and 50 <= own["ssim_precision"] < 75 and even["ssim_recall"] < 50
    precision, recall = own["ssim_precision"], own["ssim_recall"]
    assert own["ssim_f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=0.1)
    plain = keyframe_metrics.evaluate(*files)["selections"]["frame_idx"]["all"]
    assert plain == {name: value for name, value in own.items() if not name.startswith("ssim")}


@pytest.mark.parametrize("asked", [{"num_frames": [0]}, {"tolerances": [-1.0]}, {"tolerances": [float("nan")]}])
def test_impossible_numbers(tmp_path, asked):
    with pytest.raises(BenchmarkError, match="at least 1, tolerances at least 0 seconds"):
        keyframe_metrics.evaluate(*annotated(tmp_path, frame_idx=[0]), **asked)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "item 0 \\(v_0\\): field 'frame_idx' is missing"),
        ({"frame_idx": []}, "frame_idx must be ascending frame numbers, at least one"),
        ({"frame_idx": [30, 30]}, "must be ascending"),
        ({"frame_idx": "all"}, "field 'frame_idx' is 'all', which is not of type list"),
        ({"frame_idx": [0, "1"]}, "not a list of numbers"),
        ({"frame_idx": [0, 7, 5000]}, "video v.mp4: frame numbers up to 5000 do not tell .* 100 s: some lie behind"),
        ({"frame_idx": [0, 5000], "fps": 25}, "question v_0: frame 5000 is at 200.0 s, behind the end"),
        ({"frame_idx": [0], "id": "v_1", "question": "Why?"}, "0 questions have its video v.mp4, question and options"),
    ],
)
def test_bad_index_files_name_the_place(tmp_path, index, message):
    with pytest.raises(BenchmarkError, match=message):
        keyframe_metrics.evaluate(*annotated(tmp_path, **index))


def test_precision_beside_hits():
    """Two of four frames are within 1 s of a moment, one of two moments has one: precision and recall 1/2."""
    rows = keyframe_metrics.near(np.array([1.0, 2.5, 20.0, 40.0]), [(2.0, 2.0), (30.0, 31.0)], (1,))
    assert (rows["precision@1"], rows["frac@1"], rows["recall@1"], rows["f1@1"]) == (0.5, 0.5, 0.5, 0.5)
    assert rows["annd_precision"] == pytest.approx((1 + 0.5 + 10 + 9) / 4) and rows["annd_recall"] == rows["distance"]
