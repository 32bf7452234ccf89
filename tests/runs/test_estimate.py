"""Memory of compiled programs, and how long a run will take."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.devices import chips as tpu
from tspo_jax.devices import sharding
from tspo_jax.devices.compiling import Call
from tspo_jax.runs import estimate


@pytest.fixture
def calls():
    mesh = sharding.make_mesh([("data", 2), ("model", 1)], jax.devices()[:2])
    rows = sharding.abstract_batch(mesh, np.zeros((8, 1024), np.float32))
    return mesh, {"double": Call(jax.jit(lambda x: 2 * x), (rows,), {}, {})}


def test_memory_is_that_of_a_device(calls):
    mesh, calls = calls
    found = estimate.Estimate(calls, mesh)
    assert found.bytes == 2 * 4 * 1024 * 4, "half of the rows, read and written"
    assert found.seconds is None
    rows = sharding.abstract_batch(mesh, np.zeros((2, 1), np.float32))
    small = estimate.Estimate({"double": calls["double"]._replace(args=(rows,))}, mesh)
    steps = [
        estimate.Steps(("general", 40), "the others", 0.5, small),
        estimate.Steps(("specific", 128), "specific samples, 128 candidates, K = 3", 0.5, found),
    ]
    assert estimate.said(steps, 10) == (
        "memory of a device 32.8 kB (double 32.8 kB; specific samples, 128 candidates, K = 3)"
    )


def test_a_call_finds_what_was_compiled(calls):
    from tspo_jax.runs.metrics import CompilationCounter

    mesh, calls = calls
    estimate.Estimate(calls, mesh)
    batch = sharding.put_batch(mesh, np.ones((8, 1024), np.float32))
    with CompilationCounter() as compilations:
        calls["double"].program(batch)
    assert compilations.count == 0


def test_roofline_on_a_known_chip(calls, monkeypatch):
    """Of a chip that moves 16,384 bytes a second; the program runs three times in a step."""
    mesh, calls = calls
    slow = dataclasses.replace(tpu.CHIPS["v5e"], hbm_bandwidth=16384.0)
    monkeypatch.setattr(estimate, "chip_of", lambda device: slow)
    calls = {"double": calls["double"]._replace(times=3)}
    found = estimate.Estimate(calls, mesh)
    assert found.seconds == pytest.approx(3 * 2, rel=0.01)
    faster = dataclasses.replace(slow, hbm_bandwidth=2 * 16384.0)
    monkeypatch.setattr(estimate, "chip_of", lambda device: faster)
    steps = [estimate.Steps(("general", 40), "some", 0.5, found)]
    steps.append(estimate.Steps(("specific", 128), "others", 0.5, estimate.Estimate(calls, mesh)))
    assert estimate.said(steps, 100).endswith("; at least 4.5 s per step, 7.5 min for all")


def test_chips_by_the_name_of_their_devices():
    assert tpu.chip_of(jax.devices()[0]) is None
    device = type("Device", (), {"device_kind": "TPU v5 lite"})()
    assert tpu.chip_of(device) == tpu.CHIPS["v5e"]
    device = type("Device", (), {"device_kind": "NVIDIA H200"})()
    assert tpu.chip_of(device) == tpu.CHIPS["H200"] and tpu.CHIPS["H200"].hbm_bytes == 141e9
    assert set(tpu.DEVICE_KINDS.values()) == set(tpu.CHIPS)


def test_pace_is_that_of_steps_without_compilation():
    pace = estimate.Pace(100)
    general, specific = ("general", 64), ("specific", 832)
    costs = {general: SimpleNamespace(seconds=0.5), specific: SimpleNamespace(seconds=None)}
    pace.expect([estimate.Steps(shape, "", 0.5, cost) for shape, cost in costs.items()])
    rows = [pace.row(step, general, 60.0, step) for step in range(1, 4)]
    assert rows[0] == {"steps_per_second": pytest.approx(1 / 60), "roofline_share": pytest.approx(0.5 / 60)}
    assert pace.said() == ""
    for step in range(4, 9):
        assert pace.row(step, None, 0.1, 3) == {"steps_per_second": pytest.approx(10)}
        assert pace.row(step, specific, 2.0, 3) == {"steps_per_second": 0.5}
    assert pace.said() == "2.00 s per step: about 3.1 min for the 92 steps that are left"
    assert pace.said() == "", "once"


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (150, "2.5 min"), (9000, "2.5 h"), (200_000, "2.3 days")])
def test_clock(seconds, text):
    assert estimate.clock(seconds) == text


def test_no_array_is_made(calls):
    mesh, _ = calls
    (rows,) = jax.tree.leaves(sharding.abstract_batch(mesh, np.zeros((8, 3), np.int32)))
    assert isinstance(rows, jax.ShapeDtypeStruct) and rows.shape == (8, 3) and rows.dtype == jnp.int32
    assert rows.sharding == sharding.over_questions(mesh)
