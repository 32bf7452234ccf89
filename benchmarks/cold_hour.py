"""Choosing frames of a one-hour video file that was never seen before: T* against scoring every candidate.

    python -m benchmarks.cold_hour [--folder=/tmp] [--seconds=3600]

Writes a video file (256 x 144, 5 frames a second, a key frame every 4 s), a TSPO folder with CLIP ViT-L/14's form and
an OWL-ViT folder with that of owlvit-base-patch32 at 768 px, with random weights and both of them cut alike: a
sixteenth of every width and of the heads, a twelfth of the layers; removed again. Each is asked for 64 frames on the
CPU, after a shorter video has compiled its programs. A search with random weights finds nothing: it looks at all the
frames of its budget, a tenth, and at four of each grid alone, the most that it can cost. Prints JSON, for `dense` and
`search` the `frames` that were read, `seconds` until the frames are chosen and `cpu_seconds` of all cores meanwhile,
and for `share` those of `search` in parts of those of `dense`.

Per picture the published CLIP takes 1.4 times the operations of the published detector, cut it takes 0.4 times; and the
less the models take, the more counts decoding, of which a search saves less. So for published sizes the share of the
seconds is below that printed.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
from absl import flags
from flax import nnx

from benchmarks.hour_long_video import VIT_L, write_agent
from benchmarks.selection_study import timed
from tspo_jax.checkpoints.detector import load_detector
from tspo_jax.command_line import entry_point
from tspo_jax.data.questions import Question
from tspo_jax.models.layers import split_params
from tspo_jax.models.owlvit import OwlVit, config_from_hf
from tspo_jax.selection.choosing import choose
from tspo_jax.selection.scoring import load_scorer
from tspo_jax.selection.search_options import SearchOptions
from tspo_jax.selection.searching import Searcher
from tspo_jax.selection.video_source import file_source
from tspo_jax.toy.detector_training import save_detector
from tspo_jax.toy.tokenizers import clip_tokenizer

NUM_FRAMES, FPS, KEY_EVERY = 64, 5, 4
HEIGHT, WIDTH = 144, 256
OWLVIT = {
    "projection_dim": 512,
    "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 12},
    "vision_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "patch_size": 32,
    },
}  # fmt: skip
WARM_UP = 320  # seconds: two grids
NEVER_FOUND = 0.9  # random weights give confidences up to 0.73


def cut(config: dict) -> dict:
    """The form of a model with as many tokens, small enough for a CPU."""
    parts = {"num_hidden_layers": 12} | dict.fromkeys(
        ("hidden_size", "intermediate_size", "projection_dim", "num_attention_heads"), 16
    )
    return {
        name: cut(value) if isinstance(value, dict) else max(1, value // parts[name]) if name in parts else value
        for name, value in config.items()
    }


def write_video(path: Path, seconds: int) -> Path:
    """Noise that moves, so that pictures are predicted from others."""
    large = np.random.default_rng(0).integers(0, 255, (18, 32, 3), np.uint8)
    large = np.kron(large, np.ones((16, 16, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "g": str(FPS * KEY_EVERY)})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(seconds * FPS):
            y, x = number % HEIGHT, number // 7 % WIDTH
            shown = np.ascontiguousarray(large[y : y + HEIGHT, x : x + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown)))
        container.mux(stream.encode())
    return path


def write_detector(folder: Path, config: dict) -> Path:
    """FOLDER/detector with random weights, of which none makes a detector sure of anything."""
    detector, form = folder / "detector", config_from_hf(config)
    detector.mkdir()
    tokenizer = clip_tokenizer(["key"], max_length=form.text.max_position_embeddings)
    save_detector(detector, form, split_params(OwlVit(form, rngs=nnx.Rngs(0)))[1], tokenizer)
    return detector


def measure(folder: Path, seconds: int) -> dict[str, dict[str, float]]:
    scorer = load_scorer(write_agent(folder, cut(VIT_L)))
    searcher = Searcher(load_detector(write_detector(folder, cut(OWLVIT))), SearchOptions(threshold=NEVER_FOUND))
    videos = [write_video(folder / f"{length}.mp4", length) for length in (WARM_UP, seconds)]
    ways = {
        "dense": lambda source, question: choose(source, scorer, question.question, NUM_FRAMES, "topk"),
        "search": lambda source, question: searcher(source, question.query, NUM_FRAMES, ["key"]),
    }
    found = {}
    for way, pick in ways.items():
        for video in videos:
            question = Question(0, video.name, "Where is the key?", "Where is the key?", (), "", "general", "")
            clip = scorer.clip if way == "dense" else None
            found[way] = timed(lambda name, clip=clip: file_source(folder / name, name, clip), pick, question, True)
    share = np.divide(found["search"], found["dense"])
    rows = {**found, "share": type(found["dense"])(*share)}
    return {name: {key: round(float(value), 3) for key, value in row._asdict().items()} for name, row in rows.items()}


def define_flags() -> None:
    flags.DEFINE_string("folder", "", "Where the files are written for a while; the system's own place if empty.")
    flags.DEFINE_integer("seconds", 3600, "Length of the video.", lower_bound=WARM_UP)


def main() -> None:
    with TemporaryDirectory(dir=flags.FLAGS.folder or None) as folder:
        entry_point.write_result(measure(Path(folder), flags.FLAGS.seconds), "")


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
