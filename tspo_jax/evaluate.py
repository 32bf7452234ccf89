"""Answers held-out questions from the frames of several selection methods, side by side.

    python -m tspo_jax.evaluate --config=configs/toy.py --run_dir=runs/toy [--agent=DIR] [--beside=RUN,..] [--output=F]

    select   scoring.py        CLIP features of a video, read once for all its questions -> scores -> picks
    answer   frame_answers.py  the frozen MLLM answers; frame sets that methods or budgets share are answered once
    score    benchmarks.py     answer -> letter -> right or wrong, one line each in RUN_DIR/evaluation/rows.jsonl
    sum up   results.py        accuracies and differences with intervals, in RUN_DIR/evaluation/summary.json

The agent is the newest checkpoint of RUN_DIR, or that of --agent: a run folder, a checkpoint, a TSPO folder, or a plain
CLIP folder (then it is untrained). Running the same command again goes on where it was stopped; no question is answered
twice from the same frames. On several hosts the same command in each (config.distributed, as for train) shares the
questions: the first process writes, SIGTERM ends all of them with status 75 and a lost process with 76, and the same
command goes on. --beside names other runs that have been evaluated on the same questions: their agents stand in the
table too ("topk of RUN"), with the differences to this one.

    python -m tspo_jax.evaluate --keyframes --benchmark=longvideobench --annotations=FILE --frame_idx=FILE --output=FILE

compares chosen frames with annotated moments instead (evaluation/keyframe_metrics.py): no video, no model.
"""

from collections.abc import Mapping, Sequence

from absl import flags

from tspo_jax import config as config_module
from tspo_jax.command_line import entry_point
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import processes
from tspo_jax.evaluation import benchmarks, keyframe_metrics
from tspo_jax.evaluation.run import evaluate
from tspo_jax.runs.preemption import EXIT_STATUS


def keyframes(args: flags.FlagValues) -> Mapping:
    """--keyframes: the report of keyframe_metrics.evaluate."""
    if not args.benchmark or not args.annotations:
        raise ValueError("--keyframes needs --benchmark and --annotations (and --frame_idx, else only uniform frames)")
    return keyframe_metrics.evaluate(
        args.benchmark,
        args.annotations,
        args.frame_idx,
        _numbers("num_frames", args.num_frames, int),
        _numbers("tolerances", args.tolerances, float),
        args.time_base,
        args.allow_missing,
        FrameStore(args.pictures) if args.pictures else None,
    )


def _numbers(flag: str, texts: Sequence[str], kind: type) -> tuple:
    try:
        return tuple(kind(text) for text in texts)
    except ValueError:
        raise ValueError(f"--{flag}={','.join(texts)} is no list of numbers") from None


def define_flags() -> None:
    config_module.define_flag()
    flags.DEFINE_string("run_dir", None, "Run folder: its agent is evaluated, and the results go there.")
    flags.DEFINE_string("agent", None, "Folder of another agent: run folder, checkpoint, TSPO or CLIP folder.")
    flags.DEFINE_list("beside", [], "Runs evaluated on the same questions, whose agents stand in the table too.")
    flags.DEFINE_bool("keyframes", False, "Compare chosen frames with annotated moments; no video, no model.")
    flags.DEFINE_enum(
        "benchmark", None, list(benchmarks.BENCHMARKS), "With --keyframes: the benchmark.", case_sensitive=False
    )
    flags.DEFINE_string("annotations", None, "With --keyframes: its annotation file.")
    flags.DEFINE_string("frame_idx", None, "With --keyframes: its rows, each with `frame_idx`.")
    flags.DEFINE_list("num_frames", [], "With --keyframes: numbers of evenly spaced frames to compare with.")
    flags.DEFINE_list("tolerances", [], "With --keyframes: seconds around a moment; by default the benchmark's.")
    flags.DEFINE_string("pictures", "", "With --keyframes: frame store whose pictures are compared too (SSIM).")
    flags.DEFINE_enum(
        "time_base", "capped", keyframe_metrics.TIME_BASES, "With --keyframes: how frame rates are recovered."
    )
    flags.DEFINE_bool(
        "allow_missing", False, "Leave out questions whose video, or whose row of frame_idx, is not there."
    )
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")


def main() -> int:
    args = flags.FLAGS
    if args.keyframes:
        entry_point.write_result(keyframes(args), args.output)
        return 0
    for name in ("benchmark", "annotations", "frame_idx", "num_frames", "tolerances", "pictures"):
        if getattr(args, name):
            raise ValueError(f"--{name} is for --keyframes")
    if not args.run_dir:
        raise ValueError("--run_dir is needed: the run folder whose agent is evaluated")
    config = config_module.from_flags()
    processes.join(config.distributed)
    with processes.end_together():
        summary = evaluate(config, args.run_dir, args.agent, args.allow_missing, args.beside)
        if summary is None:
            return EXIT_STATUS
        if processes.is_first():
            entry_point.write_result(summary, args.output)
    return 0


if __name__ == "__main__":
    define_flags()
    entry_point.run(main, check=config_module.check_overrides)
