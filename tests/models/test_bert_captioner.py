import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.swinbert_folders import SWINBERT, captioner_tensors, load_captioner
from tspo_jax.models.bert import BertConfig
from tspo_jax.models.bert_captioner import (
    BertCaptioner,
    CaptionerConfig,
    beam_captions,
    greedy_captions,
    masked_loss,
)
from tspo_jax.models.layers import abstract_module, merge_params

KINDS = {"soft": dict(), "hard": dict(hard_mask=True), "off": dict(mask="none")}


@pytest.fixture(scope="module")
def data(golden):
    return np.load(golden / "swinbert_tiny.npz")


@pytest.fixture(scope="module")
def captioner(golden):
    return load_captioner(golden / "swinbert_tiny")


def of_kind(captioner, kind):
    """The model with another mask: its structure and parameters."""
    config = dataclasses.replace(captioner.config, **KINDS[kind])
    graphdef, _ = abstract_module(lambda rngs: BertCaptioner(config, rngs=rngs))
    params = {name: x for name, x in captioner.params.items() if name != "learn_vid_att" or config.mask != "none"}
    return graphdef, params


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.slow
def test_golden_training(captioner, data, kind):
    graphdef, params = of_kind(captioner, kind)
    pixels = captioner.processor.normalize(data["frames"])
    is_masked, masked = data["train/masked_pos"], data["train/masked_ids"]
    lengths = (data["train/unmasked_ids"] != captioner.tokens.pad).sum(1)
    targets = np.where(is_masked == 1, data["train/unmasked_ids"], -1)

    def loss(params):
        model = merge_params(graphdef, params)
        tokens = model.video_tokens(pixels)
        hidden = model.words(data["train/input_ids"], lengths, model.encode(tokens))
        logits = model.logits(hidden)
        return masked_loss(logits, targets, is_masked), (tokens, logits)

    (value, (tokens, logits)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    exact = kind != "soft"
    atol = 1e-4 if exact else 2e-3
    assert sorted(targets[targets >= 0]) == sorted(masked[masked >= 0])
    np.testing.assert_allclose(tokens, data["video_tokens"], atol=2e-5)
    np.testing.assert_allclose(value, data[f"train/{kind}/loss"], atol=1e-5 if exact else 1e-3)
    np.testing.assert_allclose(logits[is_masked == 1], data[f"train/{kind}/masked_logits"], atol=atol)
    counts = np.arange(logits.shape[1]) < lengths[:, None]
    np.testing.assert_allclose(logits[counts], data[f"train/{kind}/logits"][counts], atol=atol)
    found = weights.file_tensors(gradient, SWINBERT)
    for name in data.files:
        if match := re.fullmatch(rf"train/{kind}/grad/(.*)", name):
            expected = data[name]
            scale = np.abs(expected).max()
            tolerance = 1e-4 if exact else 2e-2
            np.testing.assert_allclose(found[match[1]], expected, atol=tolerance * scale + 1e-9, err_msg=name)


def test_golden_sparsity(captioner, data):
    def sparsity(params):
        return merge_params(captioner.graphdef, params).sparsity()

    value, gradient = jax.jit(jax.value_and_grad(sparsity))(captioner.params)
    np.testing.assert_allclose(value, data["train/soft/sparsity"], rtol=1e-5)
    found = weights.file_tensors(gradient, SWINBERT)["learn_vid_att.weight"]
    np.testing.assert_allclose(found, data["train/sparsity_grad"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", list(KINDS))
def test_golden_decoding(captioner, data, kind):
    graphdef, params = of_kind(captioner, kind)
    beams = sorted({int(match[1]) for name in data.files if (match := re.fullmatch(rf"decode/{kind}/beam(\d+)", name))})

    @jax.jit
    def run(params):
        model = merge_params(graphdef, params)
        video = model.encode(model.video_tokens(captioner.processor.normalize(data["frames"])))
        found = greedy_captions(model, video, captioner.tokens)
        return found, [beam_captions(model, video, captioner.tokens, n) for n in beams]

    (greedy, logits), searched = run(params)
    expected = data[f"decode/{kind}/greedy"]
    np.testing.assert_array_equal(greedy.ids, expected)
    np.testing.assert_allclose(greedy.log_prob, data[f"decode/{kind}/greedy_mean_logprob"], atol=1e-3)
    np.testing.assert_allclose(logits, data[f"decode/{kind}/step_logits"], atol=1e-4 if kind != "soft" else 2e-3)
    texts = json.loads(str(data["meta"]))["greedy_text"][kind]
    assert [captioner.tokenizer.decode(row[1:]) for row in np.asarray(greedy.ids)] == texts
    for n, found in zip(beams, searched, strict=True):
        np.testing.assert_array_equal(found.ids, data[f"decode/{kind}/beam{n}"])
        np.testing.assert_allclose(found.log_prob, data[f"decode/{kind}/beam{n}_score"], atol=1e-3)


@pytest.mark.slow
def test_straight_through_mask(captioner, data):
    """Forward it is the thresholded mask; backward closed edges get a gradient too."""
    hard, params = of_kind(captioner, "hard")
    config = dataclasses.replace(captioner.config, mask="straight_through")
    graphdef, _ = abstract_module(lambda rngs: BertCaptioner(config, rngs=rngs))
    pixels = captioner.processor.normalize(data["frames"][:1])
    ids, length = data["train/input_ids"][:1], np.array([5])

    def total(graphdef):
        def run(params):
            model = merge_params(graphdef, params)
            logits = model.logits(model.words(ids, length, model.encode(model.video_tokens(pixels))))[:, :5]
            return jax.nn.logsumexp(logits[..., :7], axis=-1).sum(), logits

        return jax.jit(jax.value_and_grad(run, has_aux=True))(params)

    (_, expected), _ = total(hard)
    (_, logits), gradient = total(graphdef)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    slope = np.asarray(gradient["learn_vid_att"]["embedding"]).ravel()
    w = np.asarray(params["learn_vid_att"]["embedding"]).ravel()
    off_diagonal = ~np.eye(config.num_video_tokens, dtype=bool).ravel()
    assert (np.abs(slope[(w < 0) & off_diagonal]) > 0).mean() > 0.9
    assert (slope[~off_diagonal] == 0).all()


def test_smoothed_loss():
    """Against the KL written out."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(4, 7)).astype(np.float32), rng.integers(0, 7, 4)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    q = np.full((4, 7), 0.1 / 6)
    q[np.arange(4), targets] = 0.9
    expected = (q * (np.log(q) - log_probs)).sum(-1)
    np.testing.assert_allclose(masked_loss(logits, targets, np.ones(4), 0.1), expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        masked_loss(logits, targets, np.array([0, 1, 0, 0])), -log_probs[1, targets[1]], rtol=1e-5
    )


def test_wrong_configurations():
    with pytest.raises(ValueError, match="mask is 'soft'"):
        CaptionerConfig(mask="soft")
    with pytest.raises(ValueError, match="max_caption is 600; it must be 2 to 512"):
        CaptionerConfig(max_caption=600)
    with pytest.raises(ValueError, match="no multiple of num_attention_heads"):
        CaptionerConfig(bert=BertConfig(hidden_size=10, num_attention_heads=3))
    assert CaptionerConfig().num_video_tokens == 784


def test_every_parameter_has_its_tensor(captioner):
    """Names both ways: what is written is what was read."""
    files = captioner_tensors(captioner.folder)
    for name, x in weights.file_tensors(captioner.params, SWINBERT).items():
        np.testing.assert_array_equal(x, files.read(name, ()))
