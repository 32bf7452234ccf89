"""A Video-MLLM answers a question about a video, or about given frames.

    python -m tspo_jax.answer --answerer=DIR --question=$'Why?\\nA. ..\\nB. ..' --video=FILE --agent=DIR --num_frames=16
    python -m tspo_jax.answer --answerer=DIR --question="Why?" --frames=frames.npz

The frames come from a video (chosen by an agent; evenly spaced without one), from `frames` uint8 [K, H, W, 3] of an npz
file, or from a folder of pictures in the order of their names. Greedy decoding.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from tspo_jax import entry_point, prompts, selection
from tspo_jax.checkpoints import Answerer, load_answerer
from tspo_jax.data.decode import Video
from tspo_jax.models.video_prompt import DEFAULT_VIDEO, NEXT_POSITION_RULES, VideoOptions
from tspo_jax.rewards import option_letter
from tspo_jax.rollout import Rollout
from tspo_jax.scoring import check_method, encode_video, load_scorer
from tspo_jax.select_frames import progress_bar, select_frames

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def answer(answerer: Answerer, rollout: Rollout, frames: Sequence[np.ndarray], prompt: str) -> dict:
    """The answer to a rendered prompt about frames uint8 [H, W, 3], as the entry point reports it."""
    pixels = [answerer.processor.crop(frame) for frame in frames]
    if len(sizes := {frame.shape[:2] for frame in pixels}) > 1:
        raise ValueError(f"the frames would be shown in several sizes {sorted(sizes)}; give all one with --frame_size")
    pixels = np.stack(pixels)
    ids, lengths = prompts.pad([prompts.tokenize(prompt, answerer.tokenizer)], answerer.generation.pad_token_id)
    answers = rollout(answerer.params, pixels[None], np.arange(len(pixels))[None, None], ids, lengths)
    tokens, length = np.asarray(answers.tokens)[0, 0], np.asarray(answers.lengths)[0, 0]
    text = prompts.decode(tokens, length, answerer.tokenizer)
    return {
        "answer": text,
        "token_ids": tokens[:length].tolist(),
        "option": option_letter(text),
        "prompt": prompt,
        "num_visual_tokens": answerer.config.num_visual_tokens(*pixels.shape[:3]),
    }


def read_frames(path: str | Path) -> list[np.ndarray]:
    """Frames uint8 [H, W, 3] of an npz file (array `frames`) or a folder of pictures."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        if not files:
            raise ValueError(f"--frames: {path} holds no picture ({', '.join(PICTURES)})")
        return [_read_picture(file) for file in files]
    if not path.is_file():
        raise FileNotFoundError(f"--frames: {path}: no such file or folder")
    try:
        with np.load(path) as arrays:
            frames = arrays["frames"]
    except (zipfile.BadZipFile, ValueError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"--frames: {path} is not a readable npz file ({error})") from error
    except KeyError:
        raise ValueError(f"--frames: {path} has no array `frames`") from None
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"--frames: `frames` of {path} is {frames.dtype} {list(frames.shape)}, not uint8 [K, H, W, 3]")
    return list(frames)


def _read_picture(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(f"--frames: {file} is not a readable picture ({error})") from error


def choose(video: Video, question: str, num_frames: int, agent: str, method: str, window: int) -> list[int]:
    """Frame numbers of `video`: by the agent in folder `agent`, or evenly spaced candidates where that is empty."""
    if agent:
        scorer = load_scorer(agent, window)
        check_method(scorer, method)
        candidates = encode_video(video, scorer.clip, progress_bar)
        return select_frames(scorer, candidates, question, num_frames, method)["frame_idx"]
    candidates = video.candidates()
    return candidates[selection.uniform(candidates, num_frames)].tolist()


def define_flags() -> None:
    flags.DEFINE_string("answerer", None, "Folder of the Video-MLLM.", required=True)
    flags.DEFINE_string("question", None, "Question, with its options one a line.", required=True)
    flags.DEFINE_string("video", "", "Video file to choose frames from.")
    flags.DEFINE_string("frames", "", "npz file (`frames` uint8 [K, H, W, 3]) or folder of pictures, used as they are.")
    flags.DEFINE_string("agent", "", "Folder of CLIP and the temporal agent; without one, frames are evenly spaced.")
    flags.DEFINE_integer("num_frames", 16, "How many frames of the video.", lower_bound=1)
    flags.DEFINE_enum("method", None, list(selection.METHODS), "How frames are chosen; topk with an agent.")
    flags.DEFINE_integer("window", 12, "Frames that a frame attends to: the agent's, as it was trained.", lower_bound=1)
    flags.DEFINE_enum("template", None, list(prompts.TEMPLATES), "Conversation template; the answerer's own.")
    flags.DEFINE_string("suffix", prompts.LETTER_SUFFIX, "Last line of the user's text; may be empty.")
    flags.DEFINE_integer("max_new_tokens", 256, "Length at which the answer is cut.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the answerer; bfloat16, but float32 on a CPU.")
    flags.DEFINE_list("frame_size", [], "Qwen2.5-VL: height,width of every frame; near its own if empty.")
    flags.DEFINE_float("second_per_grid", DEFAULT_VIDEO.second_per_grid, "Qwen2.5-VL: seconds of a pair of frames.")
    flags.DEFINE_enum(
        "next_position",
        DEFAULT_VIDEO.next_position,
        NEXT_POSITION_RULES,
        "Qwen2.5-VL: text goes on after_all positions of the video (transformers 4), or after_space (5).",
    )
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")


def main() -> None:
    args = flags.FLAGS
    if bool(args.video) == bool(args.frames):
        raise ValueError("give either --video or --frames")
    if args.agent and args.frames:
        raise ValueError("--agent chooses from a --video; --frames are used as they are")
    if args.method not in (None, "uniform") and not args.agent:
        raise ValueError(f"--method={args.method} needs an --agent; without one only uniform works")
    prompts.render(args.question, suffix=args.suffix)  # wrong questions are refused before anything is loaded
    options = VideoOptions(tuple(map(int, args.frame_size)), args.second_per_grid, args.next_position)
    video = Video(args.video) if args.video else None
    frames, frame_idx = None if video else read_frames(args.frames), None
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    answerer = load_answerer(args.answerer, jnp.dtype(dtype), video=options)
    prompt = prompts.render(args.question, args.template or answerer.template, args.suffix)
    if video:
        method = args.method or "topk"
        frame_idx = choose(video, args.question, args.num_frames, args.agent, method, args.window)
        frames = list(video.frames(frame_idx))
    result = answer(answerer, Rollout.of(answerer, max_new_tokens=args.max_new_tokens), frames, prompt)
    entry_point.write_result(result | {"frame_idx": frame_idx}, args.output)


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
