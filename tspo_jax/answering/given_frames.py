"""The answer to a question about frames that are at hand: of an npz file, a folder of pictures, or a video."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tspo_jax.answering import context, prompts, shapes
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data.letters import stated_letter
from tspo_jax.models.video_prompt import FrameTimes
from tspo_jax.selection.frames_folder import MANIFEST, read_manifest

_UNKNOWN_OPTIONS = ("",) * 5  # of a question that does not list them line by line: A-E
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def answer(
    answerer: Answerer,
    rollout: Rollout,
    frames: Sequence[np.ndarray],
    prompt: str,
    options: Sequence[str] = (),
    times: FrameTimes | None = None,
    num_frames: int = 0,
) -> dict:
    """The answer to a rendered prompt about frames uint8 [H, W, 3], as the entry point reports it.

    Args:
      options: the texts of the question's options, one of which the answer may name.
      times: the frames' own; None where nobody knows them (FrameTimes.unknown).
      num_frames: as many as the caller shows where a video has them: videos that have fewer need no program of their
        own. 0 = those that are given.
    Raises: ValueError for frames that are shown in several sizes, and where the prompt is longer than the answerer can
      read.
    """
    times = times or FrameTimes.unknown(len(frames))
    if len(times.seconds) != len(frames):
        raise ValueError(f"{len(times.seconds)} times for {len(frames)} frames")
    processor = answerer.processor.for_frames(len(frames))
    pixels = [processor.crop(frame) for frame in frames]
    if len(sizes := {frame.shape[:2] for frame in pixels}) > 1:
        raise ValueError(f"the frames would be shown in several sizes {sorted(sizes)}; give all one with --frame_size")
    pixels = np.stack(pixels)
    K = len(pixels)
    ids, lengths, _ = prompts.write([prompt], [[times]], answerer)
    context.check(answerer, ids, lengths, pixels.shape[:3], rollout.max_new_tokens)
    N = shapes.rounded_up(int(lengths.max()))
    places = K if answerer.config.video.merge else max(K, num_frames)
    ids, lengths, steps = prompts.write([prompt], [[times]], answerer, at_least=N, num_frames=places)
    index = np.minimum(np.arange(places), K - 1)[None, None]
    shown = np.concatenate([pixels, np.zeros((places - K, *pixels.shape[1:]), np.uint8)])
    count = np.array([[K]]) if num_frames and not answerer.config.video.merge else None
    answers = rollout(answerer.params, shown[None], index, ids, lengths, None, steps, count)
    tokens, length = np.asarray(answers.tokens)[0, 0], np.asarray(answers.lengths)[0, 0]
    text = prompts.decode(tokens, length, answerer.tokenizer)
    return {
        "answer": text,
        "token_ids": tokens[:length].tolist(),
        "option": stated_letter(text, options or _UNKNOWN_OPTIONS),
        "prompt": answerer.config.write_times(prompt, times),
        "num_visual_tokens": answerer.config.num_visual_tokens(*pixels.shape[:3]),
    }


def read_frames(path: str | Path) -> tuple[list[np.ndarray], FrameTimes | None]:
    """Frames uint8 [H, W, 3] and their times, of an npz file (arrays `frames` and maybe `timestamps`), or of a folder
    of pictures (with the times in its MANIFEST, if it has one)."""
    path = Path(path)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            files, times = _named(read_manifest, path)
            return [_read_picture(file) for file in files], times
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not files:
            raise ValueError(f"--frames: {path} holds no picture ({', '.join(PICTURES)})")
        return [_read_picture(file) for file in files], None
    if not path.is_file():
        raise FileNotFoundError(f"--frames: {path}: no such file or folder")
    try:
        with np.load(path) as arrays:
            frames, seconds = arrays["frames"], arrays.get("timestamps")
    except (zipfile.BadZipFile, ValueError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"--frames: {path} is not a readable npz file ({error})") from error
    except KeyError:
        raise ValueError(f"--frames: {path} has no array `frames`") from None
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"--frames: `frames` of {path} is {frames.dtype} {list(frames.shape)}, not uint8 [K, H, W, 3]")
    times = None if seconds is None else _named(FrameTimes.of, seconds)
    if times and len(times.seconds) != len(frames):
        raise ValueError(f"--frames: {path} has {len(times.seconds)} timestamps for {len(frames)} frames")
    return list(frames), times


def _named(read, *args):
    """`read(*args)`, whose errors name the flag."""
    try:
        return read(*args)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--frames: {error}") from error


def _read_picture(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(f"--frames: {file} is not a readable picture ({error})") from error
