"""Builds the dual-style training set of the paper from LLaVA-Video-178K and a frame store, by stages.

    python -m tspo_jax.build_dataset --annotations=FOLDER|FILES --store=DIR --answerer=DIR --output=DIR

--annotations are LLaVA-Video-178K's own files (a folder: all *_mc_*.json below it) or question files in the TSPO-10K
format (.jsonl), whose `general` questions go through the same filters. The videos must be in the store (predecode).

    1_flat.jsonl      multiple-choice questions of stored videos over --min_seconds
    2_few.jsonl       answers from --few_frames uniform frames: right ones are too easy and dropped
    3_many.jsonl      answers from --many_frames uniform frames to the others: wrong ones are too hard and dropped
    4_random.jsonl    with --frame_sets=G: answers from G random sets of --set_frames frames; questions whose reward is
                      the same for all of them teach nothing (a dead group) and are dropped
    5_events.jsonl    descriptions of random moments of the target videos, by --captioner (default: the answerer)
    6_needle.jsonl    four-option questions made of them, for needle samples (data/event_questions.py)
    train.jsonl, heldout.jsonl    both styles mixed, no video in both; README.md is the card, with counts and hashes

The MLLMs use all devices of a host: --model_axis=N splits their weights over N, the others share the batch. Several
hosts: --num_shards=N --shard_index=I (in job arrays from the environment, as in predecode) answers every N-th question
and describes every N-th target into OUTPUT/shard-I-of-N. Then the same command without them joins what was answered.

Every stage appends to its file and is finished row by row: run again after a kill, it goes on where it stopped. Result
(stdout or --output_json): the counts and hashes as a JSON object.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from tspo_jax.command_line import entry_point, job_array
from tspo_jax.command_line.progress_bar import ProgressBar
from tspo_jax.config import MAX_BAD
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.tspo import dataset
from tspo_jax.tspo.dataset import Settings


def define_flags() -> None:
    flags.DEFINE_list("annotations", None, "Folder or files of LLaVA-Video-178K, or TSPO-10K jsonl.", required=True)
    flags.DEFINE_string("store", None, "Frame store with the videos (tspo_jax.predecode).", required=True)
    flags.DEFINE_string("answerer", None, "Folder of the Video-MLLM that filters.", required=True)
    flags.DEFINE_string("adapter", "", "PEFT folder of adapters for it.")
    flags.DEFINE_string("captioner", "", "Video-MLLM or SwinBERT that describes events; default: --answerer.")
    flags.DEFINE_string("output", None, "Folder of the data set.", required=True)
    flags.DEFINE_string("output_json", "", "File for the result; default: stdout.")
    flags.DEFINE_bool("strict", False, "Bad records end the run; else they are listed and left out.")
    flags.DEFINE_float("max_bad", MAX_BAD, "Share of bad records above which a file is a wrong one.", 0.0, 1.0)
    flags.DEFINE_integer("batch_size", 8, "Questions that are answered together.", lower_bound=1)
    flags.DEFINE_integer("model_axis", 1, "Devices that share an MLLM's weights; the others share the batch.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the MLLMs; default: bfloat16, float32 on a CPU.")
    job_array.define_flags()
    flags.adopt_module_key_flags(job_array)  # --help shows them
    for field in dataclasses.fields(Settings):
        define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}[field.type]
        define(field.name, field.default, field.metadata["help"])


def main() -> int:
    args = flags.FLAGS
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    shard = job_array.shard_from(args.num_shards, args.shard_index)
    output = shard.path(Path(args.output), "shard") if shard.count > 1 else Path(args.output)
    files, store = dataset.find_annotations(args.annotations), FrameStore(args.store)
    folders = {"answerer": args.answerer, "captioner": args.captioner or args.answerer}
    dtype = jnp.dtype(args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    mesh = sharding.make_mesh((("data", -1), ("model", args.model_axis)), jax.devices())
    sharding.check_batch_size(mesh, args.batch_size)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with ProgressBar(*columns) as progress:

        def watch(stage: str, total: int, done: int) -> Callable[[int], None]:
            task = progress.add_task(stage, total=total, completed=done)
            return lambda count: progress.advance(task, count)

        result = dataset.run(
            files,
            store,
            output,
            settings,
            folders,
            mesh,
            args.batch_size,
            dtype,
            watch,
            shard,
            0.0 if args.strict else args.max_bad,
            args.adapter,
        )
    for note in dataset.notes(result):
        progress.console.print(note, markup=False, soft_wrap=True)
    entry_point.write_result(result, args.output_json)
    return 2 if result["errors"] else 0


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
