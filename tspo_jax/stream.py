"""Encodes a video once, as a stream, and answers many questions about it (VideoStreaming; docs/streaming.md).

    python -m tspo_jax.stream --answerer=DIR --encoder=RUN_DIR --video=FILE --question="Who opens the door?"
    python -m tspo_jax.stream --answerer=DIR --encoder=RUN_DIR --store=DIR --video=NAME --question="Who?"
    camera | python -m tspo_jax.stream --answerer=DIR --encoder=RUN_DIR --video=- [--memory=FILE]

What is remembered of a stored video is kept in the store, so that the next question costs no encoding; `--memory=FILE`
keeps it in a file of its own, from which the stream goes on. With --video=- standard input has a JSON object a line, in
order of time: {"frame": base64 of a JPEG, "time": seconds}, or {"question": text} at any moment, whose answer is one
JSON object a line on standard output.
"""

import base64
import binascii
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from tspo_jax.answering import prompts
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.command_line import entry_point
from tspo_jax.data.frame_store import FrameStore, decode_jpeg
from tspo_jax.selection.video_source import Source, file_source, stored_source
from tspo_jax.streaming import folders, stream
from tspo_jax.streaming.stream import Stream


def define_flags() -> None:
    flags.DEFINE_string("answerer", None, "Folder of a LLaVA-Video.", required=True)
    flags.DEFINE_string("adapter", "", "PEFT folder of adapters for it, with which the encoder was trained.")
    flags.DEFINE_string("encoder", None, "Folder of its streaming encoder, or run that trained it.", required=True)
    flags.DEFINE_string("video", None, "Video file, - for standard input, or with --store a name.", required=True)
    flags.DEFINE_string("store", "", "Frame store, instead of a video file.")
    flags.DEFINE_multi_string("question", [], "Question, with its options one a line; may be given several times.")
    flags.DEFINE_string("memory", "", "File that keeps what is remembered; an earlier one is gone on from.")
    flags.DEFINE_string("suffix", prompts.LETTER_SUFFIX, "Last line of the user's text; may be empty.")
    flags.DEFINE_integer("max_new_tokens", 32, "Length at which an answer is cut.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the answerer; default: bfloat16, float32 on a CPU.")
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")


def live(lines: Iterable[str], live_stream: Stream, suffix: str) -> Iterator[dict]:
    """Answers to the questions among the lines; the frames go into the stream. Raises ValueError naming a bad line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            match json.loads(line):
                case {"question": _, "frame": _}:
                    raise ValueError("holds a question and a frame; give each a line of its own")
                case {"question": str(question)}:
                    yield live_stream.ask(question, suffix)
                case {"frame": str(frame), "time": int() | float() as seconds}:
                    live_stream.add(decode_jpeg(base64.b64decode(frame, validate=True)), float(seconds))
                case _:
                    raise ValueError('holds neither {"frame": text, "time": seconds} nor {"question": text}')
        except (ValueError, TypeError, OverflowError, binascii.Error) as error:
            raise ValueError(f"standard input, line {number}: {error!s:.200} ({type(error).__name__})") from error


def encode(source: Source, into: Stream) -> None:
    for start in range(0, len(source.timestamps), into.encoder.config.frames):
        picks = np.arange(start, min(start + into.encoder.config.frames, len(source.timestamps)))
        for frame, seconds in zip(source.pictures(picks), source.timestamps[picks].tolist(), strict=True):
            into.add(frame, seconds)
    into.finish()


def _content(store: FrameStore | None, video: str) -> str:
    """Tells a video from another one of its name; "" for standard input."""
    if store:
        return f"{zlib.crc32(store.video(video).crc32.tobytes()):08x}"
    return "" if video == "-" else "{0.st_size} {0.st_mtime_ns}".format(Path(video).stat())


def main() -> None:
    args = flags.FLAGS
    is_live = args.video == "-"
    if is_live and (args.store or args.question or args.output):
        raise ValueError(
            "--video=- reads frames and questions from standard input and answers on standard output: without --store, "
            "--question and --output"
        )
    if not is_live and not args.question:
        raise ValueError("--question is missing")
    for question in args.question:
        prompts.render(question, suffix=args.suffix)  # wrong questions are refused before anything is loaded
    store = FrameStore(args.store) if args.store else None
    if store and args.video not in store:
        raise ValueError(f"--video: {args.video} is not in {args.store}")
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    answerer = load_answerer(args.answerer, jnp.dtype(dtype), adapter=args.adapter)
    encoder = folders.load(args.encoder, answerer)
    path = Path(args.memory) if args.memory else stream.path_of(args.store, encoder, args.video) if store else None
    content = _content(store, args.video)
    remembered = stream.load(path, encoder, content) if path and path.is_file() else None
    of_video = Stream(encoder, answerer, max_new_tokens=args.max_new_tokens, remembered=remembered)
    try:
        if is_live:
            for answer in live(sys.stdin, of_video, args.suffix):
                print(json.dumps(answer, ensure_ascii=False), flush=True)
        elif remembered is None:
            encode(stored_source(store, args.video) if store else file_source(args.video, args.video, None), of_video)
            of_video.finish()
            if path:
                stream.save(path, of_video.remembered, encoder, content)
    finally:  # a live stream that breaks off is remembered up to there; part of a file is not taken for all of it
        if is_live and of_video.finish() | bool(of_video.num_pushes) and path:
            stream.save(path, of_video.remembered, encoder, content)
    if not is_live:
        answers = [of_video.ask(question, args.suffix) for question in args.question]
        result = answers[0] if len(answers) == 1 else {"answers": answers}
        entry_point.write_result(result | {"clips_encoded": of_video.num_pushes}, args.output)


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
