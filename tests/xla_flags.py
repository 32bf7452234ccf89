"""XLA_FLAGS of the tests and of the processes that they start."""

from importlib import metadata


def xla_flags(num_devices: int) -> str:
    """For a process with this many CPU devices, whose tiny programs cost more to compile than to run.

    LLVM optimises nothing, and loops are emitted without the MLIR pipeline, which saves half of the suite's processor
    time. How a program is partitioned over devices does not change.
    """
    quickly = ["--xla_backend_optimization_level=0"]
    if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # an unknown flag ends the process
        quickly.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join([*quickly, f"--xla_force_host_platform_device_count={num_devices}"])
