"""Chips: published peak numbers of TPUs and GPUs; and the devices of a TPU slice that is not there."""

import dataclasses
import os
import re
from collections.abc import Sequence

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak numbers of one chip. TPUs: the tables "System architecture" at https://cloud.google.com/tpu/docs/v5e,
    .../v5p and .../v6e. GPUs: NVIDIA's data sheets of the H100, H200, HGX B200, A100 and L40S, and its white paper
    "Ada GPU Architecture" for the RTX 4090 (all November 2026).

    Attributes:
      flops: bfloat16 operations per second, summed in float32; of GPUs without sparsity (half of what many sheets say).
      hbm_bytes: memory, and
      hbm_bandwidth: its bytes per second.
      ici_bandwidth: bytes per second to other chips over all links (of GPUs NVLink or else PCIe), one way: half of the
        published bidirectional one.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float


CHIPS = {
    "v5e": Chip(flops=197e12, hbm_bytes=16e9, hbm_bandwidth=819e9, ici_bandwidth=200e9),
    "v5p": Chip(flops=459e12, hbm_bytes=95e9, hbm_bandwidth=2765e9, ici_bandwidth=600e9),
    "v6e": Chip(flops=918e12, hbm_bytes=32e9, hbm_bandwidth=1640e9, ici_bandwidth=400e9),
    "H100": Chip(flops=989e12, hbm_bytes=80e9, hbm_bandwidth=3350e9, ici_bandwidth=450e9),
    "H200": Chip(flops=989e12, hbm_bytes=141e9, hbm_bandwidth=4800e9, ici_bandwidth=450e9),
    "B200": Chip(flops=2250e12, hbm_bytes=180e9, hbm_bandwidth=7700e9, ici_bandwidth=900e9),
    "A100-80GB": Chip(flops=312e12, hbm_bytes=80e9, hbm_bandwidth=2039e9, ici_bandwidth=300e9),
    "A100-40GB": Chip(flops=312e12, hbm_bytes=40e9, hbm_bandwidth=1555e9, ici_bandwidth=300e9),
    "L40S": Chip(flops=362e12, hbm_bytes=48e9, hbm_bandwidth=864e9, ici_bandwidth=32e9),
    "RTX 4090": Chip(flops=165.2e12, hbm_bytes=24e9, hbm_bandwidth=1008e9, ici_bandwidth=32e9),
}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"}
# Chip -> its name in libtpu, and the shape of a slice by the number in its name: chips, but cores (two to a chip that
# work as one device) for v5p.
SLICES = {"v5e": ("v5e", FLAT), "v6e": ("v6e", FLAT), "v5p": ("v5", CUBES)}


# How a device calls itself (jax.Device.device_kind) -> chip.
DEVICE_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
DEVICE_KINDS |= {"TPU v6e": "v6e"}
DEVICE_KINDS |= {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA B200": "B200", "NVIDIA L40S": "L40S"}
DEVICE_KINDS |= {"NVIDIA A100-SXM4-80GB": "A100-80GB", "NVIDIA A100-SXM4-40GB": "A100-40GB"}
DEVICE_KINDS |= {"NVIDIA GeForce RTX 4090": "RTX 4090"}


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that a device is; None for a CPU, or a GPU or TPU that is not in the table."""
    return CHIPS.get(DEVICE_KINDS.get(device.device_kind, ""))


def slice_devices(name: str) -> tuple[Chip, Sequence[jax.Device]]:
    """The chip and the devices of a slice such as v5e-8, to compile for on a machine without a TPU.

    Raises:
      ValueError: for a slice that does not exist, or where libtpu is not installed.
    """
    found = re.fullmatch(r"(\w+)-(\d+)", name)
    chip, size = (found[1], int(found[2])) if found else (None, 0)
    if (gpu := chip or name) in CHIPS.keys() - SLICES.keys():
        raise ValueError(
            f"topology {name!r}: {gpu} is a GPU; programs are compiled ahead of time for TPUs only, and on a "
            "GPU by train.py, which says what they need before the first step"
        )
    if chip not in SLICES:
        raise ValueError(f"topology {name!r}: not CHIP-NUMBER with one of the chips {', '.join(SLICES)}")
    platform_name, shapes = SLICES[chip]
    if size not in shapes:
        raise ValueError(f"topology {name!r}: there is {', '.join(f'{chip}-{n}' for n in shapes)}")
    # libtpu would look for the machine that it runs on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        alone = {"chips_per_host_bounds": (1, 1, 1)} if size == 1 else {}  # else hosts have four chips or more
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{platform_name}:{shapes[size]}", **alone
        )
    except Exception as error:  # RuntimeError, ImportError or an XLA error, by the state of the installation
        if "lockfile" in str(error):
            raise ValueError(f"topology {name}: another process uses the TPU compiler ({error})") from error
        raise ValueError(
            f"topology {name}: the TPU compiler is not there ({error}); pip install --no-deps libtpu==0.0.42"
        ) from error
    return CHIPS[chip], topology.devices
