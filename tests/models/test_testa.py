import json

import jax
import numpy as np
import pytest
from safetensors import safe_open

from tspo_jax.checkpoints import testa_folders
from tspo_jax.checkpoints.weights import load_params
from tspo_jax.models import testa
from tspo_jax.models.layers import abstract_module, merge_params


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    """The golden model: a function that calls `f(model, *args)` compiled, and its configuration's fields."""
    folder = tmp_path_factory.mktemp("testa")
    (folder / "model.safetensors").symlink_to(golden / "testa_retrieval.safetensors")
    with safe_open(golden / "testa_retrieval.safetensors", "numpy") as file:
        fields = json.loads(file.metadata()["config"])
    description = {name: fields[name] for name in ("vision", "text", "embed_dim")}
    config = testa_folders.testa_config(description | {"testa_r": fields["r"], "answers": True})
    graphdef, abstract = abstract_module(lambda rngs: testa.Testa(config, rngs=rngs))
    params = load_params(folder, abstract, testa_folders.TESTA)
    return lambda f, *args: jax.jit(lambda params, *args: f(merge_params(graphdef, params), *args))(params, *args)


@pytest.fixture(scope="module")
def data(golden):
    return np.load(golden / "testa_retrieval.npz")


@pytest.fixture(scope="module")
def tokens(model, data):
    return model(lambda m, video: m.video_tokens(video), data["video"].transpose(0, 2, 3, 4, 1))


def test_golden_retrieval(model, data, tokens):
    ids, mask = data["text_ids"], data["text_mask"]

    def run(m, tokens, ids, mask):
        return m.video_features(tokens), m.text_encoder(ids, mask), m.text_features(ids, mask)

    video, hidden, text = model(run, tokens, ids, mask)
    np.testing.assert_allclose(tokens, data["video_tokens"], atol=1e-4)
    np.testing.assert_allclose(video, data["video_feature"], atol=1e-4)
    np.testing.assert_allclose(hidden[mask == 1], data["text_hidden"][mask == 1], atol=1e-4)
    np.testing.assert_allclose(text, data["text_feature"], atol=1e-4)
    np.testing.assert_allclose(video @ text.T, data["similarity"], atol=1e-4)


def test_golden_matching(model, data, tokens):
    ids, mask = data["multimodal_ids"], data["text_mask"]
    B, texts = data["similarity"].shape

    def run(m, tokens, ids, mask):
        return m.text_encoder(ids, mask, tokens), m.matching_logits(tokens, ids, mask)

    pairs = np.repeat(tokens, texts, axis=0), np.tile(ids, (B, 1)), np.tile(mask, (B, 1))
    hidden, logits = model(run, *pairs)
    hidden = hidden.reshape(data["multimodal_hidden"].shape)
    np.testing.assert_allclose(hidden[:, mask == 1], data["multimodal_hidden"][:, mask == 1], atol=1e-4)
    np.testing.assert_allclose(logits.reshape(B, texts, 2), data["itm_logits"], atol=1e-4)


def test_golden_answers(model, data, tokens):
    ids, mask = data["answer_ids"], data["answer_mask"]
    question_mask = data["question_mask"]
    k = data["top3_candidates"].shape[1]

    def run(m, tokens, question, question_mask):
        states = m.question_states(tokens, question, question_mask)
        return (
            states,
            m.rank_answers(states, question_mask, ids, mask, len(ids)),
            m.rank_answers(states, question_mask, ids, mask, k),
            m.text_decoder(
                ids[:1, :1].repeat(len(states), 0), mask[:1, :1].repeat(len(states), 0), states, question_mask
            ),
        )

    states, all_of_them, best, first = model(run, tokens, data["question_ids"], question_mask)
    np.testing.assert_allclose(states[question_mask == 1], data["question_hidden"][question_mask == 1], atol=1e-4)
    nll = np.take_along_axis(all_of_them.nll, np.argsort(all_of_them.candidates, axis=1), axis=1)
    np.testing.assert_allclose(nll, data["answer_nll"], atol=1e-3)
    np.testing.assert_allclose(first[:, 0], data["first_token_logits"], atol=1e-4)
    # Which of several answers that begin alike comes first, or comes in at all, is arbitrary in torch.
    np.testing.assert_array_equal(ids[best.candidates, 1], ids[data["top3_candidates"], 1])
    same = (np.sort(best.candidates) == np.sort(data["top3_candidates"])).all(1)
    np.testing.assert_array_equal(np.array(best.best)[same], data["best_answer"][same])


def test_golden_answer_logits(model, data, tokens):
    ids, mask, question_mask = data["answer_ids"], data["answer_mask"], data["question_mask"]
    Q, A = data["answer_nll"].shape

    def run(m, tokens):
        states = m.question_states(tokens, data["question_ids"], question_mask)
        pairs = np.tile(ids, (Q, 1)), np.tile(mask, (Q, 1)), states.repeat(A, 0), question_mask.repeat(A, 0)
        return m.text_decoder(*pairs)

    logits = np.array(model(run, tokens)).reshape(data["answer_logits"].shape)
    np.testing.assert_allclose(logits[:, mask == 1], data["answer_logits"][:, mask == 1], atol=1e-4)
