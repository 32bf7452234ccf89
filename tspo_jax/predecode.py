"""Decodes videos into a frame store, once: JPEG frames at 1 fps with their times, and CLIP features.

    python -m tspo_jax.predecode --videos=FOLDER --store=DIR [--clip=DIR] [--workers=N]
    python -m tspo_jax.predecode --store=DIR --clip=DIR              # features of all stored videos
    python -m tspo_jax.predecode --store=DIR --verify [--videos=FOLDER]

--videos is a folder (all videos below it; a video's name in the store is its path below the folder) or a text file
with one path per line, relative to --video_folder (default: the list's folder) or in full and below it.

A video that cannot be decoded, hangs or crashes its decoder is listed with its reason in STORE/quarantine*.jsonl and
costs no other video (delete its line to try it again). Running the same command again goes on where it stopped; only
new and changed videos are decoded. CLIP features are computed from the stored frames, so that another checkpoint needs
no decoding.

Many machines: --num_shards=N --shard_index=I, each takes every N-th video of one shared store. In SLURM arrays both
come from the environment, in Kubernetes indexed jobs the index does. With --num_shards, a SLURM array may be a few of
the tasks, to do those again.

Result (stdout or --output): a JSON object. Exit status: 0; 2 where videos are in quarantine or --verify finds damage;
1 for mistakes in the command, a full disk, or a store that another run is writing.
"""

import os
from pathlib import Path

from absl import flags

from tspo_jax.command_line import entry_point, job_array
from tspo_jax.command_line.progress_bar import ProgressBar, described
from tspo_jax.data import predecoding
from tspo_jax.data.decode_workers import Limits
from tspo_jax.data.frame_store import FrameStore, StoreSettings, open_settings, read_settings
from tspo_jax.data.shard import Shard

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("videos", "", "Folder of videos, or text file with one path per line")
    flags.DEFINE_string("video_folder", "", "Folder of the videos of a list; default: the list's folder")
    flags.DEFINE_string("store", None, "Folder of the frame store", required=True)
    flags.DEFINE_string("clip", "", "CLIP or TSPO checkpoint folder; without it no features are made")
    flags.DEFINE_enum(
        "clip_dtype", "float32", ["float32", "bfloat16"], "Of CLIP's arithmetic; features of each are kept apart"
    )
    flags.DEFINE_integer("workers", len(os.sched_getaffinity(0)), "Decoding processes", lower_bound=1)
    flags.DEFINE_float("fps", 1.0, "Frames per second to keep", lower_bound=1e-3)
    flags.DEFINE_integer("short_side", 384, "Reduce the shorter side to this many pixels; 0 = keep", lower_bound=0)
    flags.DEFINE_integer("jpeg_quality", 95, "Of the stored frames", lower_bound=1, upper_bound=100)
    limits = Limits()
    flags.DEFINE_float("time_limit", limits.seconds, "Seconds per video and decoder, then a kill", lower_bound=0.1)
    flags.DEFINE_float("stall_limit", limits.stall_seconds, "Seconds without a new frame, then a kill", lower_bound=0.1)
    flags.DEFINE_integer("memory_limit", limits.megabytes, "MB that decoding a video may take", lower_bound=1)
    job_array.define_flags()
    flags.adopt_module_key_flags(job_array)  # --help shows them
    flags.DEFINE_bool("verify", False, "Decode nothing; read the whole store and report damage")
    flags.DEFINE_string("output", "", "File for the result; default: stdout")


def main() -> int:
    folder = Path(FLAGS.store)
    if not (FLAGS.videos or FLAGS.clip or FLAGS.verify):
        raise ValueError("--videos is missing")
    root = Path(FLAGS.video_folder) if FLAGS.video_folder else None
    videos = predecoding.find_videos(Path(FLAGS.videos), root, entry_point.note) if FLAGS.videos else {}
    if FLAGS.verify:
        with described() as progress:
            result = predecoding.verify(folder, videos, progress)
    else:
        shard = job_array.shard_from(FLAGS.num_shards, FLAGS.shard_index)
        if videos:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            read_settings(folder)  # no store, no features
        encoder = (
            load_encoder(FLAGS.clip, FLAGS.clip_dtype) if FLAGS.clip else None
        )  # a wrong folder shows before hours of decoding
        with predecoding.writing(folder, shard), described() as progress:
            result = predecode(folder, shard, videos, encoder, progress)
    entry_point.write_result(result, FLAGS.output)
    return 2 if result.get("problems") or result.get("quarantined") else 0


def predecode(
    folder: Path,
    shard: Shard,
    videos: dict[str, Path],
    encoder: predecoding.Encoder | None,
    progress: ProgressBar,
) -> dict:
    """Decoding, then features, as the flags say; returns the result."""
    result = {}
    if videos:
        open_settings(folder, StoreSettings(FLAGS.fps, FLAGS.short_side, FLAGS.jpeg_quality))
        videos = {name: videos[name] for name in shard.of(sorted(videos))}
        quarantine = predecoding.Quarantine(shard.path(folder, "quarantine", ".jsonl"))
        limits = Limits(FLAGS.time_limit, FLAGS.stall_limit, FLAGS.memory_limit)
        settings = FrameStore(folder).settings
        result = predecoding.decode_videos(videos, folder, settings, quarantine, FLAGS.workers, limits, progress)
        names = [name for name in videos if name not in quarantine.rows]
    else:
        names = shard.of(FrameStore(folder).names())
    if encoder:
        result["frames_encoded_now"] = predecoding.encode_features(folder, names, encoder, progress)
        result["clip"] = encoder.identity
    return result


def load_encoder(folder: str, dtype: str) -> predecoding.Encoder:
    from tspo_jax.checkpoints.folders import load_clip  # here, because decode workers import this file, and it uses jax

    return load_clip(folder, dtype)


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
