"""Makes the toy world's tiny checkpoints: CLIP and LLaVA-Video, from a fixed seed, in the big ones' folder formats.

    python -m tspo_jax.toy.train_models --output=tspo_jax/toy/checkpoints [--seed=0 --run_dir=runs/toy_models]

CLIP learns from pairs of frames and sentences. LLaVA-Video first learns to see (tower, projector and embeddings agree
on what a frame shows), then to converse about sets of frames. Both see single rendered frames of random contents, no
video of the agent's training or evaluation. At the end both are measured on videos that nothing is trained on (printed
as JSON, and kept as OUTPUT/quality.json).
"""

import dataclasses
import json
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
from tspo_jax.models.llava_video import LlavaVideoConfig
from tspo_jax.models.preprocessing import ImageProcessor
from tspo_jax.toy import answerer_training, clip_training, tokenizers
from tspo_jax.toy.frame_bank import draw_frame_bank
from tspo_jax.toy.model_quality import measure
from tspo_jax.toy.scenes import World, video_seed

CLIP_FRAMES, CLIP_STEPS = 16_000, 600
LLAVA_FRAMES, PROJECTION_STEPS, LANGUAGE_STEPS = 24_000, 800, 1000
QUALITY_VIDEOS = 48
MAX_TEXT = 1024  # tokens of a conversation that the tiny LLaVA-Video may meet


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


def make_llava_video(folder: Path, run_dir: Path, seed: int, progress: Progress) -> None:
    rng = np.random.default_rng(seed)
    processor = ImageProcessor.siglip(answerer_training.IMAGE_SIZE)
    bank = draw_frame_bank(rng, LLAVA_FRAMES, processor.crop, lambda rows: progress.track(rows, description="Frames"))
    writer = answerer_training.ConversationWriter(bank)
    tokenizer = tokenizers.qwen2_tokenizer(answerer_training.training_texts(writer, rng, 1000), MAX_TEXT)
    config = answerer_training.llava_config(len(tokenizer))
    graphdef, params = answerer_training.initial_params(config, seed)
    with steps(progress, "LLaVA-Video, tower", PROJECTION_STEPS) as report:
        params = answerer_training.train_projection(
            graphdef,
            params,
            bank,
            tokenizer,
            seed=seed,
            num_steps=PROJECTION_STEPS,
            run_dir=run_dir / "tower",
            report=report,
        )
    with steps(progress, "LLaVA-Video, language", LANGUAGE_STEPS) as report:
        params = answerer_training.train_language(
            graphdef,
            params,
            bank,
            tokenizer,
            seed=seed,
            num_steps=LANGUAGE_STEPS,
            run_dir=run_dir / "language",
            report=report,
        )
    weights.save_params(folder, params, weights.LLAVA_VIDEO, ml_dtypes.bfloat16)
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", llava_config_json(config, tokenizer.eos_token_id, tokenizer.pad_token_id))


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


def llava_config_json(config: LlavaVideoConfig, eos_token_id: int, pad_token_id: int) -> dict:
    """config.json of the LLaVA-Video folder, in lmms-lab's fields; the tower is named with its unused last layer."""
    tower = dataclasses.asdict(config.vision)
    tower["num_hidden_layers"] += 1
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        **dataclasses.asdict(config.language),
        "use_sliding_window": False,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision.hidden_size,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": config.newline,
        "mm_spatial_pool_mode": config.pool_mode,
        "vision_config": tower,
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    output, run_dir, seed = Path(flags.FLAGS.output), Path(flags.FLAGS.run_dir), flags.FLAGS.seed
    with Progress(console=Console(stderr=True)) as progress:
        make_clip(output / "clip", run_dir / "clip", seed, progress)
        make_llava_video(output / "llava_video", run_dir / "llava_video", seed, progress)
    seeds = [video_seed("models", 1, i) for i in range(QUALITY_VIDEOS)]
    quality = measure(load_clip(output / "clip"), load_answerer(output / "llava_video"), seeds, World())
    write_json(output / "quality.json", quality)
    entry_point.write_result(quality, "")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Folder to write clip/ and llava_video/ to.", required=True)
    flags.DEFINE_integer("seed", 0, "Of everything that is drawn.")
    flags.DEFINE_string("run_dir", "runs/toy_models", "Folder of what a stopped start goes on from.")
    entry_point.run(main)
