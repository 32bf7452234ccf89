"""Makes the toy world's tiny checkpoints: CLIP and a Video-MLLM, from a fixed seed, in the big ones' folder formats.

    python -m tspo_jax.toy.train_models --output=tspo_jax/toy/checkpoints [--seed=0 --run_dir=runs/toy_models]
    python -m tspo_jax.toy.train_models --output=toy_qwen3 --answerer=qwen3_vl --clip=tspo_jax/toy/checkpoints/clip

CLIP learns from pairs of frames and sentences. The Video-MLLM (LLaVA-Video of one token or of 2 x 2 tokens a frame, or
Qwen3-VL, whose frames come with random times) first learns to see (tower, projector and embeddings agree on what a
frame shows), then to converse about sets of frames. Both see single rendered frames of random contents, no video of the
agent's training or evaluation. At the end both are measured on videos that nothing is trained on (printed as JSON, and
kept as OUTPUT/quality.json).
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import Progress

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_answerer, load_clip
from tspo_jax.command_line import entry_point
from tspo_jax.models.clip import ClipConfig
from tspo_jax.models.preprocessing import ImageProcessor
from tspo_jax.toy import answerer_training, clip_training, tokenizers
from tspo_jax.toy.conversations import ConversationWriter, training_texts
from tspo_jax.toy.frame_bank import draw_frame_bank
from tspo_jax.toy.model_quality import measure
from tspo_jax.toy.scenes import World, video_seed
from tspo_jax.toy.tiny_answerers import TINY_ANSWERERS, write_json

CLIP_FRAMES, CLIP_STEPS = 16_000, 600
QUALITY_VIDEOS = 48
MAX_TEXT = 1024  # tokens of a conversation that the tiny Video-MLLM may meet


@contextmanager
def steps(progress: Progress, name: str, total: int) -> Iterator:
    """A bar for `total` steps, as a function (step, loss)."""
    bar = progress.add_task(name, total=total)

    def report(step: int, loss: float) -> None:
        progress.update(bar, completed=step, description=f"{name}, loss {loss:.3f}")

    yield report


def make_clip(folder: Path, run_dir: Path, seed: int, progress: Progress) -> None:
    rng = np.random.default_rng(seed)
    processor = clip_training.clip_processor()
    bank = draw_frame_bank(rng, CLIP_FRAMES, processor.crop, lambda rows: progress.track(rows, description="Frames"))
    texts = {clip_training.sentence(rng, *bank.words(i)) for i in range(CLIP_FRAMES)}
    tokenizer = tokenizers.clip_tokenizer(sorted(texts), max_length=77)
    length = max(len(tokenizer(text)["input_ids"]) for text in texts)

    def token_ids(batch: list[str]) -> np.ndarray:
        return tokenizer(batch, padding="max_length", max_length=length, return_tensors="np")["input_ids"]

    config = clip_training.clip_config(len(tokenizer), tokenizer.eos_token_id)
    with steps(progress, "CLIP", CLIP_STEPS) as report:
        params = clip_training.train_clip(
            config, bank, token_ids, seed=seed, num_steps=CLIP_STEPS, run_dir=run_dir, report=report
        )
    weights.save_params(folder, params, weights.CLIP, ml_dtypes.bfloat16)
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", clip_config_json(config, tokenizer.bos_token_id))
    write_json(folder / "preprocessor_config.json", clip_processor_json(processor))


def make_answerer(folder: Path, run_dir: Path, args: flags.FlagValues, progress: Progress) -> None:
    tiny, seed = TINY_ANSWERERS[args.answerer], args.seed
    rng = np.random.default_rng(seed)
    crop = tiny.architecture(0).processor.crop
    bank = draw_frame_bank(rng, args.num_frames, crop, lambda rows: progress.track(rows, description="Frames"))
    texts = training_texts(ConversationWriter(bank), rng, 1000, tiny.architecture(0))
    tokenizer = tokenizers.qwen2_tokenizer(texts, MAX_TEXT, tiny.special_tokens.values())
    answerer = tiny.untrained(tokenizer, folder, seed)
    stages = (
        ("tower", answerer_training.train_projection, args.tower_steps, {}),
        ("language", answerer_training.train_language, args.language_steps, {"batch_size": args.batch_size}),
    )
    for stage, train, num_steps, options in stages:
        with steps(progress, f"{tiny.title}, {stage}", num_steps) as report:
            options |= dict(seed=seed, num_steps=num_steps, run_dir=run_dir / stage, report=report)
            answerer = dataclasses.replace(answerer, params=train(tiny, answerer, bank, **options))
    tiny.save(answerer)


def clip_config_json(config: ClipConfig, bos_token_id: int) -> dict:
    """config.json of the CLIP folder, in Hugging Face's fields."""
    text = {"model_type": "clip_text_model", "bos_token_id": bos_token_id, "pad_token_id": config.text.eos_token_id}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "text_config": text | dataclasses.asdict(config.text),
        "vision_config": {"model_type": "clip_vision_model"} | dataclasses.asdict(config.vision),
    }


def clip_processor_json(processor: ImageProcessor) -> dict:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": processor.resize},
        "crop_size": {"height": processor.size, "width": processor.size},
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
        "resample": int(processor.resample),
    }


def main() -> None:
    args = flags.FLAGS
    output, run_dir, name = Path(args.output), Path(args.run_dir), args.answerer
    with Progress(console=Console(stderr=True)) as progress:
        if not args.clip:
            make_clip(output / "clip", run_dir / "clip", args.seed, progress)
        clip = load_clip(args.clip or output / "clip")
        make_answerer(output / name, run_dir / name, args, progress)
    seeds = [video_seed("models", 1, i) for i in range(QUALITY_VIDEOS)]
    quality = measure(clip, load_answerer(output / name), seeds, World())
    write_json(output / "quality.json", quality)
    entry_point.write_result(quality, "")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Folder to write clip/, ANSWERER/ and quality.json to.", required=True)
    flags.DEFINE_enum("answerer", "llava_video", list(TINY_ANSWERERS), "The Video-MLLM that is made.")
    flags.DEFINE_string("clip", "", "Folder of a CLIP to measure with; none = one is made too.")
    flags.DEFINE_integer("num_frames", 24_000, "Rendered frames that the Video-MLLM learns from.")
    flags.DEFINE_integer("tower_steps", 800, "Of training the Video-MLLM to see.")
    flags.DEFINE_integer("language_steps", 1000, "Of training it to converse.")
    flags.DEFINE_integer("batch_size", 32, "Conversations of a step.")
    flags.DEFINE_integer("seed", 0, "Of everything that is drawn.")
    flags.DEFINE_string("run_dir", "runs/toy_models", "Folder of what a stopped start goes on from.")
    entry_point.run(main)
