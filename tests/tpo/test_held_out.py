"""Held-out pairs: every pair counts once, and their questions are answered from the frames that the pairs name."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_store import LONG, SHORT, make_store

from tspo_jax import config as cfg
from tspo_jax.answering import prompts
from tspo_jax.answering.given_frames import answer
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.letters import option_letter
from tspo_jax.devices import sharding
from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo import programs, training
from tspo_jax.tpo.batches import PairBatches
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.held_out import HeldOutPairs
from tspo_jax.tpo.losses import Objective
from tspo_jax.tpo.pairs import Pair
from tspo_jax.tpo.programs import Model, State

pytestmark = pytest.mark.slow  # a training or a whole evaluation, or the making of a model, before the first test

QUESTION = "Which?\nA. one\nB. two"
PAIRS = [
    Pair("a", LONG, QUESTION, "It is A.", "B", answer="A", evidence_picks=((LONG, 3),), rejected_picks=((LONG, 9),)),
    Pair("b", SHORT, QUESTION, "B", "It is A.", answer="B", evidence_picks=((SHORT, 1),), rejected_picks=((SHORT, 2),)),
    Pair("c", LONG, "And then?", "It counts on.", "The end"),
]


@pytest.fixture(scope="module")
def parts(golden, tmp_path_factory):
    """(HeldOutPairs in batches of two, its state, the answerer, the store)"""
    config = tpo_config.default()
    config.answerer.folder, config.answerer.dtype = str(golden / "llava_video_grid"), "float32"
    config.answerer.max_new_tokens, config.build.batch_size, config.batch_size, config.lora.r = 2, 2, 2, 2
    config.data.num_frames, config.data.answer_buckets = 1, (16,)
    config.held_out.update(every=1, accuracy=True)
    config = cfg.read(config, TpoConfig)
    mesh = sharding.make_mesh((("data", 1), ("model", 1)), jax.devices()[:1])
    answerer = load_answerer(golden / "llava_video_grid")
    graphdef, adapters, frozen = training.trained_parts(config, answerer, None)
    model = Model(graphdef, answerer.processor.normalize, jnp.float32, mesh=mesh)
    store = FrameStore(make_store(tmp_path_factory.mktemp("world"), golden))
    with ThreadPoolExecutor(2) as pool:
        batches = PairBatches(config, PAIRS, "pairs", answerer, store, pool)
        log_probs = programs.make_evaluation(model, online_reference=True)
        held_out = HeldOutPairs(config, batches, log_probs, Objective(), model, answerer, frozen)
        yield held_out, State(adapters, None), answerer, store


@pytest.fixture(scope="module")
def evaluated(parts):
    held_out, state, *_ = parts
    return held_out(1, state)


def test_an_untrained_answerer_is_its_own_reference(evaluated):
    assert evaluated.metrics["eval_losses/dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert evaluated.metrics["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert evaluated.metrics["eval_logps/chosen"] == pytest.approx(evaluated.metrics["eval_ref_logps/chosen"], abs=1e-4)
    assert evaluated.score == evaluated.metrics["eval_rewards/accuracies"]


def test_a_pair_that_fills_a_batch_up_does_not_count(parts, evaluated):
    """Three pairs in batches of two."""
    held_out, state, *_ = parts
    policy, reference = held_out._of_all(state)
    assert policy.total.shape == reference.total.shape == (3, 2)
    mean = np.mean(np.asarray(policy.total)[:, 0])
    assert evaluated.metrics["eval_logps/chosen"] == pytest.approx(mean, rel=1e-5)


def test_questions_are_answered_from_the_frames_of_the_pairs(parts, evaluated):
    """As the answerer alone answers; the pair without a known answer is not asked."""
    _, _, answerer, store = parts
    rollout = Rollout.of(answerer, max_new_tokens=2)
    for name, place in (("evidence", "evidence_picks"), ("without", "rejected_picks")):
        right = []
        for pair in PAIRS[:2]:
            frames = store.frames(pair.video, [frame for _, frame in getattr(pair, place)])
            said = answer(answerer, rollout, frames, prompts.render(pair.prompt, answerer.template, ""))["answer"]
            right.append(option_letter(said) == pair.answer)
        assert evaluated.metrics[f"eval_accuracy/{name}"] == np.mean(right)
    assert 0 <= evaluated.metrics["eval_accuracy/full"] <= 1
    assert "ranked right" in evaluated.said and "evidence" in evaluated.said


def test_a_question_of_more_options_than_five(parts, monkeypatch):
    """The letter F is an answer where the question has six options."""
    held_out, state, *_ = parts
    six = "Which?\n" + "\n".join(f"{letter}. {letter.lower()}{letter}" for letter in "ABCDEF")
    pair = Pair("f", LONG, six, "F", "B", answer="F", evidence_picks=((LONG, 3),))
    monkeypatch.setattr(held_out._batches, "pairs", [pair])
    monkeypatch.setattr(
        "tspo_jax.tpo.held_out.answer_requests", lambda requests, *_: [[(request, ("F",)) for request in requests]]
    )
    assert held_out._accuracy(state) == {"evidence": 1.0, "full": 1.0}
