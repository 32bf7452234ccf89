"""Chooses the frames of a video that a question needs.

    python -m tspo_jax.select_frames --agent=DIR --video=FILE --question="Who opens the door?" --num_frames=16
    python -m tspo_jax.select_frames --agent=DIR --video=FOLDER --question="Who?" --question="Why?" --output=F.jsonl
    python -m tspo_jax.select_frames --agent=DIR --store=DIR --benchmark=mlvu --annotations=mlvu.json --output=F.jsonl

    python -m tspo_jax.select_frames --method=tstar --detector=DIR --targets=door,key --video=FILE --question="Who?"

`DIR` is a folder in the layout of TSPO-0.4B; a plain CLIP folder will do for the methods uniform and clip-topk. The
options of a multiple-choice question are left out of what the agent reads, as in its training. Method tstar (T*) needs
no agent: it searches for objects with an OWL-ViT detector and reads only the frames that it looks at. It searches for
--targets (and --cues near them), or for what a Video-MLLM (--answerer) names from eight frames; "searched" in the
result says what was searched, at which cost, and, where nothing was found, why the frames are evenly spaced.

Each video is decoded and encoded once for all its questions, and not at all where it is in a frame store that predecode
made with the same CLIP. One question about one video gives one JSON object; several give one line of --output each (on
stdout {"selections": [..]}), in the neutral form of evaluation/frame_indices.py, which convert_indices turns into the
form of other programs. Of several videos, one that cannot be read is named and left out, and the exit status is 2.

Many machines: with --num_shards=N --shard_index=I (in a job array the environment tells the index) each takes every
N-th video and writes --output=F.jsonl as F-I-of-N.jsonl; their lines together are those of one run.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from absl import flags

from tspo_jax.command_line import entry_point, job_array
from tspo_jax.data.shard import Shard
from tspo_jax.evaluation import benchmarks
from tspo_jax.selection import methods, search_flags

# Heavy modules are imported where they are needed: whoever asks for --help need not wait for them.


def define_flags() -> None:
    flags.DEFINE_string(
        "agent", "", "Folder of CLIP and the temporal agent, or run folder (runs/x, runs/x/best); tstar needs none."
    )
    flags.DEFINE_string("video", "", "Video file, or folder of videos; with --store, the name of a video of it.")
    flags.DEFINE_string("store", "", "Frame store with features of this CLIP, instead of video files.")
    flags.DEFINE_multi_string("question", [], "What the frames are for; may be given several times.")
    flags.DEFINE_enum("benchmark", None, list(benchmarks.BENCHMARKS), "Ask the questions of this benchmark instead.")
    flags.DEFINE_string("annotations", "", "With --benchmark: its annotation file.")
    flags.DEFINE_bool("allow_missing", False, "With --benchmark: leave out questions whose video is not there.")
    flags.DEFINE_integer("num_frames", 16, "How many frames.", lower_bound=1)
    flags.DEFINE_enum("method", "topk", list(methods.NAMES), "How frames are chosen.")
    flags.DEFINE_integer("window", None, "Frames that a frame attends to; default: 12, or as --agent was trained.", 1)
    search_flags.define()
    flags.DEFINE_string("answerer", "", "Folder of a Video-MLLM that names what --method=tstar searches for.")
    flags.DEFINE_string("adapter", "", "PEFT folder of adapters for the Video-MLLM.")
    flags.DEFINE_string("contact_sheet", "", "Picture of the chosen frames to write, e.g. frames.jpg.")
    flags.DEFINE_string("frames_dir", "", "Folder to write the chosen frames to, as JPEGs with a manifest.json.")
    flags.DEFINE_string("page", "", "HTML page to write: scores over time and the frames of every method.")
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")
    job_array.define_flags()


def selector(args: flags.FlagValues) -> tuple[object, Callable[..., dict]]:
    """The Scorer, if the method has one, and (Source, question) -> the result."""
    options = search_flags.check(args)
    if args.adapter and not args.answerer:
        raise ValueError("--adapter needs the --answerer that it is for")
    if args.method == methods.SEARCH:
        from tspo_jax.answering.grounding import make_searcher
        from tspo_jax.selection.searching import search_frames

        searcher = make_searcher(args.detector, options, args.targets, args.cues, args.answerer, args.adapter)
        return None, lambda source, question: search_frames(searcher, source, question, args.num_frames)
    if not args.agent:
        raise ValueError("--agent is missing: a folder of CLIP and the temporal agent")
    from tspo_jax.selection.choosing import select_frames
    from tspo_jax.selection.scoring import check_method, load_scorer

    scorer = load_scorer(args.agent, args.window)
    check_method(scorer, args.method)
    return scorer, lambda source, question: select_frames(
        scorer, source.candidates(), question, args.num_frames, args.method
    )


def write_pictures(args: flags.FlagValues, scorer, source, question: str, result: dict, number: int | None) -> None:
    """What the flags ask for beside the result of a question; `number` tells the files of several questions apart."""

    def path(name: str) -> Path:
        return entry_point.numbered(name, number or 0, number is None)

    if args.contact_sheet:
        from tspo_jax.pages.contact_sheet import contact_sheet
        from tspo_jax.selection.choosing import picks_of

        sheet = contact_sheet(source.pictures(picks_of(result, source)), result["timestamps"])
        sheet.save(path(args.contact_sheet))
    if args.frames_dir:
        from tspo_jax.selection import frames_folder

        frames_folder.write(path(args.frames_dir), source, result, question)
    if args.page:
        from tspo_jax.pages import video_page

        html = video_page.page("Chosen frames", [video_page.example(scorer, source, question, args.num_frames)])
        path(args.page).write_text(html, encoding="utf-8")


def main() -> int:
    args = flags.FLAGS
    if bool(args.question) == bool(args.benchmark):
        raise ValueError("give either --question or --benchmark (with --annotations)")
    if args.benchmark and not args.annotations:
        raise ValueError("--benchmark needs --annotations: its annotation file")
    from tspo_jax.evaluation import frame_indices
    from tspo_jax.selection.choosing import picks_of
    from tspo_jax.selection.video_source import each_readable, is_one, open_videos

    names, open_video = open_videos(args.video, args.store)
    single = len(args.question) == 1 and is_one(args.video, args.store)
    shard = share(args)
    scorer, select = selector(args)
    if args.benchmark:
        asked, absent = benchmarks.queries_by_video(args.benchmark, args.annotations, names, args.allow_missing)
        if absent:
            entry_point.note(f"{absent}; their questions are left out")
    else:
        asked = {name: [(f"{name}#{i}", question) for i, question in enumerate(args.question)] for name in names}
    mine = shard.of(list(asked))
    lines, num_read = [], 0
    for source in each_readable(mine, open_video, scorer and scorer.clip) if mine else ():
        num_read += 1
        for question_id, question in asked[source.name]:
            result = select(source, question)
            number = None if single else len(lines)
            write_pictures(args, scorer, source, question, result, number)
            if single:
                entry_point.write_result(result, args.output)
                return 0
            lines.append(frame_indices.of_result(result, picks_of(result, source), source.name, question_id))
    if args.output:
        path = Path(args.output)
        frame_indices.write_neutral(shard.path(path.parent, path.stem, path.suffix), lines)
    else:
        entry_point.write_result({"selections": [dataclasses.asdict(line) for line in lines]}, "")
    return 0 if num_read == len(mine) else 2


def share(args: flags.FlagValues) -> Shard:
    """Which of the videos are this run's, by flags: a job array alone may as well ask about a video in each task.

    Raises ValueError for what runs that share videos cannot do: their files would be each other's."""
    if not args.num_shards and args.shard_index is None:
        return Shard()
    if args.video and not Path(args.video).is_dir() and not args.benchmark:
        raise ValueError(
            "--num_shards shares the videos of a folder or store, or of a --benchmark; --video is one video"
        )
    for name in ("contact_sheet", "frames_dir", "page"):
        if getattr(args, name):
            raise ValueError(f"--{name} is numbered over all questions; leave it out with --num_shards")
    return job_array.shard_from(args.num_shards, args.shard_index)


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
