"""What one accelerator does: its ceilings, each piece of a step, the fused kernels' numerics, and the real trainer.

    python -m benchmarks.accelerator [--peer] [--output=runs/accelerator.json] [--stages=prefill,decode]

Needs one GPU or TPU and nothing else: no network, no video decoder, no weights (it draws those of a LLaVA-Video-7B, and
writes 18 GB of checkpoints below --folder for the trainer, removed again). On a CPU it runs a tiny configuration, whose
figures say nothing. All programs are compiled first, side by side. Stages run in the order of
accelerator_stages.STAGES, most important first, each for its time limit at most; what a stage found is added to the
JSON file at once, and a stage that overran or failed is recorded as that.
`--peer` measures PyTorch (benchmarks/pytorch_baseline.py) beside it at the end. Printed is the table of
docs/performance.md, of the newest result of each stage on this device.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax

from benchmarks.accelerator_stages import COMPILE_SECONDS, LARGE, STAGES, TINY, Bench, measured
from tspo_jax.data import frame_store
from tspo_jax.devices.chips import chip_of

START_SECONDS = 180 + COMPILE_SECONDS  # until a process is ready for its first stage


def work(connection, names: Sequence[str], folder: str) -> None:
    """Of a process of its own: tells which device it has when it is ready, then what it found of each stage."""
    device = jax.devices()[0]
    is_tiny = device.platform == "cpu"
    chip = chip_of(device)
    about = {
        "device": f"{device.platform}: {device.device_kind}",
        "peak_flops": chip.flops if chip else None,
        "peak_bandwidth": chip.hbm_bandwidth if chip else None,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
    }
    found = measured(names, Bench(TINY if is_tiny else LARGE, folder))
    next(found)
    connection.send(about)
    for name, figures, error in found:
        connection.send((name, figures, error and f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))


def measure(
    names: Sequence[str], limits: Mapping[str, float], folder: str, add: Callable[[dict], None], work: Callable = work
) -> None:
    """Runs stages, those that may in one process, by `work`; `add` is called with a row as soon as it is there."""
    context, waiting, about = multiprocessing.get_context("spawn"), list(names), {}
    while waiting:
        together = 1
        while not STAGES[waiting[0]].is_alone and together < len(waiting) and not STAGES[waiting[together]].is_alone:
            together += 1
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, waiting[:together], folder), daemon=True)
        process.start()
        there.close()
        is_ready = False
        for name in waiting[:together]:
            row = {"stage": name, "date": datetime.now(UTC).isoformat(timespec="seconds")}
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                if not is_ready:
                    if not here.poll(START_SECONDS):
                        raise TimeoutError(f"no device after {START_SECONDS} s")
                    about, is_ready = here.recv(), True
                if not here.poll(limits[name]):
                    raise TimeoutError(f"overran its {limits[name]:g} s")
                _, found, error = here.recv()
                add(row | about | ({"found": found} if error is None else {"error": error}))
            except (TimeoutError, EOFError) as error:  # EOF: the process is gone
                process.kill()
                process.join()
                add(row | about | {"error": str(error) or f"its process ended with status {process.exitcode}"})
            waiting.pop(0)
            if not process.is_alive() and process.exitcode:
                break  # the others in a new one
        process.kill()  # it may still be compiling what was given up
        process.join()
        here.close()


# ---- the table -------------------------------------------------------------------------------------------


def table(rows: Sequence[dict], command: str) -> str:
    """Markdown, of the newest result of each stage on the device of the last row."""
    device = rows[-1]["device"]
    newest = {row["stage"]: row for row in rows if row.get("device") == device}
    about = rows[-1]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    ceiling = newest.get("ceilings", {}).get("found", {})
    rates = {
        "flops": ceiling["matrix"]["flops"] / ceiling["matrix"]["seconds"] if ceiling else None,
        "bytes": ceiling["copy"]["bytes"] / ceiling["copy"]["seconds"] if ceiling else None,
    }
    lines = [f"`{command}`, {about['date'][:10]}, {device}, {versions}:", ""]
    lines += ["| stage | what | ms | rate | of the device's ceiling | more |", "|---|---|---|---|---|---|"]
    for name in STAGES:
        if name not in newest:
            continue
        row = newest[name]
        if "error" in row:
            lines.append(f"| {name} | | not measured: {row['error']} | | | |")
            continue
        for part, figures in row["found"].items():
            lines.append(f"| {name} | {part} | {' | '.join(_cells(name, figures, rates))} |")
    return "\n".join(lines) + "\n"


def _cells(stage: str, figures: Mapping, rates: Mapping[str, float | None]) -> tuple[str, str, str, str]:
    if stage == "numerics":
        return "", "", "", f"error {figures['error']:.2e}, of gradients {figures['gradient_error']:.2e}"
    seconds, rate, share, more = figures["seconds"], "", "", []
    if "flops" in figures:
        rate = f"{figures['flops'] / seconds / 1e12:.3g} TFLOP/s"
        share = rates["flops"] and figures["flops"] / seconds / rates["flops"]
    elif "bytes" in figures:
        rate = f"{figures['bytes'] / seconds / 1e9:.4g} GB/s"
        share = rates["bytes"] and figures["bytes"] / seconds / rates["bytes"]
    if "ratio" in figures:
        more.append(f"PyTorch {1e3 * figures['pytorch_seconds']:.4g} ms, {figures['ratio']:.2f} times as long")
    if "questions" in figures:
        rate = f"{seconds / figures['questions']:.3g} s a question"
        more.append(f"device idle {figures['device_idle']:.1%}, fetching {figures['fetch_seconds']:.2g} s")
        if figures["peak_bytes"]:
            more.append(f"peak {figures['peak_bytes'] / 1e9:.1f} GB")
    if "first_seconds" in figures:
        more.append(f"before: {figures['first_seconds']:.1f} s")
    return f"{1e3 * seconds:.4g}", rate, f"{share:.0%}" if share else "", "; ".join(more)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="also measure PyTorch, where it is installed")
    parser.add_argument("--stages", default="", help=f"only these of {', '.join(STAGES)}, separated by commas")
    parser.add_argument("--seconds", type=float, default=0, help="limit of each stage; default: its own")
    parser.add_argument("--folder", default="", help="where the trainer's checkpoints lie for a while; 18 GB")
    parser.add_argument("--output", default="runs/accelerator.json", type=Path)
    args = parser.parse_args(argv)
    names = args.stages.split(",") if args.stages else [name for name in STAGES if name != "peer" or args.peer]
    if unknown := set(names) - STAGES.keys():
        sys.exit(f"error: --stages: {', '.join(sorted(unknown))}: not of {', '.join(STAGES)}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory for the other processes and PyTorch
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # A program that two processes need, or two runs, is compiled once.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.output.parent / "compiled"))
    rows = json.loads(args.output.read_text()) if args.output.is_file() else []

    def add(row: dict) -> None:
        rows.append(row)
        frame_store.publish(args.output, lambda partial: partial.write_text(json.dumps(rows, indent=1) + "\n"))

    limits = {name: args.seconds or STAGES[name].seconds for name in names}
    measure(names, limits, args.folder, add)
    options = " --peer" if args.peer else ""
    print(table(rows, f"python -m benchmarks.accelerator{options}"), end="")


if __name__ == "__main__":
    main()
