import numpy as np

from tspo_jax.models.preprocessing import ImageProcessor
from tspo_jax.toy import frame_bank
from tspo_jax.toy.frame_bank import BALL_NAMES, CONTENTS, NOTHING, SETTING_NAMES, THING_NAMES, draw_frame_bank
from tspo_jax.toy.settings import SETTINGS
from tspo_jax.toy.sprites import BALLS, THINGS


def signature(setting, thing, ball):
    """An image that tells which words it was rendered from."""
    numbers = [list(SETTINGS).index(setting), [*THINGS, None].index(thing), [*BALLS, None].index(ball)]
    return np.array(numbers, np.uint8).reshape(1, 1, 3)


def signed_bank(monkeypatch, num_frames):
    monkeypatch.setattr(frame_bank, "render_scene", lambda rng, *words: signature(*words))
    return draw_frame_bank(np.random.default_rng(0), num_frames, lambda image: image)


def test_every_frame_shows_its_words(monkeypatch):
    bank = signed_bank(monkeypatch, 300)
    for i in range(300):
        np.testing.assert_array_equal(bank.pixels[i], signature(*bank.words(i)))
        setting, thing, ball = bank.words(i)
        assert setting == SETTING_NAMES[bank.setting[i]]
        assert (thing is None) == (bank.thing[i] == NOTHING) and (ball is None) == (bank.ball[i] == NOTHING)
        assert thing in (None, THING_NAMES[bank.thing[i]]) and ball in (None, BALL_NAMES[bank.ball[i]])


def test_shares_of_contents(monkeypatch):
    bank = signed_bank(monkeypatch, 6000)
    thing, ball = bank.thing != NOTHING, bank.ball != NOTHING
    shares = [np.mean(which) for which in (thing & ball, thing & ~ball, ~thing & ball, ~thing & ~ball)]
    np.testing.assert_allclose(shares, CONTENTS, atol=0.025)
    for indices, names in (
        (bank.setting, SETTING_NAMES),
        (bank.thing[thing], THING_NAMES),
        (bank.ball[ball], BALL_NAMES),
    ):
        shares = np.bincount(indices, minlength=len(names)) / len(indices)
        np.testing.assert_allclose(shares * len(names), 1, atol=0.35)


def test_frames_are_cropped_for_the_tower_and_a_function_of_the_seed():
    crop, rows = ImageProcessor.siglip(24).crop, []
    bank = draw_frame_bank(np.random.default_rng(3), 12, crop, lambda r: (rows.append(i) or i for i in r))
    assert bank.pixels.shape == (12, 24, 24, 3) and bank.pixels.dtype == np.uint8
    assert bank.setting.shape == bank.thing.shape == bank.ball.shape == (12,)
    assert rows == list(range(12))
    assert all(frame.std() > 5 for frame in bank.pixels)
    again = draw_frame_bank(np.random.default_rng(3), 12, crop)
    for a, b in zip(bank, again, strict=True):
        np.testing.assert_array_equal(a, b)
