"""A Video-MLLM answers a question about a video, or about given frames.

    python -m tspo_jax.answer --answerer=DIR --question=$'Why?\\nA. ..\\nB. ..' --video=FILE --agent=DIR --num_frames=16
    python -m tspo_jax.answer --answerer=DIR --question="Why?" --frames=frames.npz

The frames come from a video (chosen by an agent; evenly spaced without one), from `frames` uint8 [K, H, W, 3] of an npz
file, or from a folder of pictures in the order of their names. Greedy decoding. Several questions or
videos give {"answers": [..]}; a video is decoded and encoded once for all its questions, one of a frame store
(`--store=DIR --video=NAME`) not at all.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from tspo_jax.answering import prompts
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints.folders import Answerer, load_answerer
from tspo_jax.command_line import entry_point
from tspo_jax.models.video_prompt import DEFAULT_VIDEO, NEXT_POSITION_RULES, VideoOptions
from tspo_jax.pages import report_page, video_page
from tspo_jax.pages.contact_sheet import contact_sheet
from tspo_jax.select_frames import numbered, picks_of, select_frames
from tspo_jax.selection import methods as selection
from tspo_jax.selection.scoring import Scorer, check_method, load_scorer
from tspo_jax.selection.video_source import Source, open_videos
from tspo_jax.tspo.rewards import option_letter

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


def choose(source: Source, scorer: Scorer | None, question: str, num_frames: int, method: str) -> list[int]:
    """Candidate indices: by the agent, or evenly spaced where there is none."""
    if scorer is None:
        return selection.uniform(source.frame_idx, num_frames).tolist()
    return picks_of(select_frames(scorer, source.candidates(), question, num_frames, method), source)


def define_flags() -> None:
    flags.DEFINE_string("answerer", None, "Folder of the Video-MLLM.", required=True)
    flags.DEFINE_multi_string("question", [], "Question, with its options one a line; may be given several times.")
    flags.DEFINE_string("video", "", "Video file to choose frames from, or folder of videos; with --store, a name.")
    flags.DEFINE_string("store", "", "Frame store (with features of the agent's CLIP), instead of video files.")
    flags.DEFINE_string("frames", "", "npz file (`frames` uint8 [K, H, W, 3]) or folder of pictures, used as they are.")
    flags.DEFINE_string("agent", "", "Folder of CLIP and the temporal agent; without one, frames are evenly spaced.")
    flags.DEFINE_integer("num_frames", 16, "How many frames of the video.", lower_bound=1)
    flags.DEFINE_enum(
        "method", None, list(selection.METHODS), "How frames are chosen; default: topk with an agent, else uniform."
    )
    flags.DEFINE_integer("window", 12, "Frames that a frame attends to: the agent's, as it was trained.", lower_bound=1)
    flags.DEFINE_enum("template", None, list(prompts.TEMPLATES), "Conversation template; default: the answerer's own.")
    flags.DEFINE_string("suffix", prompts.LETTER_SUFFIX, "Last line of the user's text; may be empty.")
    flags.DEFINE_integer("max_new_tokens", 256, "Length at which the answer is cut.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the answerer; default: bfloat16, float32 on a CPU.")
    flags.DEFINE_list("frame_size", [], "Qwen2.5-VL: height,width of every frame; near its own if empty.")
    flags.DEFINE_float("second_per_grid", DEFAULT_VIDEO.second_per_grid, "Qwen2.5-VL: seconds of a pair of frames.")
    flags.DEFINE_enum(
        "next_position",
        DEFAULT_VIDEO.next_position,
        NEXT_POSITION_RULES,
        "Qwen2.5-VL: text goes on after_all positions of the video (transformers 4), or after_space (5).",
    )
    flags.DEFINE_string("contact_sheet", "", "Picture of the chosen frames to write, e.g. frames.jpg.")
    flags.DEFINE_string("page", "", "HTML page to write: scores over time, the frames of every method, the answers.")
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")


def main() -> None:
    args = flags.FLAGS
    if not args.question:
        raise ValueError("--question is missing")
    if bool(args.video or args.store) == bool(args.frames):
        raise ValueError("give either --video or --frames (or --store)")
    if args.agent and args.frames:
        raise ValueError("--agent chooses from a --video; --frames are used as they are")
    if args.method not in (None, "uniform") and not args.agent:
        raise ValueError(f"--method={args.method} needs an --agent; without one only uniform works")
    if args.page and not args.agent:
        raise ValueError("--page shows an agent's scores; give an --agent")
    if args.contact_sheet and args.frames:
        raise ValueError("--contact_sheet shows the frames chosen from a --video")
    for question in args.question:
        prompts.render(question, suffix=args.suffix)  # wrong questions are refused before anything is loaded
    if not all(number.strip().isdecimal() for number in args.frame_size):
        raise ValueError(f"--frame_size={','.join(args.frame_size)} is not height,width in pixels")
    options = VideoOptions(tuple(map(int, args.frame_size)), args.second_per_grid, args.next_position)
    names, open_video = ([args.frames], None) if args.frames else open_videos(args.video, args.store)
    frames = read_frames(args.frames) if args.frames else None
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    answerer = load_answerer(args.answerer, jnp.dtype(dtype), video=options)
    rollout = Rollout.of(answerer, max_new_tokens=args.max_new_tokens)
    method = args.method or "topk"
    scorer = load_scorer(args.agent, args.window) if args.agent else None
    if scorer:
        check_method(scorer, method)

    results, sections, single = [], [], len(names) == len(args.question) == 1
    for name in names:
        source = open_video(name, scorer and scorer.clip) if open_video else None
        for question in args.question:
            picks = choose(source, scorer, question, args.num_frames, method) if source else None
            shown = source.pictures(picks) if source else frames
            prompt = prompts.render(question, args.template or answerer.template, args.suffix)
            frame_idx = source.frame_idx[picks].tolist() if source else None
            result = answer(answerer, rollout, shown, prompt) | {"frame_idx": frame_idx}
            if args.contact_sheet:
                sheet = contact_sheet(shown, source.timestamps[picks].tolist())
                sheet.save(numbered(args.contact_sheet, len(results), single))
            if args.page:
                answers = {method: result["answer"]}
                sections.append(video_page.section(scorer, source, question, args.num_frames, answers))
            results.append({"video": name, "question": question} | result)
    if args.page:
        html = report_page.document("Answers", ["<h1>Answers</h1>", *sections])
        Path(args.page).write_text(html, encoding="utf-8")
    entry_point.write_result(result if single else {"answers": results}, args.output)


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
