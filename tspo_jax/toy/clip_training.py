"""Contrastive training of the tiny CLIP (Radford et al. 2021) on rendered frames and sentences about them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tspo_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from tspo_jax.models.layers import merge_params
from tspo_jax.models.preprocessing import CLIP_MEAN, CLIP_STD, ImageProcessor
from tspo_jax.toy.fitting import Fitting, fit, fresh_params
from tspo_jax.toy.frame_bank import FrameBank
from tspo_jax.toy.scenes import caption
from tspo_jax.toy.settings import SETTINGS

IMAGE_SIZE = 48
# 100 is where CLIP's own training ends. Held from the start, it keeps the cosines within a video as close together as
# real CLIP's (a standard deviation of 0.03-0.05), which decides how much the policy explores.
LOGIT_SCALE = 100.0


def clip_config(vocab_size: int, eos_token_id: int) -> ClipConfig:
    return ClipConfig(
        text=TextConfig(64, 128, 2, 4, vocab_size=vocab_size, eos_token_id=eos_token_id),
        vision=VisionConfig(96, 192, 2, 4, image_size=IMAGE_SIZE, patch_size=12),
        projection_dim=128,
    )


def clip_processor() -> ImageProcessor:
    return ImageProcessor(IMAGE_SIZE, CLIP_MEAN, CLIP_STD, True, IMAGE_SIZE)


def sentence(rng: np.random.Generator, setting: str, thing: str | None, ball: str | None) -> str:
    """Something that is said of a frame: its caption, its setting, or a question that names its thing.

    Questions go with a thing alone more often than with a thing beside a ball. As in real CLIP, a picture of nothing
    but the thing then matches them best, although it does not hold the answer: untrained top-k makes that mistake.
    """
    place, kind = SETTINGS[setting], rng.random()
    if kind < 0.2:
        return caption(setting, None, None)
    if not thing or kind < (0.85 if ball else 0.5):
        return caption(setting, thing, ball)
    questions = [
        f"What colour is the ball shown with the {thing}?",
        f"{place.capitalize()}, what colour is the ball shown with the {thing}?",
        f"What is shown right after the {thing}?",
    ]
    return questions[rng.integers(len(questions))]


def contrastive_loss(images: jax.Array, texts: jax.Array) -> jax.Array:
    """Symmetric InfoNCE of raw features [B, D], pair i with pair i."""
    images, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    logits = LOGIT_SCALE * images @ texts.T
    labels = jnp.arange(len(logits))
    both = (optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in (logits, logits.T))
    return sum(both) / 2


def train_clip(
    cfg: ClipConfig,
    bank: FrameBank,
    token_ids: Callable[[list[str]], np.ndarray],
    *,
    seed: int,
    num_steps: int,
    batch_size: int = 128,
    run_dir: Path,
    report: Callable[[int, float], None],
) -> dict:
    """Parameters of a CLIP trained from scratch.

    Args:
      bank: frames with the processor's crop.
      token_ids: texts -> int32 [n, N].
      run_dir, report: as in `fit`.
    """
    graphdef, params = fresh_params(lambda rngs: Clip(cfg, rngs=rngs), seed)
    params["logit_scale"] = jnp.log(LOGIT_SCALE)
    processor = clip_processor()

    def batches(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            rows = rng.choice(len(bank.pixels), batch_size, replace=False)
            yield bank.pixels[rows], token_ids([sentence(rng, *bank.words(i)) for i in rows])

    def loss(params, pixels, ids):
        clip = merge_params(graphdef, params)
        return contrastive_loss(clip.image_features(processor.normalize(pixels)), clip.text_features(ids))

    fitting = Fitting(seed=seed, batch_size=batch_size, num_steps=num_steps, learning_rate=2e-3)
    return fit(loss, params, batches(np.random.default_rng(seed)), fitting, run_dir, report)
