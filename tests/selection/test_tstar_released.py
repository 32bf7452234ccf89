import json

import numpy as np
import pytest
import scipy
from scripted_search import detector, look

from tspo_jax.selection import tstar_released


@pytest.fixture(scope="module")
def script(golden):
    return json.loads((golden / "tstar_search.json").read_text())


@pytest.fixture(scope="module")
def arrays(golden):
    data = np.load(golden / "tstar_search.npz")
    cases = {}
    for name in data.files:
        case, _, field = name.partition("/")
        cases.setdefault(case, {})[field] = data[name]
    return cases


@pytest.fixture(scope="module")
def boxes_of(script):
    namespace = {}
    exec("\n".join(script["scripted_detector_source"]), namespace)
    return lambda spec: lambda *where: namespace["detections"](spec, *where)


@pytest.fixture(scope="module")
def searched(script, boxes_of):
    """Kind of generator -> number of a case -> its search, and the generator's next number after it."""
    found = {}
    for kind, state_of in GENERATORS.items():
        found[kind] = {}
        for number, case in list(enumerate(script["cases"]))[:: STEP_OF[kind]]:
            rng = state_of(case["seed"])
            search = run(case, boxes_of, rng)
            found[kind][number] = search, rng.random() if kind == "Generator" else rng.random_sample()
    return found


def run(case, boxes_of, rng):
    texts = len(case["targets"]) + len(case["cues"]) + 1
    return tstar_released.search(
        case["N"],
        look,
        detector(boxes_of(case["detector"]), texts, case["grid"]),
        case["targets"],
        case["cues"],
        k=case["K"],
        grid=tuple(case["grid"]),
        share=case["search_budget"],
        threshold=case["confidence_threshold"],
        rng=rng,
    )


GENERATORS = {
    "RandomState": np.random.RandomState,
    "Generator": lambda seed: np.random.Generator(np.random.RandomState(seed)._bit_generator),
}
STEP_OF = {"RandomState": 1, "Generator": 4}  # of the cases; every frame is resized, which takes its time


@pytest.mark.parametrize("kind", list(GENERATORS))
def test_golden_search(script, arrays, searched, kind):
    """Step by step what the released class does, as far as it gets."""
    newer_scipy = tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18)
    for number, (found, next_number) in searched[kind].items():
        case, expected = script["cases"][number], arrays.get(f"case{number}", {})
        assert len(found.picks) == min(case["K"], case["N"])
        assert case["error"] or len(found.rounds) == case["rounds"]
        verified = []
        for r, ours in enumerate(found.rounds[: case["rounds"]]):
            np.testing.assert_array_equal(ours.sampled, expected["sampled"][r])
            assert ours.fallback == expected["fallback"][r]
            np.testing.assert_array_equal(ours.confidence, expected["confidence"][r])
            np.testing.assert_array_equal(ours.score, expected["score"][r])
            np.testing.assert_array_equal(ours.score_after, expected["score_after"][r])
            if not (newer_scipy and r in case["rounds_whose_P_differs_in_scipy_1_18"]):
                np.testing.assert_allclose(ours.probability, expected["P"][r], rtol=1e-12)
            np.testing.assert_array_equal(np.packbits(ours.unvisited), expected["unvisited"][r])
            assert ours.budget_left == expected["budget_left"][r]
            remaining = [i in ours.remaining for i in range(len(case["targets"]))]
            np.testing.assert_array_equal(remaining, expected["remaining"][r])
            verified += [(r, v.second, v.calls, v.score, v.removed) for v in ours.verified]
        if case["rounds"]:
            np.testing.assert_array_equal(np.reshape(verified, (-1, 5)), expected["verify"].reshape(-1, 5))
            assert sum(v[2] for v in verified) + case["rounds"] == case["detector_calls"]
        if not case["error"]:
            np.testing.assert_array_equal(found.picks, expected["final_sampled"])
            assert next_number == case["next_rand"]


def test_golden_final_score(script, arrays, searched):
    """The best of the last score, and those of the last P, which the released script for answering takes."""
    for number, case in enumerate(script["cases"]):
        expected = arrays.get(f"case{number}", {})
        if case["error"] or not case["rounds"]:
            continue
        found, _ = searched["RandomState"][number]
        best = np.sort(np.argsort(-found.score, kind="stable")[: case["K"]])
        np.testing.assert_array_equal(best, expected["final_topk_score"])
        if not case["topk_P_tied"] and not case["rounds_whose_P_differs_in_scipy_1_18"]:
            best = np.sort(np.argsort(-found.rounds[-1].probability.astype(np.float32))[: case["K"]])
            np.testing.assert_array_equal(best, expected["final_topk_P"])


@pytest.mark.parametrize(("num_seconds", "grid"), [(1, (1, 1)), (2, (4, 4)), (10, (4, 4)), (60, (1, 3)), (36, (3, 4))])
def test_what_makes_the_original_fail(num_seconds, grid):
    """Videos shorter than the grid, points too few for a cubic, a video that was seen whole without any detection."""
    found = tstar_released.search(
        num_seconds, look, detector(lambda *_: [], 2, grid), ["cat"], [],
        k=4, grid=grid, share=2.0, threshold=0.6, rng=np.random.RandomState(0),
    )  # fmt: skip
    assert len(found.picks) == min(4, num_seconds) == len(set(found.picks.tolist()))
    assert found.num_detections == len(found.rounds) > 0


def test_black_cells_get_no_credit():
    def boxes(second, is_alone, cell):
        return [(0, 0, 10, 10, 0, 0.3)]

    def everywhere(pictures):
        found = detector(boxes, 2, (2, 2))(pictures)
        for one, picture in zip(found, pictures, strict=True):
            one.boxes[-1] = (picture.shape[1] - 9, picture.shape[0] - 9, picture.shape[1] - 1, picture.shape[0] - 1)
        return found

    found = tstar_released.search(
        3, look, everywhere, ["cat"], [], k=2, grid=(2, 2), share=1.0, threshold=0.6, rng=np.random.RandomState(0)
    )
    assert len(found.rounds[0].confidence) == 3


def test_shrinking_is_between_pixel_centres():
    frame = np.zeros((2, 4, 3), np.uint8)
    frame[:, 2:] = 100
    assert tstar_released._bilinear(frame, (1, 2))[0, :, 0].tolist() == [0, 100]
    assert tstar_released._bilinear(frame, (2, 8))[0, :, 0].tolist() == [0, 0, 0, 25, 75, 100, 100, 100]
