"""Chosen frames as a folder of pictures with a manifest, for programs that take pictures.

manifest.json: `video`, `question`, `method`, `fps`, `duration` (s), `num_video_frames`, `frames` (a list of `file`,
`frame_idx`, `timestamp` in seconds), and `video_metadata`: `fps`, `frames_indices` and `total_num_frames` as
transformers' video processors take them. There a frame's time is its index divided by `fps`, which is wrong where a
video's frames are not evenly spaced; so the indices are milliseconds, at 1000 frames per second.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from tspo_jax.models.video_prompt import FrameTimes
from tspo_jax.selection.choosing import picks_of
from tspo_jax.selection.video_source import Source

MANIFEST = "manifest.json"
JPEG_QUALITY = 95


def write(folder: str | Path, source: Source, result: Mapping, question: str) -> Path:
    """Writes the frames that `select_frames` chose for a question, named by frame number and second.

    Raises: ValueError for a folder that holds other pictures.
    """
    folder = Path(folder)
    names = [f"{i:08d}_{t:.2f}s.jpg" for i, t in zip(result["frame_idx"], result["timestamps"], strict=True)]
    if folder.is_dir() and (others := sorted({path.name for path in folder.iterdir()} - {MANIFEST, *names})):
        raise ValueError(f"--frames_dir: {folder} holds {others[0]} and {len(others)} such files; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(names, source.pictures(picks_of(result, source)), strict=True):
        Image.fromarray(picture).save(folder / name, quality=JPEG_QUALITY)
    frames = zip(names, result["frame_idx"], result["timestamps"], strict=True)
    manifest = {
        "video": source.name,
        "question": question,
        "method": result["method"],
        "fps": result["fps"],
        "duration": source.duration,
        "num_video_frames": result["num_video_frames"],
        "frames": [{"file": name, "frame_idx": i, "timestamp": t} for name, i, t in frames],
        "video_metadata": metadata(result["timestamps"], source.duration),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return folder


def metadata(seconds: Sequence[float], duration: float) -> dict:
    """What transformers' video processors are told of frames at `seconds`, so that they show these very times."""
    milliseconds = [round(1000 * second) for second in seconds]
    total = max(round(1000 * duration), milliseconds[-1] + 1)
    return {"fps": 1000.0, "frames_indices": milliseconds, "total_num_frames": total}


def read_manifest(folder: str | Path) -> tuple[list[Path], FrameTimes]:
    """The pictures of a folder that has a manifest, in its order, and their times. Raises ValueError for another
    manifest, or one whose times run backwards."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        files = [path.parent / row["file"] for row in manifest["frames"]]
        seconds, duration = [row["timestamp"] for row in manifest["frames"]], manifest.get("duration")
        if not files:
            raise KeyError("frames")
        return files, FrameTimes.of(seconds, duration)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a manifest of select_frames ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
