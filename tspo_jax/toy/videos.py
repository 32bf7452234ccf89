"""Writes a set of toy videos as H.264 files, and their questions.

    python -m tspo_jax.toy.videos --output=DIR [--num_train=192 --num_eval=48 --seed=0]

DIR/videos/*.mp4, DIR/train.jsonl and DIR/eval.jsonl (questions; `video` is relative to DIR) and DIR/plans.jsonl
(the scenes of every video). Run again, it writes only the videos that are not there yet.
"""

import concurrent.futures
import json
import multiprocessing
import os
import sys
from pathlib import Path

import av
from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tspo_jax.toy.questions import questions_for
from tspo_jax.toy.scenes import FRAME_SIZE, VideoPlan, World, make_video_plan, render_frame, video_seed

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to.", required=True)
_NUM_TRAIN = flags.DEFINE_integer("num_train", 192, "Videos to train the agent on.", lower_bound=0)
_NUM_EVAL = flags.DEFINE_integer("num_eval", 48, "Held-out videos.", lower_bound=0)
_NUM_SPECIFIC = flags.DEFINE_integer("num_specific", 3, "Needle questions per training video.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Another seed gives other videos.", lower_bound=0)
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Processes that render and encode.", lower_bound=1)

# Macroblock trees make x264's output differ from run to run at this frame size; without them it is a function
# of the plan.
_X264_OPTIONS = {"crf": "26", "preset": "veryfast", "x264-params": "mbtree=0"}


def write_video(plan: VideoPlan, path: Path) -> None:
    """Renders the plan into an H.264 (yuv420p) mp4 file, which appears under its name only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=plan.fps, options=_X264_OPTIONS)
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = 1 / plan.fps
        stream.codec_context.thread_count = 1  # videos are written in parallel
        for number in range(plan.num_frames):
            frame = av.VideoFrame.from_ndarray(render_frame(plan, float(number / plan.fps)), format="rgb24")
            frame.pts, frame.time_base = number, 1 / plan.fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    os.replace(partial, path)


def write_dataset(output: Path, num_train: int, num_eval: int, num_specific: int, seed: int, workers: int) -> None:
    """Writes the folder that the module's text describes, with a progress bar on stderr."""
    world = World()
    (output / "videos").mkdir(parents=True, exist_ok=True)
    plans, rows = [], {"train": [], "eval": []}
    for split, count in (("train", num_train), ("eval", num_eval)):
        for index in range(count):
            plan = make_video_plan(video_seed(split, seed, index), world)
            name = f"videos/{split}_{plan.seed}.mp4"
            plans.append((name, plan))
            rows[split] += questions_for(plan, name, num_specific if split == "train" else 0)
    for split, questions in rows.items():
        _write_jsonl(output / f"{split}.jsonl", questions)
    _write_jsonl(output / "plans.jsonl", [_plan_row(name, plan) for name, plan in plans])

    missing = [(plan, output / name) for name, plan in plans if not (output / name).exists()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Fresh processes: forking one that runs threads (as any that imported jax does) can hang.
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    with Progress(*columns, console=Console(stderr=True)) as progress, pool:
        bar = progress.add_task("writing videos", total=len(plans), completed=len(plans) - len(missing))
        for done in concurrent.futures.as_completed([pool.submit(write_video, *job) for job in missing]):
            done.result()
            progress.advance(bar)


def _plan_row(name: str, plan: VideoPlan) -> dict:
    scenes = [{key: getattr(s, key) for key in ("kind", "thing", "ball", "start", "end")} for s in plan.scenes]
    return {"video": name, "fps": float(plan.fps), "duration": plan.duration, "setting": plan.setting, "scenes": scenes}


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    try:
        write_dataset(
            Path(_OUTPUT.value),
            _NUM_TRAIN.value,
            _NUM_EVAL.value,
            _NUM_SPECIFIC.value,
            _SEED.value,
            _WORKERS.value,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
