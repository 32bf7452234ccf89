import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.models.layers import merge_params
from tspo_jax.models.video_prompt import VIDEO_TOKEN
from tspo_jax.streaming.objective import Schedule
from tspo_jax.toy.fitting import fresh_params
from tspo_jax.toy.streaming_task import (
    FLASH,
    Recipe,
    Task,
    Toy,
    accuracies,
    draw,
    drawn_for,
    forward,
    sizes,
    train,
    vectors,
)

TASK = Task(clips=3, objects=4, features=12)
CFG = sizes(TASK, width=16)


def test_what_is_asked_is_shown():
    """The clip of the evidence shows the object in the colour that is the answer, and as many flashes are in the
    stream as the count says."""
    batch, (objects, colours, flash) = draw(TASK, np.random.default_rng(1), 300), vectors(TASK)
    assert np.all(batch.prompts[:, 0] == VIDEO_TOKEN) and 0.35 < batch.is_lookup.mean() < 0.65
    assert np.all(batch.evidence.sum(1) == batch.is_lookup)
    for i in range(len(batch.answers)):
        patches = batch.clips[i].reshape(TASK.clips, -1, TASK.features)
        if batch.is_lookup[i]:
            wanted = objects[batch.prompts[i, 2]] + colours[batch.answers[i] - TASK.first_colour]
            away = np.linalg.norm(patches - wanted, axis=-1).min(1)
            away = np.minimum(away, np.linalg.norm(patches - wanted - flash, axis=-1).min(1))
            assert away.argmin() == batch.evidence[i].argmax()
        else:
            assert 0 <= batch.answers[i] - TASK.first_colour - TASK.colours <= TASK.flashes
    counts = ~batch.is_lookup
    strength = (batch.clips[counts] @ (flash / np.linalg.norm(flash))).reshape(counts.sum(), TASK.clips, -1).max(-1)
    number = batch.answers[counts] - TASK.first_colour - TASK.colours
    seen = (strength > np.linalg.norm(flash) / 2).sum(1)
    assert np.mean(np.abs(seen - np.minimum(number, TASK.clips)) <= 1) > 0.7 and FLASH > 1


def test_many_questions_about_a_video():
    """Lookups ask about clips of their own video, and counts of one video agree."""
    batch = draw(TASK, np.random.default_rng(2), 6, questions=16)
    assert batch.clips.shape[0] == 6 and batch.answers.shape == (6 * 16,)
    counts = np.where(batch.is_lookup, -1, batch.answers).reshape(6, 16)
    assert all(len(set(row) - {-1}) == 1 for row in counts)
    asked = {}
    for i in np.flatnonzero(batch.is_lookup):  # an object has one clip and one colour in a video
        asked.setdefault((i // 16, batch.prompts[i, 2]), set()).add((batch.answers[i], batch.evidence[i].argmax()))
    assert len(asked) > 10 and all(len(found) == 1 for found in asked.values())


@pytest.fixture(scope="module")
def trained():
    """A few steps of both stages."""
    reports = []
    recipe = Recipe(Schedule(60, 40, 0.1), one_clip=20, videos=4, questions=4)
    graphdef, state = train(TASK, CFG, recipe, 0, lambda *report: reports.append(report), report_every=40)
    return graphdef, state.params, recipe, reports


@pytest.mark.slow
def test_training_learns_to_pick(trained):
    graphdef, params, recipe, reports = trained
    assert [step for step, *_ in reports] == [40, 60]
    assert accuracies(graphdef, params, TASK, recipe)["found"] > 0.75  # chance is 2 of 3


def test_what_is_drawn_depends_on_seed_and_step_alone():
    one, again, other = (drawn_for(TASK, (2, 3), 1, step) for step in (5, 5, 6))
    np.testing.assert_array_equal(one[0].clips, again[0].clips)
    np.testing.assert_array_equal(one[1], again[1])
    assert np.any(one[0].clips != other[0].clips)


@pytest.mark.slow
def test_fixed_selections_and_what_they_see(trained):
    graphdef, params, _, _ = trained
    batch = draw(TASK, np.random.default_rng(5), 8)
    for selection, picks in (("last", [1, 2]), ("uniform", [0, 2])):
        run = jax.jit(lambda p, name=selection: forward(merge_params(graphdef, p), batch, None, name))
        logits, _, chosen = run(params)
        assert np.all(np.asarray(chosen) == np.array(picks)) and logits.shape == (8, TASK.vocab_size)


def test_parameters_have_a_rule_each():
    from tspo_jax.checkpoints.weights import flatten
    from tspo_jax.devices import sharding

    where = sharding.ParamSharding(sharding.make_mesh([("data", 8), ("model", 1)], jax.devices()), {})
    _, params = fresh_params(lambda rngs: Toy(CFG, TASK, rngs=rngs), 0)
    for path, leaf in flatten(params["encoder"]).items():
        where(path, jnp.shape(leaf))
