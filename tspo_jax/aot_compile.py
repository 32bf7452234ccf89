"""Compiles the programs of a training step for TPU slices that are not there, at full size and without weights.

    python -m tspo_jax.aot_compile --config=configs/llava_video_7b.py --topology=v5e-8,v5p-8 [--output=FILE.json]
    python -m tspo_jax.aot_compile --config=configs/tpo_llava_video_7b.py:full --topology=v5e-16

For each program (sample, answer, update: train.py; or update and reference: train_answerer.py) the real TPU compiler
says what a device holds and what runs on it; loops are counted (devices/program_cost.py), and the time is a roofline:
the longest of arithmetic, memory traffic and communication at the chip's published peaks (devices/chips.py), which no
run can beat. Every frame set is taken to have frames of its own and every answer to be of full length, so a real step
does less.

Needs libtpu (an x86-64 Linux machine, no TPU) and the answerer's config.json: in its folder, or else in
configs/architectures/ under the folder's name. Exit status 1 where a program does not fit, with what to change.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from tspo_jax import config as config_module
from tspo_jax.command_line import entry_point
from tspo_jax.devices.compiling import HEADINGS, table_rows
from tspo_jax.tpo import ahead_of_time as of_answerers
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tspo import ahead_of_time as of_agents


def main() -> int:
    is_of_answerer = "preference" in (flags.FLAGS.config or {})
    config = config_module.from_flags(TpoConfig if is_of_answerer else config_module.Config)
    results = (of_answerers if is_of_answerer else of_agents).compile_config(
        config,
        Path(config_flags.get_config_filename(flags.FLAGS["config"])).parent / "architectures",
        flags.FLAGS.topology,
        flags.FLAGS.num_layers,
        note=lambda topology: Console(stderr=True).print(f"{topology} ..."),
    )
    table = Table(*HEADINGS, box=None)
    for row in table_rows(results):
        table.add_row(*row)
    console = Console(stderr=True)
    console.width = max(console.width, 200)  # a narrow terminal breaks lines better than the table would cut its cells
    console.print(table)
    for result in results:
        if not result["fits"]:
            console.print(f"{result['topology']}: does not fit. Less memory is taken by: {'; '.join(result['advice'])}")
    entry_point.write_result({"results": results}, flags.FLAGS.output)
    return 0 if all(result["fits"] for result in results) else 1


def define_flags() -> None:
    config_module.define_flag()
    flags.DEFINE_list("topology", ["v5e-8"], "TPU slices to compile for (no GPUs), e.g. v5e-8,v5e-256,v6e-8,v5p-128.")
    flags.DEFINE_integer("num_layers", 0, "Cut the answerer to this many layers (a quick check); 0 = all.", 0)
    flags.DEFINE_string("output", "", "File for the JSON; default: stdout.")


def check_overrides(argv: Sequence[str]) -> None:
    """Raises ConfigError for a field that the config of no trainer has."""
    try:
        config_module.check_overrides(argv)
    except config_module.ConfigError as error:
        try:
            config_module.check_overrides(argv, TpoConfig)
        except config_module.ConfigError:
            raise error from None


if __name__ == "__main__":
    define_flags()
    entry_point.run(main, check=check_overrides)
