"""benchmarks/step_time.py on models that compile in seconds: both sides do the same work, and it is counted."""

import dataclasses
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import step_time

TINY = dataclasses.replace(
    step_time.SMALL,
    answerer=step_time.SMALL.answerer
    | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    | dict(
        vision_config=dict(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=42
        )
    ),
    clip=dict(
        projection_dim=32,
        text_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
        vision_config=dict(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=56
        ),
    ),
    B=1,
    T=20,
    G=2,
    K=3,
    frame=(48, 64),
    prompt_tokens=16,
    encode_chunk=2,
)


def test_both_sides_compute_the_same():
    torch = pytest.importorskip("torch")
    from benchmarks.pytorch_baseline import Baseline

    world = step_time.World(TINY, answer_tokens=3)
    ours, theirs = step_time.Ours(world), Baseline(world, "cpu")
    picks = np.array([[[1, 4, 7], [4, 5, 6]]])
    candidates, index = step_time.unique_frames(picks)
    answers = ours.rollout(world.params, *ours.shown(ours.fetch(candidates), index))
    for tokens, chosen in zip(np.asarray(answers.tokens)[0], picks[0], strict=True):
        assert theirs.answer(chosen, world.prompt_ids[0])[-3:].tolist() == tokens.tolist()
    few, many = (step_time.arithmetic_of_answer(ours, unique) for unique in (2, 6))
    assert 0 < few < many
    features, text = world.features[0], world.text[0]
    with torch.no_grad():
        logits = theirs.agent(torch.from_numpy(features), torch.from_numpy(text), 0.025)
    batch = {"features": world.features, "text": world.text, "mask": np.ones((1, TINY.T), bool)}
    expected = step_time.programs.score(world.agent_graphdef, world.agent, batch, 0.025)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-3)


def test_both_sides_are_timed_and_compared():
    pytest.importorskip("torch")
    result = step_time.measure(TINY, answer_tokens=2, num_steps=1, images=2, prompts=2)
    assert result["step"].keys() == {"CLIP", "sample", "fetch", "answer", "update", "sum"}
    assert result["pieces"].keys() == {"SigLIP", "prefill", "decode", "sum"}
    assert 3 <= result["unique_frames"] <= 6
    for part, row in result["pieces"].items():
        assert min(*row["ours"], *row["pytorch"]) > 0, part
        np.testing.assert_allclose(row["ratio"], np.divide(row["pytorch"], row["ours"]))
    step, without = result["step"]["sum"], result["step without CLIP"]["sum"]
    assert step["ours"] == without["ours"] and step["pytorch"][0] > without["pytorch"][0]
