import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from toy_bank import sentence_tokenizer

from tspo_jax.toy import clip_training
from tspo_jax.toy.clip_training import clip_config, clip_processor, contrastive_loss, sentence, train_clip
from tspo_jax.toy.frame_bank import BALL_NAMES, SETTING_NAMES, THING_NAMES, draw_frame_bank

SAID = {
    (None, None): {"the desert"},
    (None, "red"): {"the desert", "a red ball in the desert"},
    ("owl", None): {
        "the desert",
        "an owl in the desert",
        "What colour is the ball shown with the owl?",
        "In the desert, what colour is the ball shown with the owl?",
        "What is shown right after the owl?",
    },
}
SAID["owl", "red"] = SAID["owl", None] - {"an owl in the desert"} | {"an owl with a red ball in the desert"}


@pytest.mark.parametrize(("thing", "ball"), SAID)
def test_sentences_say_what_is_shown(thing, ball):
    rng = np.random.default_rng(0)
    assert {sentence(rng, "desert", thing, ball) for _ in range(300)} == SAID[thing, ball]


def test_sentences_name_nothing_else():
    rng = np.random.default_rng(1)
    for _ in range(500):
        setting, thing, ball = (str(rng.choice(names)) for names in (SETTING_NAMES, THING_NAMES, BALL_NAMES))
        thing, ball = thing if rng.random() < 0.7 else None, ball if rng.random() < 0.5 else None
        said = sentence(rng, setting, thing, ball).lower().translate(str.maketrans("?,", "  ")).split()
        assert set(said) & {*SETTING_NAMES, *THING_NAMES, *BALL_NAMES} <= {setting, thing, ball}


def test_questions_go_with_a_thing_alone_more_often():
    rng = np.random.default_rng(2)
    alone, beside = (np.mean([sentence(rng, "sea", "owl", b)[-1] == "?" for _ in range(2000)]) for b in (None, "red"))
    assert 0.45 < alone < 0.55 and 0.11 < beside < 0.19


def test_contrastive_loss_by_hand():
    """Two pairs of directions in the plane: the cosines are those of the differences of their angles."""
    a, b = np.array([0.0, 0.1]), np.array([0.02, 0.15])
    images, texts = (np.stack([np.cos(x), np.sin(x)], 1) for x in (a, b))
    c = 100 * np.cos(a[:, None] - b)

    def softplus(x):
        return np.log1p(np.exp(x))

    expected = np.mean(
        [softplus(c[0, 1] - c[0, 0]), softplus(c[1, 0] - c[1, 1])]  # image -> text
        + [softplus(c[1, 0] - c[0, 0]), softplus(c[0, 1] - c[1, 1])]  # text -> image
    )
    loss = contrastive_loss(jnp.array(images * [[3.0], [0.5]]), jnp.array(texts * [[1.0], [20.0]]))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_processor_keeps_what_the_renderer_draws():
    """96 px frames are halved, not cut."""
    image = np.zeros((96, 96, 3), np.uint8)
    image[:, :4], image[-4:] = 255, 255
    crop = clip_processor().crop(image)
    assert crop.shape == (clip_training.IMAGE_SIZE,) * 2 + (3,)
    assert crop[20, 0, 0] > 200 and crop[-1, 20, 0] > 200 and crop[20, 20, 0] < 50


@pytest.mark.slow
def test_training_brings_pictures_and_their_sentences_together(tmp_path):
    tokenizer = sentence_tokenizer()
    config = clip_config(len(tokenizer), tokenizer.eos_token_id)
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, **small),
        vision=dataclasses.replace(config.vision, **small, image_size=24),
        projection_dim=32,
    )
    crop = dataclasses.replace(clip_processor(), size=24, resize=24).crop
    bank = draw_frame_bank(np.random.default_rng(0), 200, crop)

    def token_ids(texts):
        return tokenizer(texts, padding="max_length", max_length=24, return_tensors="np")["input_ids"]

    reports = []
    params = train_clip(
        config,
        bank,
        token_ids,
        seed=0,
        num_steps=40,
        batch_size=24,
        run_dir=tmp_path,
        report=lambda *report: reports.append(report),
    )
    steps, losses = zip(*reports, strict=True)
    assert steps == tuple(range(1, 41)) and np.all(np.isfinite(losses))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    np.testing.assert_allclose(params["logit_scale"], np.log(100), atol=1e-2)
