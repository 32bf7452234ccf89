import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_bank import conversation_tokenizer, full_bank, reader

from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.checkpoints.weights import flatten
from tspo_jax.toy import answerer_training as training
from tspo_jax.toy.answerer_training import word_ids
from tspo_jax.toy.tiny_answerers import TINY_ANSWERERS

BANK = full_bank(size=24)


@pytest.fixture(scope="module")
def tokenizer():
    return conversation_tokenizer()


@pytest.fixture(scope="module", params=["llava_video", "qwen3_vl"])
def tiny(request):
    """A family, and its answerer for frames of 24 px."""
    family, given = TINY_ANSWERERS[request.param], reader(request.param)
    language = dict(intermediate_size=32, num_hidden_layers=3)
    if request.param == "llava_video":
        vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, image_size=24)
    else:
        vision = dict(hidden_size=32, intermediate_size=32, depth=1, patch_size=12)
    config = dataclasses.replace(
        given.config,
        language=dataclasses.replace(given.config.language, **language),
        vision=dataclasses.replace(given.config.vision, **vision),
    )
    graphdef, params = family.initial_params(config, 0)
    processor = family.architecture(0).processor
    answerer = Answerer(Path(), config, graphdef, params, given.tokenizer, processor, given.generation, given.template)
    return family, answerer


def test_word_ids(tokenizer):
    ids = word_ids(tokenizer, ("tree", "red", "desert"))
    assert [tokenizer.decode(i) for i in ids] == [" tree", " red", " desert"]
    with pytest.raises(ValueError, match="splits zeppelin, quux: train it on more text"):
        word_ids(tokenizer, ("tree", "zeppelin", "quux"))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def changed(before, after):
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)))


@pytest.mark.slow
def test_projection_leaves_the_language_models_layers_as_they_are(tiny, tmp_path):
    family, answerer = tiny
    params = answerer.params
    # Frames that are told apart by their brightness: what they show is easily learned.
    pixels = np.broadcast_to((BANK.setting * 20).astype(np.uint8)[:, None, None, None], BANK.pixels.shape)
    reports = []
    trained = training.train_projection(
        family,
        answerer,
        BANK._replace(pixels=pixels),
        seed=0,
        num_steps=30,
        run_dir=tmp_path,
        report=lambda *report: reports.append(report),
    )
    steps, losses = zip(*reports, strict=True)
    assert steps == tuple(range(1, 31)) and losses[-1] < 0.8 * losses[0]
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    language = trained["language_model"]
    for name in ("layers", "norm"):
        assert_same(language[name], params["language_model"][name])
    assert changed(params["language_model"]["embed_tokens"], language["embed_tokens"])
    words = language["embed_tokens"]["embedding"]
    np.testing.assert_allclose(language["lm_head"]["kernel"] * words.shape[1] ** 0.5, words.T, rtol=1e-5)
    before = flatten(params)
    tower = {path: leaf for path, leaf in flatten(trained).items() if path.startswith(family.family.tower)}
    assert tower and all(changed(before[path], leaf) for path, leaf in tower.items() if path.endswith("proj.kernel"))


@pytest.mark.slow
def test_language_training_leaves_the_tower_as_it_is(tiny, tmp_path):
    family, answerer = tiny
    reports = []
    trained = training.train_language(
        family,
        answerer,
        BANK,
        seed=0,
        num_steps=4,
        batch_size=8,
        run_dir=tmp_path,
        report=lambda *report: reports.append(report),
    )
    steps, losses = zip(*reports, strict=True)
    assert steps == (1, 2, 3, 4) and np.all(np.isfinite(losses)) and losses[-1] < losses[0]
    assert jax.tree.structure(trained) == jax.tree.structure(answerer.params)
    before, moved = flatten(answerer.params), set()
    for path, leaf in flatten(trained).items():
        is_tower = path.startswith(family.family.tower)
        if is_tower:
            assert_same(leaf, before[path])
        elif changed(leaf, before[path]):
            moved.add(path.split(".")[1 if path.startswith("visual.") else 0])
    projector = {"llava_video": {"mm_projector", "image_newline"}, "qwen3_vl": {"merger", "deepstack_merger_list"}}
    (name,) = (name for name, other in TINY_ANSWERERS.items() if other is family)
    assert moved == projector[name] | {"language_model"}


def test_frames_that_are_encoded_together_are_refused(tiny, tmp_path):
    family, answerer = tiny
    if not hasattr(answerer.config.vision, "temporal_patch_size"):
        pytest.skip("a family that encodes frame by frame")
    pairs = dataclasses.replace(answerer.config.vision, temporal_patch_size=2)
    answerer = dataclasses.replace(answerer, config=dataclasses.replace(answerer.config, vision=pairs))
    with pytest.raises(ValueError, match="encodes 2 frames together"):
        training.train_language(family, answerer, BANK, seed=0, num_steps=1, run_dir=tmp_path, report=print)
