import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from tspo_jax.toy.scenes import (
    FRAME_SIZE,
    World,
    caption,
    draw_look,
    make_video_plan,
    render_frame,
    render_scene,
    video_seed,
)
from tspo_jax.toy.settings import SETTINGS
from tspo_jax.toy.sprites import BALLS, THINGS

WORLD = World()
PLANS = [make_video_plan(seed, WORLD) for seed in range(150)]


def test_scenes_fill_the_video_and_are_short():
    for plan in PLANS:
        assert 60 <= plan.duration <= 240
        assert plan.scenes[0].start == 0 and plan.scenes[-1].end == plan.duration
        for scene, following in itertools.pairwise(plan.scenes):
            assert scene.end == following.start
        for scene in plan.scenes:
            assert 1.5 - 1e-9 <= scene.end - scene.start <= min(6, 0.025 * plan.duration) + 1e-9


def test_sampling_at_one_frame_per_second_meets_every_scene():
    for plan in PLANS:
        candidates = np.arange(0, plan.num_frames, round(plan.fps)) / float(plan.fps)
        assert {plan.scene_index(time) for time in candidates} == set(range(len(plan.scenes)))


def test_frame_rates_and_settings_vary():
    assert {plan.fps for plan in PLANS} == set(WORLD.frame_rates)
    assert {plan.setting for plan in PLANS} == set(SETTINGS)


def test_answers_are_unique():
    for plan in PLANS:
        events = [scene.thing for scene in plan.scenes if scene.kind == "event"]
        shown = [scene.thing for scene in plan.scenes if scene.thing]
        assert 12 <= len(events) <= 16 and len(events) == len(set(events))
        for scene in (plan.scenes[0], plan.scenes[-1]):
            assert scene.kind == "event" and shown.count(scene.thing) == 1
        for thing in plan.relation_things:
            following = plan.scenes[plan.event(thing) + 1]
            assert shown.count(thing) == 1
            assert following.kind == "event" and following.thing != thing
        assert {scene.thing for scene in plan.scenes if scene.kind == "decoy"} <= set(plan.lookup_things)


def test_scene_kinds_show_what_they_should():
    for scene in itertools.chain.from_iterable(plan.scenes for plan in PLANS):
        assert (scene.thing is not None) == (scene.kind in ("event", "decoy"))
        if scene.kind != "filler":
            assert (scene.ball is not None) == (scene.kind == "event")
    fillers = [scene.ball for plan in PLANS for scene in plan.scenes if scene.kind == "filler"]
    assert 0.35 < np.mean([ball is not None for ball in fillers]) < 0.45


def test_number_of_decoys_is_a_parameter():
    plan = make_video_plan(3, World(decoys=(2, 2)))
    decoys = [scene.thing for scene in plan.scenes if scene.kind == "decoy"]
    assert sorted(decoys) == sorted(2 * plan.lookup_things)
    counts = {len([s for s in p.scenes if s.kind == "decoy" and s.thing == t]) for p in PLANS for t in p.lookup_things}
    assert counts == {3, 4, 5, 6}


def test_ball_shows_in_its_colour_and_is_not_hidden():
    for plan in PLANS[:40]:
        for scene in plan.scenes:
            if scene.ball:
                frame = render_frame(plan, (scene.start + scene.end) / 2).astype(float)
                x, y = (round(v) for v in scene.look.ball_xy)
                shown = frame[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
                expected = np.array(BALLS[scene.ball]) * scene.look.brightness
                np.testing.assert_allclose(shown, expected.clip(0, 255), atol=14)


def test_thing_and_ball_stand_apart():
    rng = np.random.default_rng(0)
    for _ in range(200):
        look = draw_look(rng, "tree", "red")
        assert abs(look.thing_xy[0] - look.ball_xy[0]) >= (look.thing_size + look.ball_size) / 2 - 1e-9
        assert look.thing_size / 2 <= look.thing_xy[0] <= FRAME_SIZE - look.thing_size / 2


def test_frames_of_a_scene_differ_but_little():
    plan = PLANS[0]
    scene = plan.scenes[0]
    times = np.arange(0, scene.end, 1 / float(plan.fps))
    frames = [render_frame(plan, time).astype(float) for time in times]
    for a, b in itertools.pairwise(frames):
        assert 1 < np.abs(a - b).mean() < 40


def test_everything_is_a_function_of_the_seed():
    assert make_video_plan(7, WORLD) == PLANS[7] != PLANS[8]
    np.testing.assert_array_equal(render_frame(PLANS[7], 30.0), render_frame(make_video_plan(7, WORLD), 30.0))
    same = render_scene(np.random.default_rng(1), "desert", "tree", "red")
    assert same.shape == (FRAME_SIZE, FRAME_SIZE, 3) and same.dtype == np.uint8
    np.testing.assert_array_equal(same, render_scene(np.random.default_rng(1), "desert", "tree", "red"))


def test_a_frame_lasts_until_the_next_one():
    plan = next(plan for plan in PLANS if plan.fps == Fraction(24000, 5005))
    for number in (0, 1, 17, plan.num_frames - 1):
        first = render_frame(plan, float(number / plan.fps))
        np.testing.assert_array_equal(first, render_frame(plan, float((number + Fraction(9, 10)) / plan.fps)))
    for scene_index, scene in enumerate(plan.scenes):
        assert plan.scene_index(scene.start) == scene_index


def test_every_content_can_be_rendered():
    rng = np.random.default_rng(0)
    for setting, thing, ball in zip(
        itertools.cycle(SETTINGS), [*THINGS, None, None], itertools.cycle([*BALLS, None]), strict=False
    ):
        assert render_scene(rng, setting, thing, ball).std() > 5


def test_captions():
    assert caption("desert", "tree", "red") == "a tree with a red ball in the desert"
    assert caption("sea", "umbrella", None) == "an umbrella on the sea"
    assert caption("city", None, "orange") == "an orange ball in the city"
    assert caption("snow", None, None) == "the snow"


def test_splits_have_disjoint_seeds():
    seeds = [
        video_seed(split, run, index)
        for split in ("models", "train", "eval")
        for run in (0, 1, 999)
        for index in (0, 1, 9999)
    ]
    assert len(seeds) == len(set(seeds))
    with pytest.raises(ValueError, match="split 'test'"):
        video_seed("test", 0, 0)
    with pytest.raises(ValueError, match="index"):
        video_seed("eval", 0, 10_000)


def test_impossible_worlds_and_times_are_refused():
    with pytest.raises(ValueError, match="decoys"):
        World(decoys=(0, 10))
    with pytest.raises(ValueError, match="too short"):
        World(duration=(30.0, 60.0))
    with pytest.raises(ValueError, match="does not hold all questions"):
        World(num_relations=6)
    for time in (-0.1, PLANS[0].duration, math.inf):
        with pytest.raises(ValueError, match="outside of the video"):
            render_frame(PLANS[0], time)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLANS[0].seed = 1
