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
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from absl import flags

from tspo_jax.command_line import entry_point
from tspo_jax.data.decode import VideoError
from tspo_jax.evaluation import benchmarks, frame_indices
from tspo_jax.pages import video_page
from tspo_jax.pages.contact_sheet import contact_sheet
from tspo_jax.selection import frames_folder, methods, searching
from tspo_jax.selection.choosing import picks_of, select_frames
from tspo_jax.selection.scoring import Scorer, check_method, load_scorer
from tspo_jax.selection.video_source import Source, is_one, open_videos


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
    searching.define_flags()
    flags.DEFINE_string("answerer", "", "Folder of a Video-MLLM that names what --method=tstar searches for.")
    flags.DEFINE_string("contact_sheet", "", "Picture of the chosen frames to write, e.g. frames.jpg.")
    flags.DEFINE_string("frames_dir", "", "Folder to write the chosen frames to, as JPEGs with a manifest.json.")
    flags.DEFINE_string("page", "", "HTML page to write: scores over time and the frames of every method.")
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")


def questions_by_video(args: flags.FlagValues, names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Video name -> (question id, question)s; ids are numbers where the questions are of no benchmark."""
    if not args.benchmark:
        return {name: [(f"{name}#{i}", question) for i, question in enumerate(args.question)] for name in names}
    if not args.annotations:
        raise ValueError("--benchmark needs --annotations: its annotation file")
    asked: dict[str, list[tuple[str, str]]] = {}
    for item in benchmarks.read_items(args.benchmark, args.annotations):
        asked.setdefault(item.video, []).append((item.id, item.query))
    if absent := sorted(asked.keys() - set(names)):
        listed = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
        if not args.allow_missing or len(absent) == len(asked):
            raise ValueError(f"{len(absent)} videos of {args.annotations} are missing: {listed}; or --allow_missing")
        entry_point.note(f"{len(absent)} videos are missing, their questions are left out: {listed}")
    return {video: questions for video, questions in asked.items() if video in names}


def selector(args: flags.FlagValues) -> tuple[Scorer | None, Callable[[Source, str], dict]]:
    """The scorer, if the method has one, and (video, question) -> the result."""
    options = searching.check_flags(args)
    if args.method == methods.SEARCH:
        from tspo_jax.answering.grounding import make_searcher  # here: heavy, and --help does not need it

        searcher = make_searcher(args.detector, options, args.targets, args.cues, args.answerer)
        return None, lambda source, question: searching.search_frames(searcher, source, question, args.num_frames)
    if not args.agent:
        raise ValueError("--agent is missing: a folder of CLIP and the temporal agent")
    scorer = load_scorer(args.agent, args.window)
    check_method(scorer, args.method)
    return scorer, lambda source, question: select_frames(
        scorer, source.candidates(), question, args.num_frames, args.method
    )


def main() -> int:
    args = flags.FLAGS
    if bool(args.question) == bool(args.benchmark):
        raise ValueError("give either --question or --benchmark (with --annotations)")
    names, open_video = open_videos(args.video, args.store)
    scorer, select = selector(args)
    asked = questions_by_video(args, names)
    single = not args.benchmark and len(args.question) == 1 and is_one(args.video, args.store)
    lines, numbers, all_read = [], itertools.count(), True
    for name, questions in asked.items():
        try:
            source = open_video(name, scorer and scorer.clip)
            if scorer:
                source.candidates()
        except VideoError as error:
            if len(asked) == 1:
                raise
            entry_point.note(f"left out: {error}")
            all_read = False
            continue
        for (question_id, question), number in zip(questions, numbers, strict=False):
            result = select(source, question)
            if args.contact_sheet:
                sheet = contact_sheet(source.pictures(picks_of(result, source)), result["timestamps"])
                sheet.save(entry_point.numbered(args.contact_sheet, number, single))
            if args.frames_dir:
                frames_folder.write(entry_point.numbered(args.frames_dir, number, single), source, result, question)
            if args.page:
                html = video_page.page("Chosen frames", [video_page.example(scorer, source, question, args.num_frames)])
                entry_point.numbered(args.page, number, single).write_text(html, encoding="utf-8")
            if single:
                entry_point.write_result(result, args.output)
                return 0
            lines.append(_neutral(result, source, question_id))
    if not lines:
        raise ValueError(f"--video: none of the {len(asked)} videos of {args.video} can be read")
    if args.output:
        frame_indices.write_neutral(args.output, lines)
    else:
        entry_point.write_result({"selections": [dataclasses.asdict(line) for line in lines]}, "")
    return 0 if all_read else 2


def _neutral(result: dict, source: Source, question_id: str) -> frame_indices.Selection:
    scores = result["clip_scores" if result["scores"] is None else "scores"]
    return frame_indices.Selection(
        question_id,
        source.name,
        tuple(result["frame_idx"]),
        tuple(result["timestamps"]),
        result["fps"],
        tuple(scores[i] for i in picks_of(result, source)),
        result["method"],
        frame_indices.our_versions() | {"decoder": result["decoder"]},
    )


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
