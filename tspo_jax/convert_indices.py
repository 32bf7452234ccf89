"""Frame indices from one form into another: of other programs for us, ours for other programs.

    python -m tspo_jax.convert_indices --benchmark=mlvu --annotations=mlvu.json --frame_idx=TSPO_MLVU_frameIdx.json \
        --output=mlvu.jsonl
    python -m tspo_jax.convert_indices --benchmark=mlvu --annotations=mlvu.json --method=topk --num_frames=64 \
        --frame_idx=runs/a/evaluation/rows.jsonl --output=mlvu_frameIdx.json --form=published

The forms are those of evaluation/frame_indices.py; what is read is recognised by its fields.
"""

from absl import flags

from tspo_jax.command_line import entry_point
from tspo_jax.evaluation import benchmarks, frame_indices

FORMS = ("neutral", "published")


def define_flags() -> None:
    flags.DEFINE_enum("benchmark", None, list(benchmarks.BENCHMARKS), "Whose questions these are.", required=True)
    flags.DEFINE_string("annotations", None, "Its annotation file.", required=True)
    flags.DEFINE_string("frame_idx", None, "Index file, or rows.jsonl of an evaluation.", required=True)
    flags.DEFINE_string("method", "", "Of the rows of an evaluation, those of this method.")
    flags.DEFINE_integer("num_frames", 0, "Of the rows of an evaluation, those of this budget.", lower_bound=0)
    flags.DEFINE_enum("form", "neutral", FORMS, "Form of the file that is written.")
    flags.DEFINE_bool("allow_missing", False, "Write the selections that there are where questions lack one.")
    flags.DEFINE_string("output", None, "File to write.", required=True)


def main() -> None:
    args = flags.FLAGS
    items = benchmarks.read_items(args.benchmark, args.annotations)
    selections = frame_indices.read(
        args.frame_idx, args.benchmark, items, args.method, args.num_frames, args.allow_missing
    )
    if args.form == "published":
        frame_indices.write_published(args.output, args.benchmark, args.annotations, selections)
    else:
        frame_indices.write_neutral(args.output, list(selections.values()))


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
