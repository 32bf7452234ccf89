import json
import shutil

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import agent_prefix, load_agent, load_answerer, load_clip, read_generation
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.models.clip import cosine_similarity
from tspo_jax.models.layers import merge_params


@pytest.fixture(scope="module")
def encoder(golden):
    return load_clip(golden / "tspo_agent")


@pytest.fixture(scope="module")
def data(golden):
    return np.load(golden / "tspo_agent.npz")


@pytest.fixture(scope="module")
def frames(golden, data):
    """The golden video's candidates, uint8 [40, H, W, 3]."""
    wanted = set(data["candidate_idx"].tolist())
    with av.open(str(golden / "tspo_agent.mp4")) as container:
        return [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i in wanted]


def questions(data):
    return [meta["question"] for meta in json.loads(str(data["meta"]))]


@pytest.fixture
def copy_of(golden, tmp_path):
    """copy_of(name): a golden folder that a test may break."""

    def copy(name):
        return shutil.copytree(golden / name, tmp_path / name)

    return copy


# ---- CLIP and the agent against the golden numbers ----


def test_golden_token_ids(encoder, data):
    """The second question is longer than 77 tokens: it is cut, and ends with the end token."""
    ids = encoder.token_ids(questions(data))
    assert ids.shape == (2, 77) and ids.dtype == np.int32
    for i, row in enumerate(ids):
        expected = data[f"case{i}/input_ids"]
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert (row[len(expected) :] == 513).all()


def test_golden_pixels(encoder, data, frames):
    pixels = encoder.processor.normalize(np.stack([encoder.processor.crop(frame) for frame in frames[:4]]))
    np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2), data["pixel_values_first4"], atol=1e-6)


def test_golden_features_and_scores(golden, encoder, data, frames):
    """From pictures and words to the agent's logits; frames in batches that do not divide their number."""
    image, text = encoder.image_features(frames, batch_size=16), encoder.text_features(questions(data))
    assert image.dtype == text.dtype == np.float32 and encoder.width == 64
    graphdef, params = load_agent(golden / "tspo_agent")
    features = np.stack([image, image])
    clip_scores = cosine_similarity(text, features)
    logits = jax.jit(merge_params(graphdef, params))(features, text, clip_scores, np.ones((2, 40), bool))
    for i in range(2):
        np.testing.assert_allclose(image, data[f"case{i}/image_features"], atol=1e-4)
        np.testing.assert_allclose(text[i : i + 1], data[f"case{i}/text_features"], atol=1e-4)
        np.testing.assert_allclose(clip_scores[i], data[f"case{i}/clip_scores"], atol=1e-4)
        np.testing.assert_allclose(logits[i], data[f"case{i}/scores"], atol=1e-4)


def test_a_video_without_frames_has_no_features(encoder):
    assert encoder.image_features([]).shape == (0, 64)


def test_no_texts_have_no_features(encoder):
    assert encoder.text_features([]).shape == (0, 64)


def test_half_precision_clip(golden, encoder, data):
    half = load_clip(golden / "tspo_agent", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    text = half.text_features(questions(data))
    assert text.dtype == np.float32
    np.testing.assert_allclose(cosine_similarity(text, encoder.text_features(questions(data))[:, None]), 1, atol=1e-3)


# ---- agents ----


def test_plain_clip_gets_a_fresh_agent(plain_clip):
    assert agent_prefix(plain_clip) is None
    _, params = load_agent(plain_clip)
    leaves = weights.flatten(params)
    assert len(leaves) == 12 and {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.float32)}
    kernels = np.concatenate([np.ravel(leaf) for path, leaf in leaves.items() if path.endswith("kernel")])
    assert kernels.size == 6 * 64 * 64 and abs(kernels.mean()) < 5e-4 and kernels.std() == pytest.approx(0.02, rel=0.02)
    assert not any(leaf.any() for path, leaf in leaves.items() if path.endswith("bias"))
    same, other = load_agent(plain_clip)[1], load_agent(plain_clip, seed=1)[1]
    np.testing.assert_array_equal(same["mlp"]["linear_1"]["kernel"], params["mlp"]["linear_1"]["kernel"])
    assert (np.asarray(other["mlp"]["linear_1"]["kernel"]) != params["mlp"]["linear_1"]["kernel"]).mean() > 0.99


def test_agent_of_a_training_checkpoint(golden, copy_of):
    """Among the tensors of LLaVA-Video, as the original's trainer saves it."""
    folder = copy_of("llava_video_grid")
    _, agent = load_agent(golden / "tspo_agent")
    tensors = load_file(folder / "model.safetensors")
    weights.save_tensors(folder, tensors | weights.file_tensors(agent, weights.agent_format(weights.TRAINING)))
    _, loaded = load_agent(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded, agent)
    load_answerer(folder)


def test_agent_of_another_width_than_its_clip(golden, copy_of):
    folder = copy_of("tspo_agent")
    change_config(folder, projection_dim=32)
    with pytest.raises(CheckpointError, match="its agent is of width 64, but config.json's projection_dim is 32"):
        load_agent(folder)


def test_preprocessing_that_leaves_a_step_out(copy_of):
    folder = copy_of("tspo_agent")
    config = weights.read_config(folder, "preprocessor_config.json")
    for change in ({"do_resize": False}, {"do_center_crop": False}, {"rescale_factor": 1}):
        (folder / "preprocessor_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"preprocessor_config.json: {next(iter(change))} is"):
            load_clip(folder)


@pytest.mark.parametrize("name", ["tspo_agent", "llava_video_grid"])
def test_unknown_activations_are_named(copy_of, name):
    folder = copy_of(name)
    vision = weights.read_config(folder)["vision_config"]
    change_config(folder, vision_config=vision | {"hidden_act": "mish"})
    with pytest.raises(ValueError, match="config.json: hidden_act 'mish' is not supported; supported: .*quick_gelu"):
        load_clip(folder) if name == "tspo_agent" else load_answerer(folder)


def test_answerer_is_no_agent(golden):
    with pytest.raises(CheckpointError, match="config.json: model_type is 'llava_qwen', not clip"):
        load_agent(golden / "llava_video_grid")


def test_damaged_agent_is_described_whole(copy_of):
    folder = copy_of("tspo_agent")
    tensors = load_file(folder / "model.safetensors")
    del tensors["selector.mlp.0.bias"]
    tensors["selector.mlp.2.bias"] = tensors["selector.mlp.2.bias"][:60]
    tensors["selector.gate"] = tensors["selector.mlp.2.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_agent(folder)
    assert sorted(str(error.value).split("\n  ")[1:]) == [
        "missing: selector.mlp.0.bias [64]",
        "unexpected: selector.gate [60]",
        "wrong shape: selector.mlp.2.bias is [60], expected [64]",
    ]
    load_clip(folder)  # CLIP is whole


# ---- answerers ----


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_answerer(golden, dtype):
    answerer = load_answerer(golden / "llava_video_grid", dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(answerer.params)} == {jnp.dtype(dtype)}
    assert (answerer.processor.size, answerer.processor.keep_aspect) == (28, False)
    assert answerer.config.num_visual_tokens(4) == 80
    assert answerer.tokenizer("Who?<|im_end|>")["input_ids"][-1] == 256


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, ((256,), 257, 1.0)),
        ({"eos_token_id": [3, 4], "pad_token_id": 4, "repetition_penalty": 1.05}, ((3, 4), 4, 1.05)),
        ({"eos_token_id": 5}, ((5,), 257, 1.0)),
    ],
)
def test_generation(copy_of, generation, expected):
    folder = copy_of("llava_video_grid")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    found = read_generation(folder)
    assert (found.eos_token_ids, found.pad_token_id, found.repetition_penalty) == expected


# ---- bad folders ----


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def test_other_models_are_refused_with_what_is_supported(copy_of):
    folder = copy_of("llava_video_grid")
    change_config(folder, model_type="bert")
    with pytest.raises(
        CheckpointError, match="config.json: model_type 'bert' is not supported; supported: .*llava_qwen"
    ):
        load_answerer(folder)
    with pytest.raises(CheckpointError, match="config.json: model_type is 'bert', not clip"):
        load_clip(folder)


@pytest.mark.parametrize(("name", "load"), [("tspo_agent", load_clip), ("llava_video_grid", load_answerer)])
class TestBadFolder:
    def test_missing(self, name, load, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere"):
            load(tmp_path / "nowhere")

    def test_config_is_broken(self, name, load, copy_of):
        folder = copy_of(name)
        (folder / "config.json").write_text('{"model_type": ')
        with pytest.raises(CheckpointError, match="config.json: not valid json"):
            load(folder)

    def test_no_tokenizer(self, name, load, copy_of):
        """transformers would make an empty tokenizer without a word."""
        folder = copy_of(name)
        for file in ("tokenizer.json", "vocab.json", "merges.txt"):
            (folder / file).unlink()
        with pytest.raises(CheckpointError, match="holds no tokenizer"):
            load(folder)

    def test_broken_tokenizer(self, name, load, copy_of):
        folder = copy_of(name)
        (folder / "tokenizer.json").write_text('{"version": "1.0"')
        with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
            load(folder)

    def test_weights_are_truncated(self, name, load, copy_of):
        file = copy_of(name) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="model.safetensors: truncated"):
            load(file.parent)

    def test_weights_of_another_size(self, name, load, copy_of):
        """Every tensor that does not fit is listed."""
        folder = copy_of(name)
        config = json.loads((folder / "config.json").read_text())
        change_config(folder, vision_config=config["vision_config"] | {"intermediate_size": 65})
        with pytest.raises(CheckpointError) as error:
            load(folder)
        lines = str(error.value).split("\n  ")[1:]
        assert len(lines) == 2 * 3 and all("wrong shape: " in line and ".mlp.fc" in line for line in lines)


def test_tokenizer_of_a_larger_model(copy_of):
    folder = copy_of("llava_video_grid")
    change_config(folder, vocab_size=200)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:200]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tokenizer has 259 tokens, more than config.json's vocab_size 200"):
        load_answerer(folder)


def test_clip_in_bfloat16_is_near_and_has_an_identity_of_its_own(golden):
    exact, half = (load_clip(golden / "tspo_agent", dtype) for dtype in ("float32", "bfloat16"))
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    for name, args in (("image_features", images), ("text_features", ["a cat", "who opens the door?"])):
        one, other = getattr(exact, name)(args, 4), getattr(half, name)(args, 4)
        assert one.dtype == other.dtype == np.float32
        difference = np.abs(one - other).max()
        assert 0 < difference < 0.05 * np.abs(one).max()
    assert half.identity == f"{exact.identity}-bfloat16"


def test_float32_is_float32_whatever_the_platform_would_do(golden):
    """Products of float32 weights ask for full precision; those of bfloat16 for nothing."""
    encoders = [load_clip(golden / "tspo_agent", dtype) for dtype in ("float32", "bfloat16")]
    with jax.default_matmul_precision(None):
        exact, half = (str(jax.make_jaxpr(e._encode_text)(e.params, e.token_ids(["a cat"]))) for e in encoders)
    assert exact.count("dot_general") == exact.count("Precision.HIGHEST, Precision.HIGHEST") > 5
    assert "HIGHEST" not in half
