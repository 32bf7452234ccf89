import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tspo_jax.checkpoints.weights import LLAVA_VIDEO, load_params, read_config, save_tensors
from tspo_jax.models.layers import abstract_module, merge_params
from tspo_jax.models.llava_video import NEWLINES, LlavaVideo, LlavaVideoConfig, insert_newlines, pool_2x2
from tspo_jax.models.video_prompt import VIDEO_TOKEN

STEPS = 6


def load(folder):
    """graphdef and float32 parameters of a folder in lmms-lab's layout."""
    config = LlavaVideoConfig.from_hf(read_config(folder))
    graphdef, abstract = abstract_module(lambda rngs: LlavaVideo(config, rngs=rngs))
    return graphdef, load_params(folder, abstract, LLAVA_VIDEO)


@pytest.fixture(scope="module", params=["llava_video_grid", "llava_video_one_token"])
def golden_model(request, golden):
    """A model with its golden cases; the prompts of all cases, right padded, go through it as one batch."""
    graphdef, params = load(golden / request.param)
    data = np.load(golden / f"{request.param}.npz")
    cases = [f"case{meta['case']}" for meta in json.loads(str(data["meta"]))]
    ids = [data[f"{case}/input_ids"] for case in cases]
    padded = np.full((len(cases), max(map(len, ids))), 5)
    for row, i in zip(padded, ids, strict=True):
        row[: len(i)] = i
    id_lengths = np.array([len(i) for i in ids])
    lengths = np.array([len(data[f"{case}/inputs_embeds"]) for case in cases])

    @jax.jit
    def encode(params, pixels):
        model = merge_params(graphdef, params)
        tokens = model.vision_tower(pixels)
        return tokens, model.mm_projector(tokens), model.encode_frames(pixels)

    @jax.jit
    def prefill(params, frames, ids):
        model = merge_params(graphdef, params)
        prompt = model.prompt(frames, ids, id_lengths)
        logits, cache, position = model.prefill(prompt)
        return prompt.embeddings, logits, cache.extend(STEPS), position

    @jax.jit
    def decode(params, *args):
        return merge_params(graphdef, params).decode(*args)

    def run(params, num_tokens):
        pixels = [data[f"{case}/pixel_values"].transpose(0, 2, 3, 1) for case in cases]
        encoded = [encode(params, p) for p in pixels]
        embeddings, logits, cache, position = prefill(params, jnp.stack([frames for *_, frames in encoded]), padded)
        np.testing.assert_array_equal(position, lengths)
        generated, next_logits = [], logits
        for _ in range(num_tokens):
            token = jnp.argmax(next_logits, axis=-1)
            generated.append(token)
            next_logits, cache = decode(params, token, position, cache)
            position = position + 1
        return encoded, embeddings, logits, cache, np.array(generated).T

    return data, cases, lengths, params, run


def test_golden(golden_model):
    data, cases, lengths, params, run = golden_model
    encoded, embeddings, logits, _, generated = run(params, STEPS)
    for i, case in enumerate(cases):
        np.testing.assert_allclose(encoded[i][0], data[f"{case}/vision_features"], atol=1e-4)
        np.testing.assert_allclose(encoded[i][1], data[f"{case}/projected"], atol=1e-4)
        np.testing.assert_allclose(embeddings[i, : lengths[i]], data[f"{case}/inputs_embeds"], atol=1e-4)
        np.testing.assert_allclose(logits[i], data[f"{case}/last_logits"], atol=1e-3)
        np.testing.assert_array_equal(generated[i], data[f"{case}/generated"])


@pytest.mark.parametrize("golden_model", ["llava_video_one_token"], indirect=True)
def test_half_precision(golden_model):
    """bfloat16 parameters give bfloat16 activations, float32 logits, and logits near the float32 ones."""
    data, cases, _, params, run = golden_model
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    encoded, embeddings, logits, cache, _ = run(half, 0)
    assert {x.dtype for x in (*encoded[0], embeddings, *jax.tree.leaves(cache))} == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32
    for i, case in enumerate(cases):
        expected = data[f"{case}/last_logits"]
        assert np.corrcoef(logits[i], expected)[0, 1] > 0.99


# ---- pooling, newlines and the number of tokens ----


@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.slow
def test_padded_frames_are_not_shown(golden, newline):
    """Prompts of 2, 4 and 1 of 4 frames as those of so many, whatever the frames behind them are."""
    graphdef, params = load(golden / "llava_video_grid")
    model = merge_params(graphdef, params)
    model.cfg = dataclasses.replace(model.cfg, newline=newline)
    side, width = model.cfg.pooled_side, model.cfg.language.hidden_size
    frames = jax.random.normal(jax.random.key(0), (3, 4, side, side, width))
    ids = np.array([[5, VIDEO_TOKEN, 6, 7, 8], [VIDEO_TOKEN, 9, 9, 0, 0], [7, 7, VIDEO_TOKEN, 3, 0]])
    lengths, num_frames = np.array([5, 3, 4]), np.array([2, 4, 1])
    padded = model.prompt(frames, ids, lengths, None, num_frames)
    assert padded.embeddings.shape[1] == 4 + model.cfg.num_visual_tokens(4)
    for row, (length, k) in enumerate(zip(lengths, num_frames, strict=True)):
        alone = model.prompt(frames[row : row + 1, :k], ids[row : row + 1, :length], lengths[row : row + 1])
        n = length - 1 + model.cfg.num_visual_tokens(int(k))
        np.testing.assert_array_equal(padded.embeddings[row, :n], alone.embeddings[0])
        np.testing.assert_array_equal(padded.positions[row, :n], alone.positions[0])
        assert padded.lengths[row] == padded.following[row] == n == alone.lengths[0]


def test_bilinear_taps():
    """5 -> 3: the taps of models with an odd side, measured by pooling one-hot rows."""
    eye = jnp.broadcast_to(jnp.eye(5)[None, :, None], (1, 5, 5, 5))
    rows = np.asarray(pool_2x2(eye, "bilinear"))[0, :, 0]
    np.testing.assert_allclose(rows, [[2 / 3, 1 / 3, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1 / 3, 2 / 3]], atol=1e-6)


def test_bilinear_taps_of_the_published_model():
    """27 -> 14: two neighbours per output, the second with these weights."""
    eye = jnp.broadcast_to(jnp.eye(27)[:, None], (1, 27, 27, 27))
    rows = np.asarray(pool_2x2(eye, "bilinear"))[0, :, 0]
    first = [0, 2, 4, 6, 8, 10, 12, 13, 15, 17, 19, 21, 23, 25]
    second = [0.464286, 0.392857, 0.321429, 0.25, 0.178571, 0.107143, 0.035714]
    weights = second + [1 - w for w in reversed(second)]
    expected = np.zeros((14, 27))
    for row, i, w in zip(expected, first, weights, strict=True):
        row[i : i + 2] = 1 - w, w
    np.testing.assert_allclose(rows, expected, atol=1e-5)


@pytest.mark.parametrize("side", [5, 6, 27])
def test_pooling_equals_torch(side):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    channels_first = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    expected = {
        "average": functional.avg_pool2d(channels_first, 2),
        "max": functional.max_pool2d(channels_first, 2),
        "bilinear": functional.interpolate(channels_first, size=[-(-side // 2)] * 2, mode="bilinear"),
    }
    for mode, pooled in expected.items():
        np.testing.assert_allclose(pool_2x2(x, mode), pooled.permute(0, 2, 3, 1), atol=1e-5, err_msg=mode)


# Two frames of 2 x 2 tokens; a newline is -1.
NEWLINES = {
    "grid": [0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1],
    "frame": [0, 1, 2, 3, -1, 4, 5, 6, 7, -1],
    "one_token": [0, 1, 2, 3, 4, 5, 6, 7, -1],
    "no_token": [0, 1, 2, 3, 4, 5, 6, 7],
}


@pytest.mark.parametrize("position", NEWLINES)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_newlines(position, lead):
    tokens = jnp.broadcast_to(jnp.arange(8.0).reshape(2, 2, 2, 1), (*lead, 2, 2, 2, 1))
    out = insert_newlines(tokens, jnp.array([-1.0]), position)
    np.testing.assert_array_equal(
        out, np.broadcast_to(np.array(NEWLINES[position])[:, None], (*lead, out.shape[-2], 1))
    )


QWEN = dict(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize(
    ("pool", "position", "merge", "tokens"),
    [
        ("bilinear", "grid", "spatial_unpad", 16 * 210),
        ("bilinear", "frame", "spatial_unpad", 16 * 197),
        ("bilinear", "one_token", "spatial_unpad", 16 * 196 + 1),
        ("bilinear", "one_token", "spatial", 16 * 196),
        ("bilinear", "no_token", "spatial_unpad", 16 * 196),
        ("bilinear", "grid", "flat", 16 * 196),
        ("average", "grid", "spatial_unpad", 16 * 182),
        ("max", "one_token", "spatial_unpad", 16 * 169 + 1),
    ],
)
def test_tokens_of_16_frames(pool, position, merge, tokens):
    """Without a vision_config the tower is so400m-patch14-384; the number promised is the number made."""
    hf = {"mm_spatial_pool_mode": pool, "mm_newline_position": position, "mm_patch_merge_type": merge}
    config = LlavaVideoConfig.from_hf(QWEN | hf)
    assert config.vision.side == 27 and config.vision.num_hidden_layers == 26
    assert config.num_visual_tokens(16) == tokens

    def prompt():
        frames = jnp.zeros((16, config.pooled_side, config.pooled_side, 24))
        return insert_newlines(frames, jnp.zeros(24), config.newline)

    assert jax.eval_shape(prompt).shape == (tokens, 24)


@pytest.mark.parametrize(
    "fields",
    [
        {"mm_projector_type": "linear"},
        {"mm_spatial_pool_mode": "median"},
        {"mm_newline_position": "word", "mm_patch_merge_type": "spatial_unpad"},
        {"mm_newline_position": "grid", "mm_patch_merge_type": "spatial"},  # has no newline to insert
    ],
)
def test_configuration_that_is_not_supported(fields):
    with pytest.raises(ValueError, match=f"config.json: {next(iter(fields))}"):
        LlavaVideoConfig.from_hf(QWEN | fields)


# ---- Hugging Face ----

RENAME = (
    ("model.language_model.", "model."),
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
)


def test_hugging_face(tmp_path):
    """LlavaOnevision, whose videos are bilinear and one_token: odd side 73 // 14 = 5, pooled to 3; tower, projector,
    pooling, splicing and the language model, for prompts with text before and after the video."""
    torch = pytest.importorskip("torch")
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    vision = dict(
        hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2, image_size=73, patch_size=14
    )
    config = LlavaOnevisionConfig(
        vision_config=vision | dict(model_type="siglip_vision_model", vision_use_head=False),
        text_config=QWEN | dict(model_type="qwen2", bos_token_id=1, eos_token_id=2),
        image_token_index=62,
        video_token_index=63,
        vision_feature_layer=-1,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    oracle = LlavaOnevisionForConditionalGeneration(config).eval()
    before, after, frames = [5, 9, 11, 60], [7, 7, 30, 2, 18], 3
    pixels = np.random.default_rng(0).normal(size=(1, frames, 3, 73, 73)).astype(np.float32)
    ids = torch.tensor([before + (frames * 9 + 1) * [63] + after])
    with torch.no_grad():
        for p in oracle.parameters():
            p.copy_(0.2 * torch.randn_like(p))
        expected = oracle(input_ids=ids, pixel_values_videos=torch.from_numpy(pixels)).logits[0, -1]
        features = oracle.model.get_video_features(torch.from_numpy(pixels)).pooler_output.reshape(-1, 24)[:-1]

    tensors = {}
    for name, tensor in oracle.state_dict().items():
        for old, new in RENAME:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        tensors[name] = tensor.contiguous().numpy()
    save_tensors(tmp_path, tensors)
    lmms = dict(
        model_type="llava_qwen",
        mm_patch_merge_type="spatial_unpad",
        mm_newline_position="one_token",
        mm_spatial_pool_mode="bilinear",
        rope_theta=config.text_config.rope_parameters["rope_theta"],
        max_position_embeddings=config.text_config.max_position_embeddings,
        vision_config=vision | dict(num_hidden_layers=3),
    )
    (tmp_path / "config.json").write_text(json.dumps(QWEN | lmms))

    graphdef, params = load(tmp_path)

    @jax.jit
    def run(params, pixels, ids):
        model = merge_params(graphdef, params)
        frames = model.encode_frames(pixels)
        return frames, model.prefill(model.prompt(frames[None], ids, jnp.array([ids.shape[1]])))[0]

    prompt = np.array([before + [VIDEO_TOKEN] + after])
    tokens, logits = run(params, pixels[0].transpose(0, 2, 3, 1), prompt)
    np.testing.assert_allclose(tokens.reshape(-1, 24), features, atol=1e-4)
    np.testing.assert_allclose(logits[0], expected, atol=1e-3)

    # The same weights under the names that transformers 5 saves, those of llava-hf, and those since transformers 4.52.
    oracle.save_pretrained(tmp_path / "saved")
    in_memory = {name: tensor.contiguous().numpy() for name, tensor in oracle.state_dict().items()}
    published = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(tmp_path / "saved" / "model.safetensors").items()
    }
    assert "language_model.model.norm.weight" in published and "model.language_model.norm.weight" in in_memory
    for layout, tensors in (("published", published), ("in_memory", in_memory), ("saved", None)):
        if tensors:
            save_tensors(tmp_path / layout, tensors)
            shutil.copy(tmp_path / "saved" / "config.json", tmp_path / layout)
        assert LlavaVideoConfig.from_hf(read_config(tmp_path / layout)) == LlavaVideoConfig.from_hf(
            read_config(tmp_path)
        )
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / layout)[1], params)


@pytest.mark.parametrize("field", ["vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"])
def test_other_kinds_of_onevision_are_refused(field):
    with pytest.raises(ValueError, match=f"config.json: {field} is 'x'; only"):
        LlavaVideoConfig.from_hf({"model_type": "llava_onevision", "text_config": QWEN, field: "x"})
