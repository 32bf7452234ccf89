"""Chooses the frames of a video that a question needs.

    python -m tspo_jax.select_frames --agent=DIR --video=FILE --question="Who opens the door?" --num_frames=16

`DIR` is a folder in the layout of TSPO-0.4B; a plain CLIP folder will do for the methods uniform and clip-topk. The
options of a multiple-choice question are left out of what the agent reads, as in its training.
"""

from collections.abc import Iterable

from absl import flags
from rich.console import Console
from rich.progress import track

from tspo_jax import entry_point, selection
from tspo_jax.contact_sheet import contact_sheet
from tspo_jax.data.decode import Video
from tspo_jax.data.questions import split_options
from tspo_jax.scoring import Scorer, check_method, encode_video, load_scorer, pick


def select_frames(scorer: Scorer, video: Video, question: str, num_frames: int, method: str) -> dict:
    """The frames of `video` for `question`, as the entry point reports them (`scores` is None without an agent)."""
    check_method(scorer, method)
    if not question.strip():
        raise ValueError("the question is empty")
    candidates = encode_video(video, scorer.clip, watch=progress_bar)
    clip_scores, scores = scorer.ask(candidates.features, query(question))
    picks = pick(method, clip_scores, scores, num_frames)
    return {
        "frame_idx": candidates.frame_idx[picks].tolist(),
        "timestamps": candidates.timestamps[picks].tolist(),
        "candidate_idx": candidates.frame_idx.tolist(),
        "clip_scores": clip_scores.tolist(),
        "scores": None if scores is None else scores.tolist(),
        "fps": candidates.fps,
        "num_video_frames": candidates.num_video_frames,
        "method": method,
        "decoder": candidates.decoder,
    }


def query(question: str) -> str:
    """What the agent reads: the question without its options."""
    return split_options(question)[0] or question


def progress_bar(frames: Iterable, total: int) -> Iterable:
    console = Console(stderr=True)
    return track(frames, "decoding and encoding", total, console=console, disable=not console.is_terminal)


def define_flags() -> None:
    flags.DEFINE_string("agent", None, "Folder of CLIP and the temporal agent.", required=True)
    flags.DEFINE_string("video", None, "Video file.", required=True)
    flags.DEFINE_string("question", None, "What the frames are for.", required=True)
    flags.DEFINE_integer("num_frames", 16, "How many frames.", lower_bound=1)
    flags.DEFINE_enum("method", "topk", list(selection.METHODS), "How frames are chosen from their scores.")
    flags.DEFINE_integer("window", 12, "Frames that a frame attends to: the agent's, as it was trained.", lower_bound=1)
    flags.DEFINE_string("contact_sheet", "", "Picture of the chosen frames to write, e.g. frames.jpg.")
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")


def main() -> None:
    args = flags.FLAGS
    video = Video(args.video)
    result = select_frames(load_scorer(args.agent, args.window), video, args.question, args.num_frames, args.method)
    if args.contact_sheet:
        contact_sheet(list(video.frames(result["frame_idx"])), result["timestamps"]).save(args.contact_sheet)
    entry_point.write_result(result, args.output)


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
