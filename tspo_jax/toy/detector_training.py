"""Training of a tiny OWL-ViT on rendered frames: it names the world's things and balls in grids and in frames alone.

    python -m tspo_jax.toy.detector_training --output=tspo_jax/toy/checkpoints/owlvit [--seed=0]

Like the other tiny checkpoints it sees single frames of random contents, no video of the agent's training or
evaluation. At the end it is measured on frames of its own (printed as JSON, and kept as OUTPUT/quality.json).
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from absl import flags
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.detector import load_detector
from tspo_jax.command_line import entry_point
from tspo_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from tspo_jax.models.layers import merge_params
from tspo_jax.models.owlvit import LARGEST_ID, OwlVit
from tspo_jax.models.preprocessing import CLIP_MEAN, CLIP_STD, ImageProcessor, resize
from tspo_jax.selection import frame_grid
from tspo_jax.toy import tokenizers
from tspo_jax.toy.fitting import Fitting, fit, fresh_params
from tspo_jax.toy.frame_bank import BALL_NAMES, CONTENTS, SETTING_NAMES, THING_NAMES
from tspo_jax.toy.scenes import render_with_boxes
from tspo_jax.toy.tiny_answerers import write_json
from tspo_jax.toy.train_models import steps

IMAGE_SIZE, PATCH_SIZE, MAX_TOKENS = 96, 24, 16
GRID = 2  # rows and columns of a grid: its cells are 48 px, a frame alone is 96 px
SIDE = IMAGE_SIZE // PATCH_SIZE  # patches
NAMES = (*THING_NAMES, *(f"{ball} ball" for ball in BALL_NAMES))
FRAMES, STEPS, GRIDS, ALONE = 12_000, 1_100, 16, 48  # grids and frames alone of a batch


def detector_config(vocab_size: int) -> ClipConfig:
    return ClipConfig(
        text=TextConfig(
            64, 128, 1, 4, vocab_size=vocab_size, max_position_embeddings=MAX_TOKENS, eos_token_id=LARGEST_ID
        ),
        vision=VisionConfig(96, 192, 2, 4, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
        projection_dim=64,
    )


class Pictures(NamedTuple):
    """n frames, and where in each the names are: `boxes` float [n, names, 4] (centre x, y, width, height, relative),
    zero where a name is not in the frame."""

    frames: np.ndarray  # uint8 [n, 96, 96, 3]
    boxes: np.ndarray


def draw_pictures(rng: np.random.Generator, count: int) -> Pictures:
    """Random frames, as in frame_bank."""
    frames, boxes = [], np.zeros((count, len(NAMES), 4), np.float32)
    for i, kind in enumerate(rng.choice(4, count, p=CONTENTS)):
        thing = str(rng.choice(THING_NAMES)) if kind < 2 else None
        ball = str(rng.choice(BALL_NAMES)) if kind % 2 == 0 else None
        frame, found = render_with_boxes(rng, str(rng.choice(SETTING_NAMES)), thing, ball)
        frames.append(frame)
        for name, box in found.items():
            boxes[i, NAMES.index(name)] = box
    return Pictures(np.stack(frames), boxes)


def grid_of(pictures: Pictures, rows: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture of side * side frames with its labels.

    Returns: uint8 [S, S, 3]; bool [patches, names], whether the middle of a patch is inside of the name's box; and the
    box [patches, 4] of what is there.
    """
    cell = IMAGE_SIZE // side
    picture = frame_grid.tile(
        list(pictures.frames[rows]), side, side, lambda frame: resize(frame, cell, cell, Image.Resampling.BILINEAR)
    )
    corner = np.stack([np.arange(side * side) % side, np.arange(side * side) // side], axis=-1)[:, None]
    boxes = pictures.boxes[rows].copy()  # [cells, names, 4]
    is_there = boxes[..., 2] > 0
    boxes[..., :2] = (boxes[..., :2] + corner) / side
    boxes[..., 2:] /= side
    middle = (np.arange(SIDE) + 0.5) / SIDE
    points = np.stack([np.tile(middle, SIDE), np.repeat(middle, SIDE)], axis=-1)[:, None, None]  # [patches, 1, 1, 2]
    inside = (np.abs(points - boxes[..., :2]) <= boxes[..., 2:] / 2).all(axis=-1) & is_there  # [patches, cells, names]
    # A small thing may lie between the middles of patches: the patch in which its own middle lies shows it too.
    inside |= (np.abs(points - boxes[..., :2]) <= 0.5 / SIDE).all(axis=-1) & is_there
    flat = inside.reshape(SIDE * SIDE, -1)
    of_patch = boxes.reshape(-1, 4)[flat.argmax(axis=1)]
    return picture, inside.any(axis=1), of_patch


def batches(rng: np.random.Generator, pictures: Pictures) -> Iterator[tuple[np.ndarray, ...]]:
    """Pixels uint8 [B, S, S, 3], labels bool [B, patches, names], boxes float [B, patches, 4]."""
    while True:
        drawn = [
            grid_of(pictures, rng.integers(len(pictures.frames), size=side * side), side)
            for side in [GRID] * GRIDS + [1] * ALONE
        ]
        yield tuple(np.stack(part) for part in zip(*drawn, strict=True))


def detection_loss(logits: jax.Array, boxes: jax.Array, labels: jax.Array, wanted: jax.Array) -> jax.Array:
    """Focal loss of the names (Lin et al. 2017) and, where there is something, the cross-entropy of what it is among
    the names, and the mean distance of the boxes.

    logits [B, S, Q], boxes [B, S, 4], labels bool [B, S, Q], wanted [B, S, 4].
    """
    log_right = jax.nn.log_sigmoid(jnp.where(labels, logits, -logits))
    focal = -((1 - jnp.exp(log_right)) ** 2) * log_right
    there = labels.any(axis=-1)
    count = jnp.maximum(there.sum(), 1)
    distance = jnp.abs(boxes - wanted).sum(axis=-1)
    which = optax.softmax_cross_entropy(logits, labels / jnp.maximum(labels.sum(axis=-1, keepdims=True), 1))
    of_patches = jnp.where(there, which + 2 * distance, 0)
    return (focal.sum() + of_patches.sum()) / count


def positions(side: int, width: int) -> np.ndarray:
    """Sines and cosines of the patches' columns and rows: float32 [1 + side * side, width], of the class token 0."""
    frequencies = np.pi / 2 / 2.0 ** np.linspace(0, 3, width // 4)
    angles = np.outer(np.arange(side), frequencies)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    column, row = np.tile(waves, (side, 1)), np.repeat(waves, side, axis=0)
    return np.pad(np.concatenate([column, row], axis=1), ((1, 0), (0, 0))).astype(np.float32)


def train_detector(
    config: ClipConfig,
    ids: np.ndarray,
    pictures: Pictures,
    *,
    seed: int,
    num_steps: int,
    run_dir: Path,
    report: Callable[[int, float], None],
) -> dict:
    """Parameters of a detector trained from scratch; `ids` are the tokens of NAMES int [names, MAX_TOKENS]."""
    graphdef, params = fresh_params(lambda rngs: OwlVit(config, rngs=rngs), seed)
    head, seen = params["class_head"], params["vision_model"]["embeddings"]
    # The logits are (cosine + shift) * scale: they start at what a cosine moves from sure to sure not, the same for all
    # patches. Random kernels would add more to them than any cosine does.
    for name, bias in (("logit_scale", 12.0), ("logit_shift", -0.4)):
        head[name] = {"kernel": jnp.zeros_like(head[name]["kernel"]), "bias": jnp.full(1, bias)}
    # Every patch is multiplied by the class token: at first that must not hide any of its features.
    seen["class_embedding"] = jnp.sign(seen["class_embedding"])
    seen["position_embedding"]["embedding"] = positions(SIDE, config.vision.hidden_size)
    # Names differ in their words, not in the end token, at which they are read.
    words = params["text_model"]["embeddings"]["token_embedding"]
    words["embedding"] = (words["embedding"] / 0.02).at[ids.max()].set(0)
    processor = ImageProcessor(IMAGE_SIZE, CLIP_MEAN, CLIP_STD, False)

    def loss(params, pixels, labels, wanted):
        model = merge_params(graphdef, params)
        logits, boxes = model(processor.normalize(pixels), model.queries(ids), np.ones(len(ids), bool))
        return detection_loss(logits, boxes, labels, wanted)

    fitting = Fitting(seed=seed, batch_size=GRIDS + ALONE, num_steps=num_steps, learning_rate=4e-3)
    return fit(loss, params, batches(np.random.default_rng(seed), pictures), fitting, run_dir, report)


def save_detector(folder: Path, config: ClipConfig, params: dict, tokenizer) -> None:
    """A folder in Hugging Face's layout of OWL-ViT, bfloat16."""
    weights.save_params(folder, params, weights.OWLVIT, ml_dtypes.bfloat16)
    tokenizer.save_pretrained(folder)
    text = dataclasses.asdict(config.text) | {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": 0}
    towers = {
        "text_config": text | {"model_type": "owlvit_text_model", "eos_token_id": tokenizer.eos_token_id},
        "vision_config": {"model_type": "owlvit_vision_model"} | dataclasses.asdict(config.vision),
    }
    kind = {"architectures": ["OwlViTForObjectDetection"], "model_type": "owlvit"}
    write_json(folder / "config.json", kind | {"projection_dim": config.projection_dim} | towers)
    size = dict.fromkeys(("height", "width"), config.vision.image_size)
    pixels = {"size": size, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD), "do_center_crop": False}
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "OwlViTImageProcessor"} | pixels)


def measure(folder: Path, seed: int, num_tested: int = 512) -> dict:
    """How well the things are told apart, in cells of grids and in frames alone: the share of frames with a thing whose
    best thing is right, and mean confidences of names that are there and that are not."""
    detector, pictures = load_detector(folder), draw_pictures(np.random.default_rng((seed, 1)), num_tested)
    queries, there = detector.queries(NAMES), pictures.boxes[..., 2] > 0
    num_things = len(THING_NAMES)
    quality = {}
    for name, side in (("grid", GRID), ("alone", 1)):
        scores = np.zeros((num_tested, len(NAMES)))
        for start in range(0, num_tested, side * side):
            rows = np.arange(start, start + side * side)
            found = detector.detect([grid_of(pictures, rows, side)[0]], queries)[0]
            cells = frame_grid.cells_of(found.boxes, IMAGE_SIZE, IMAGE_SIZE, side, side)
            np.maximum.at(scores, rows[cells], found.scores)
        with_thing = there[:, :num_things].any(axis=1)
        right = scores[with_thing, :num_things].argmax(axis=1) == there[with_thing, :num_things].argmax(axis=1)
        quality[name] = {
            "right_thing": round(float(right.mean()), 3),
            "confidence_there": round(float(scores[there].mean()), 3),
            "confidence_not_there": round(float(scores[~there].mean()), 3),
        }
    return quality


def main() -> None:
    folder, seed = Path(flags.FLAGS.output), flags.FLAGS.seed
    tokenizer = tokenizers.clip_tokenizer(NAMES, max_length=MAX_TOKENS)
    config = detector_config(len(tokenizer))
    ids = np.zeros((len(NAMES), MAX_TOKENS), np.int32)
    for row, name in zip(ids, NAMES, strict=True):
        tokens = tokenizer(name)["input_ids"]
        row[: len(tokens)] = tokens
    pictures = draw_pictures(np.random.default_rng(seed), FRAMES)
    with (
        Progress(console=Console(stderr=True)) as progress,
        tempfile.TemporaryDirectory() as run_dir,
        steps(progress, "OWL-ViT", flags.FLAGS.num_steps) as report,
    ):
        params = train_detector(
            config,
            ids,
            pictures,
            seed=seed,
            num_steps=flags.FLAGS.num_steps,
            run_dir=Path(run_dir),
            report=report,
        )
    save_detector(folder, config, params, tokenizer)
    quality = measure(folder, seed)
    write_json(folder / "quality.json", quality)
    entry_point.write_result(quality, "")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Folder to write the detector to.", required=True)
    flags.DEFINE_integer("seed", 0, "Of everything that is drawn.", lower_bound=0)
    flags.DEFINE_integer("num_steps", STEPS, "Training steps.", lower_bound=1)
    entry_point.run(main)
