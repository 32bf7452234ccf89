"""A Video-MLLM answers a question about a video, or about given frames.

    python -m tspo_jax.answer --answerer=DIR --question=$'Why?\\nA. ..\\nB. ..' --video=FILE --agent=DIR --num_frames=16
    python -m tspo_jax.answer --answerer=DIR --question="Why?" --frames=frames.npz
    python -m tspo_jax.answer --answerer=DIR --question="Why?" --video=FILE --strategy=backtrack --page=trace.html

The frames come from a video (chosen by an agent, or by a search for objects with --method=tstar, see select_frames;
evenly spaced without either), from `frames` uint8 [K, H, W, 3] of an npz file (and `timestamps` float [K], in seconds),
or from a folder of pictures in the order of their names, or of the manifest that `select_frames --frames_dir` wrote. A
model that is told times is told the frames' own. Greedy decoding.
Several questions or videos give {"answers": [..]}; a video is decoded and encoded once for all its questions, one of a
frame store (`--store=DIR --video=NAME`) not at all.

--strategy=flat|backtrack answers from captions of the whole video instead (docs/rounds.md); the result then tells the
phase that the question ended in, the periods that were looked at, what it cost, and the trace. Its exit status is 2
where a question got no answer at all. Of several videos, one that cannot be read is named and left out, and the exit
status is 2.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from tspo_jax.answering import prompts, strategy_flags, video_flags
from tspo_jax.answering.agent_prompts import Asked
from tspo_jax.answering.backtracking import FAILED
from tspo_jax.answering.direct import DirectAnswers
from tspo_jax.answering.given_frames import read_frames
from tspo_jax.answering.grounding import make_searcher
from tspo_jax.answering.own_models import default_mesh
from tspo_jax.answering.strategies import VideoFiles, answer_questions
from tspo_jax.checkpoints.folders import Answerer, load_answerer
from tspo_jax.command_line import entry_point
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import split_options
from tspo_jax.pages import trace_page, video_page
from tspo_jax.pages.contact_sheet import contact_sheet
from tspo_jax.selection import methods, search_flags
from tspo_jax.selection.scoring import check_method, load_scorer
from tspo_jax.selection.video_source import Source, each_readable, is_one, open_videos


def define_flags() -> None:
    flags.DEFINE_string("answerer", None, "Folder of the Video-MLLM.", required=True)
    flags.DEFINE_string("adapter", "", "PEFT folder of adapters for the Video-MLLM.")
    flags.DEFINE_multi_string("question", [], "Question, with its options one a line; may be given several times.")
    flags.DEFINE_string("video", "", "Video file to choose frames from, or folder of videos; with --store, a name.")
    flags.DEFINE_string("store", "", "Frame store (with features of the agent's CLIP), instead of video files.")
    flags.DEFINE_string("frames", "", "npz file (`frames` uint8 [K, H, W, 3]) or folder of pictures, used as they are.")
    flags.DEFINE_string("agent", "", "Folder of CLIP and agent, or run folder; without one, frames are evenly spaced.")
    flags.DEFINE_integer("num_frames", 16, "How many frames of the video.", lower_bound=1)
    flags.DEFINE_enum(
        "method", None, list(methods.NAMES), "How frames are chosen; default: topk with an agent, else uniform."
    )
    flags.DEFINE_integer("window", None, "Frames that a frame attends to; default: 12, or as --agent was trained.", 1)
    flags.DEFINE_enum("template", None, list(prompts.TEMPLATES), "Conversation template; default: the answerer's own.")
    flags.DEFINE_string("suffix", prompts.LETTER_SUFFIX, "Last line of the user's text; may be empty.")
    flags.DEFINE_integer("max_new_tokens", 256, "Length at which the answer is cut.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the answerer; default: bfloat16, float32 on a CPU.")
    video_flags.define()
    search_flags.define()
    flags.DEFINE_string("contact_sheet", "", "Picture of the chosen frames to write, e.g. frames.jpg.")
    flags.DEFINE_string("page", "", "HTML page to write: scores over time, the frames of every method, the answers.")
    strategy_flags.define()
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")


def check(args: flags.FlagValues) -> None:
    """Raises ValueError for flags that make no sense together, before anything is loaded."""
    if not args.question:
        raise ValueError("--question is missing")
    if bool(args.video or args.store) == bool(args.frames):
        raise ValueError("give either --video or --frames (or --store)")
    if args.agent and args.frames:
        raise ValueError("--agent chooses from a --video; --frames are used as they are")
    if args.method not in (None, "uniform", methods.SEARCH) and not args.agent:
        raise ValueError(f"--method={args.method} needs an --agent; without one only uniform works")
    if args.method == methods.SEARCH and args.frames:
        raise ValueError(f"--method={methods.SEARCH} searches a --video; --frames are used as they are")
    if args.page and not args.agent and args.strategy == "direct":
        raise ValueError("--page shows an agent's scores; give an --agent")
    if args.contact_sheet and args.frames:
        raise ValueError("--contact_sheet shows the frames chosen from a --video")
    strategy_flags.check(args)
    for question in args.question:
        prompts.render(question, suffix=args.suffix)


def main() -> int:
    args = flags.FLAGS
    search = search_flags.check(args)
    check(args)
    options = video_flags.options(args)
    names, open_video = ([args.frames], None) if args.frames else open_videos(args.video, args.store)
    frames = read_frames(args.frames) if args.frames else None
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    answerer = load_answerer(args.answerer, jnp.dtype(dtype), video=options, adapter=args.adapter)
    if args.strategy != "direct":
        readable = [source.name for source in each_readable(names, open_video, None)]
        all_answered = in_rounds(args, readable, answerer)
        return 0 if all_answered and len(readable) == len(names) else 2
    searcher = scorer = None
    if args.method == methods.SEARCH:
        searcher = make_searcher(args.detector, search, args.targets, args.cues, answerer)
    elif args.agent:
        scorer = load_scorer(args.agent, args.window)
        check_method(scorer, args.method or "topk")
    answers = DirectAnswers(
        answerer,
        scorer,
        args.method or "topk",
        searcher,
        args.num_frames,
        args.template,
        args.suffix,
        args.max_new_tokens,
    )
    if frames:
        results = [
            (args.frames, question, answers.of_frames(*frames, question) | {"frame_idx": None})
            for question in args.question
        ]
        single, all_read = len(args.question) == 1, True
    else:
        single = len(args.question) == 1 and is_one(args.video, args.store)
        sources = each_readable(names, open_video, scorer and scorer.clip)
        results, all_read = of_videos(args, answers, sources, single, len(names))
    every = [{"video": video, "question": question} | result for video, question, result in results]
    entry_point.write_result(results[0][2] if single else {"answers": every}, args.output)
    return 0 if all_read else 2


def of_videos(
    args: flags.FlagValues, answers: DirectAnswers, sources: Iterable[Source], single: bool, num_videos: int
) -> tuple[list[tuple[str, str, dict]], bool]:
    """(video, question, result) of every question about every video, with the pictures that the flags ask for; and
    whether all could be read."""
    results, shown, num_read = [], [], 0
    for source in sources:
        num_read += 1
        for question in args.question:
            result, picks = answers.of_video(source, question)
            if args.contact_sheet:
                sheet = contact_sheet(source.pictures(picks), source.timestamps[picks].tolist())
                sheet.save(entry_point.numbered(args.contact_sheet, len(results), single))
            if args.page:
                told = {answers.method: result["answer"]}
                shown.append(video_page.example(answers.scorer, source, question, args.num_frames, told))
            results.append((source.name, question, result))
    if args.page:
        Path(args.page).write_text(video_page.page("Answers", shown), encoding="utf-8")
    return results, num_read == num_videos


def in_rounds(args: flags.FlagValues, names: Sequence[str], answerer: Answerer) -> bool:
    """--strategy=flat|backtrack: every question about every video; whether each got an answer."""
    folder = Path(args.video)
    paths = {name: folder / name if folder.is_dir() else folder for name in names}
    videos = FrameStore(args.store) if args.store else VideoFiles(paths)
    questions = [(name, *split_options(question)) for name in names for question in args.question]
    asked = [Asked(str(number), *question) for number, question in enumerate(questions)]
    outcomes = answer_questions(
        args.strategy, asked, videos, answerer, mesh=default_mesh(), **strategy_flags.options(args)
    )
    results = sorted(map(dataclasses.asdict, outcomes), key=lambda one: int(one["id"]))
    if args.page:
        Path(args.page).write_text(trace_page.page(results), encoding="utf-8")
    single = len(args.question) == 1 and is_one(args.video, args.store)
    entry_point.write_result(results[0] if single else {"answers": results}, args.output)
    return all(one["phase"] != FAILED for one in results)


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
