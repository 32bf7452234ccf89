"""TESTA and BLIP from folders: Hugging Face's classes, files of torch.save, wrong folders."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_testa
from safetensors.numpy import load_file, save_file

from tspo_jax.checkpoints import testa_folders
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.checkpoints.testa_folders import load_testa
from tspo_jax.models.layers import merge_params

TEXT = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, vocab_size=40)


@pytest.fixture
def folder(golden, tmp_path):
    return tiny_testa.make(tmp_path / "testa", golden)


def blip(golden, folder, kind, width):
    """A random BLIP of Hugging Face, and its folder."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = TEXT | dict(max_position_embeddings=24, encoder_hidden_size=width, bos_token_id=38, sep_token_id=3)
    vision = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2)
    vision |= dict(image_size=16, patch_size=4)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=12)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn_like(p))
    tiny_testa.make(folder, golden)
    vocabulary = (folder / "vocab.txt").read_text()
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text(vocabulary)
    return torch, model


def call(model, f, *args):
    return jax.jit(lambda params, *args: f(merge_params(model.graphdef, params), *args))(model.params, *args)


def texts(rng):
    ids = rng.integers(4, 38, (2, 7)).astype(np.int32)
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3], np.int32)
    return ids, mask


def test_blip_retrieval(golden, tmp_path):
    """One frame: the tower, both modes of the text encoder and the heads are Hugging Face's."""
    torch, theirs = blip(golden, tmp_path / "blip", "BlipForImageTextRetrieval", 16)
    ours = load_testa(tmp_path / "blip", num_frames=3)
    assert (ours.num_frames, ours.width, ours.config.answers) == (3, 12, False)
    rng = np.random.default_rng(0)
    pixels, (ids, mask) = rng.normal(size=(2, 16, 16, 3)).astype(np.float32), texts(rng)

    def run(m, pixels):
        tokens = m.video_tokens(pixels[:, None])
        return tokens, m.text_encoder(ids, mask), m.text_features(ids, mask), m.matching_logits(tokens, ids, mask)

    tokens, hidden, features, matching = call(ours, run, pixels)
    with torch.no_grad():
        pictures = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
        arguments = dict(input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())
        seen = theirs.vision_model(pictures).last_hidden_state
        alone = theirs.text_encoder(**arguments).last_hidden_state
        together = theirs(pixel_values=pictures, **arguments, use_itm_head=True)
    np.testing.assert_allclose(tokens, seen, atol=1e-4)
    np.testing.assert_allclose(hidden[mask == 1], alone[torch.from_numpy(mask) == 1], atol=1e-4)
    np.testing.assert_allclose(matching, together.itm_score, atol=1e-4)
    expected = torch.nn.functional.normalize(theirs.text_proj(alone[:, 0]), dim=-1).detach()
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_blip_sees_each_frame_alone(golden, tmp_path):
    """Time adds nothing before training: patches of a frame do not depend on the others but by the class token."""
    blip(golden, tmp_path / "blip", "BlipForImageTextRetrieval", 16)
    model = load_testa(tmp_path / "blip", num_frames=2)
    pixels = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)

    def run(m, pixels):
        return m.video_tokens(pixels[:, None]), m.video_tokens(pixels[:, None].repeat(2, 1))

    one, two = call(model, run, pixels)
    np.testing.assert_allclose(one[:, 0], two[:, 0], atol=1e-5)
    np.testing.assert_allclose(one[:, 1:], two[:, 1::2], atol=1e-5)


def test_blip_answers(golden, tmp_path):
    torch, theirs = blip(golden, tmp_path / "blip", "BlipForQuestionAnswering", 24)
    ours = load_testa(tmp_path / "blip", num_frames=1)
    assert ours.config.answers and not ours.width
    rng = np.random.default_rng(1)
    read, (ids, mask) = rng.normal(size=(2, 5, 24)).astype(np.float32), texts(rng)
    logits = call(ours, lambda m, read: m.text_decoder(ids, mask, read, np.ones((2, 5), np.int32)), read)
    with torch.no_grad():
        expected = theirs.text_decoder(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            encoder_hidden_states=torch.from_numpy(read),
            encoder_attention_mask=torch.ones(2, 5),
        ).logits
    np.testing.assert_allclose(logits[mask == 1], expected[torch.from_numpy(mask) == 1], atol=1e-4)


def test_released_file(folder, tmp_path):
    """A .pth with momentum copies, queues and an optimiser gives what safetensors give."""
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(x) for name, x in load_file(folder / "model.safetensors").items()}
    extra = {"text_encoder_m.a": torch.ones(2), "image_queue": torch.ones(2, 3), "queue_ptr": torch.zeros(1)}
    released = tmp_path / "released"
    shutil.copytree(folder, released, ignore=shutil.ignore_patterns("*.safetensors"))
    content = {"model": tensors | extra, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, "config": {}, "epoch": 3}
    torch.save(content, released / "testa.pth")
    a, b = load_testa(folder), load_testa(released)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    clip = np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3), np.uint8)
    best = b.answer(clip, "who is in the door", ["a man", "red ball", "dog runs"], k=2)
    assert len(best) == 2 and best[0][1] <= best[1][1]
    assert load_testa(folder, num_frames=3).params["visual_encoder"]["time_embed"].shape[1] == 3


def test_a_released_file_whose_config_is_none(folder, tmp_path):
    torch = pytest.importorskip("torch")
    shutil.copy(folder / "vocab.txt", tmp_path)
    torch.save({"model": {"temp": torch.ones(())}, "config": "a text"}, tmp_path / "released.pth")
    with pytest.raises(CheckpointError, match="released.pth: 'config' is a str, not fields by name"):
        load_testa(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(testa_r=[1, 2, 3, 4, 5]), "testa_r"),
        (dict(surprise=1), "unknown fields surprise"),
        (dict(merging_type="none"), "merging_type 'none'"),
        (dict(model_type="clip"), "neither testa nor blip"),
        (dict(embed_dim=13), r"wrong shape: text_proj.bias"),
        (dict(embed_dim="x"), "config.json: embed_dim cannot be 'x'"),
        (dict(vision=5), "config.json: vision cannot be 5"),
        (dict(testa_r=5), "config.json: testa_r cannot be 5"),
        (dict(answers="no"), "config.json: answers cannot be 'no'"),
    ],
)
def test_wrong_configs(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load_testa(folder)


@pytest.mark.slow
def test_wrong_folders(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_testa(tmp_path / "none")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"visual_encoder.new": np.ones(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: visual_encoder.new"):
        load_testa(folder)
    del tensors["visual_encoder.blocks.1.temporal_fc.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: visual_encoder.blocks.1.temporal_fc.weight"):
        load_testa(folder)
    (folder / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(CheckpointError):
        load_testa(folder)


def test_published_sizes():
    config = testa_folders.testa_config({"testa_r": [1, 12] * 12})
    assert (config.text.vocab_size, config.text.cross_width, config.vision.side) == (30524, 768, 14)
    assert config.vision.tokens_after(32)[-1] == (20, 52)
