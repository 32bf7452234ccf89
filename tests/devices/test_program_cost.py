"""Counted loops: arithmetic of jaxprs, traffic and collectives of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tspo_jax.devices.program_cost import Collective, Program, arithmetic
from tspo_jax.devices.sharding import make_mesh

M, K, N, LAYERS = 8, 16, 32, 5


def layers(x, kernels):
    """LAYERS pairs of products [M,K] x [K,N] x [N,K], in a scan."""

    def layer(x, pair):
        return jnp.tanh(x @ pair[0]) @ pair[1], None

    return jax.lax.scan(layer, x, kernels)[0]


KERNELS = jnp.ones((LAYERS, K, N)), jnp.ones((LAYERS, N, K))
LAYERS_FLOPS = LAYERS * 2 * (2 * M * K * N)


def traced(function, *args):
    return jax.jit(function).trace(*args).jaxpr


def test_arithmetic_of_a_scan():
    cost = arithmetic(traced(layers, jnp.ones((M, K)), KERNELS), {})
    assert cost.flops == LAYERS_FLOPS
    assert cost.trips == {("while",): LAYERS}


def test_arithmetic_of_loops_in_named_scopes():
    """A loop whose length depends on the data around a scan, after a loop of its own and a convolution."""

    def program(x, kernels, times, image, kernel):
        with jax.named_scope("first"):
            x = layers(x, kernels)
        with jax.named_scope("second"):
            x = jax.lax.fori_loop(0, times, lambda i, x: layers(x, kernels), x)
        patches = jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x, patches, jax.lax.cond(times > 2, lambda: x @ kernels[0][0], lambda: jnp.zeros((M, N)))

    args = jnp.ones((M, K)), KERNELS, 3, jnp.ones((1, 4, 4, 3)), jnp.ones((2, 2, 3, 7))
    cost = arithmetic(traced(program, *args), {"second": 4})
    convolution = 2 * (2 * 2 * 7) * (2 * 2 * 3)
    assert cost.flops == LAYERS_FLOPS * (1 + 4) + convolution + 2 * M * K * N
    assert cost.trips == {("first", "while"): LAYERS, ("second", "while"): 4, ("second", "while", "while"): LAYERS}
    with pytest.raises(ValueError, match="loop in second/while depends on the data"):
        arithmetic(traced(program, *args), {})


def test_ambiguous_loops_are_named():
    def program(x):
        x = jax.lax.fori_loop(0, 3, lambda i, x: x + 1, x)
        return jax.lax.fori_loop(0, 4, lambda i, x: x * 2, x)

    with pytest.raises(ValueError, match="two loops are both called while"):
        arithmetic(traced(program, 1.0), {})


@pytest.fixture(scope="module")
def tensor_parallel():
    """`layers` with the inner dimension split over 4 devices: one all-reduce per layer."""
    mesh = make_mesh([("data", 2), ("model", 4)], jax.devices())

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    args = put(jnp.ones((M, K)), "data"), (put(KERNELS[0], None, None, "model"), put(KERNELS[1], None, "model"))
    lowered = jax.jit(layers).trace(*args)
    return lowered.lower().compile(), arithmetic(lowered.jaxpr, {})


def test_collectives_in_a_loop(tensor_parallel):
    compiled, cost = tensor_parallel
    (found,) = Program(compiled.as_text(), cost.trips, 8).collectives
    assert (found.kind, found.size, found.group, found.count) == ("all-reduce", M // 2 * K * 4, 4, LAYERS)
    assert found.wire_bytes == LAYERS * 2 * (M // 2 * K * 4) * 3 / 4
    assert "while" in found.where


def test_traffic_of_a_loop_reads_each_layer_once(tensor_parallel):
    compiled, cost = tensor_parallel
    once, all_layers = (Program(compiled.as_text(), trips, 8).hbm_bytes for trips in ({}, cost.trips))
    kernels = 2 * K * N // 4 * 4
    assert once >= kernels, "one layer's kernels"
    assert all_layers - once >= (LAYERS - 1) * kernels, "the others'"
    assert all_layers < 5 * LAYERS * kernels, "the stack of all layers is not counted for each of them"
    xla = compiled.cost_analysis()["bytes accessed"]
    assert once == pytest.approx(xla, rel=0.5), "XLA counts a loop's body once"


def test_wire_bytes_of_each_kind():
    sent = {
        kind: Collective(kind, size=400, group=4, count=2, where="").wire_bytes
        for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    }
    assert sent == {
        "all-reduce": 2 * 2 * 300,
        "all-gather": 2 * 300,
        "reduce-scatter": 2 * 300 * 4,  # its size is that of the result, a quarter of what is summed
        "all-to-all": 2 * 300,
        "collective-permute": 2 * 400,
    }


HLO = """\
HloModule jit_f

%fused (param_0.1: bf16[28,4,8], param_1.1: s32[], param_2.1: bf16[1,4,8]) -> bf16[28,4,8] {
  %param_0.1 = bf16[28,4,8]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %param_2.1 = bf16[1,4,8]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = bf16[28,4,8]{2,1,0} dynamic-update-slice(%param_0.1, %param_2.1, %param_1.1, %zero, %zero)
}

ENTRY %main (a: bf16[28,4,8], i: s32[], b: bf16[1,4,8]) -> bf16[28,4,8] {
  %a = bf16[28,4,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  %b = bf16[1,4,8]{2,1,0:T(8,128)S(1)} parameter(2)
  %gathered = bf16[4,4,8]{2,1,0} all-gather(%b), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %scattered = bf16[1,4,8]{2,1,0} reduce-scatter(%gathered), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %fusion = bf16[28,4,8]{2,1,0} fusion(%a, %i, %b), kind=kLoop, calls=%fused
}
"""


def test_updates_in_place_on_chip_memory_and_named_groups():
    program = Program(HLO, {}, 8)
    slice_bytes = 4 * 8 * 2
    gather, scatter = 4 * slice_bytes, slice_bytes + 4 * slice_bytes  # what is read lies on the chip for the former
    assert program.hbm_bytes == gather + scatter + 4 + slice_bytes, "the index and the new slice, not the stack"
    assert {(c.kind, c.group) for c in program.collectives} == {("all-gather", 4), ("reduce-scatter", 2)}
    np.testing.assert_equal(program.runs, {"main": 1, "fused": 1})
