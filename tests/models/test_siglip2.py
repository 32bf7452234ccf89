"""SigLIP 2 against Hugging Face's class on small random weights: features, tokens, pixels; an agent on its features."""

import json

import numpy as np
import pytest
import tokenizers
from video_files import write_video

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_agent, load_clip, read_clip_config
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.data.decode import Video
from tspo_jax.export import export
from tspo_jax.models.preprocessing import ImageProcessor
from tspo_jax.models.siglip2 import Siglip2Config
from tspo_jax.selection.choosing import select_frames
from tspo_jax.selection.scoring import encode_video, load_scorer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOWER = dict(intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
WORDS = ["<pad>", "<eos>", "<unk>", "who", "opens", "the", "door", "a", "red", "ball"]
PAD, END = 0, 1
QUESTIONS = ["Who opens the door", "a red ball", "ball " * 30, ""]


def write_tokenizer(folder):
    """One of words, that ends texts with an end token and pads with another, as SigLIP 2's."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    fast = tokenizers.Tokenizer(model)
    fast.normalizer = tokenizers.normalizers.Lowercase()
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", END)])
    names = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def oracle():
    config = transformers.SiglipConfig(
        text_config=dict(hidden_size=24, vocab_size=12, max_position_embeddings=9, projection_size=32, **TOWER),
        vision_config=dict(hidden_size=32, image_size=29, patch_size=7, **TOWER),
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    oracle = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return oracle


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip2")
    oracle.save_pretrained(folder)
    write_tokenizer(folder)
    settings = {"size": {"height": 29, "width": 29}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return load_clip(folder)


def test_features_of_hugging_face(oracle, encoder):
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3)).astype(np.uint8)
    pil = transformers.models.siglip.image_processing_pil_siglip.SiglipImageProcessorPil
    pixels = pil(size={"height": 29, "width": 29}, resample=2)(list(images), return_tensors="pt")["pixel_values"]
    tokenizer = encoder.tokenizer
    ids = tokenizer(QUESTIONS, padding="max_length", truncation=True, max_length=9, return_tensors="pt")["input_ids"]
    np.testing.assert_array_equal(encoder.token_ids(QUESTIONS), ids)
    assert ids[1].tolist() == [7, 8, 9, END, PAD, PAD, PAD, PAD, PAD] and ids[2, -1] == END
    with torch.no_grad():
        image = oracle.get_image_features(pixel_values=pixels).pooler_output.numpy()
        text = oracle.get_text_features(input_ids=ids).pooler_output.numpy()
    assert encoder.width == 32 and np.abs(image).max() > 0.5 and np.abs(text).max() > 0.5
    np.testing.assert_allclose(encoder.image_features(images), image, atol=1e-4)
    np.testing.assert_allclose(encoder.text_features(QUESTIONS), text, atol=1e-4)


def test_saved_tensors_equal_the_loaded_ones(folder, encoder):
    files = weights.SafetensorsFolder(folder)
    saved = weights.file_tensors(encoder.params, weights.SIGLIP2)
    assert saved.keys() == files.names()
    for name, tensor in saved.items():
        np.testing.assert_array_equal(tensor, files.read(name, ()).reshape(tensor.shape))


def test_frames_are_chosen_by_it(folder, encoder, tmp_path):
    """By similarity with the plain folder, and by an agent of its width: fresh, as training starts."""
    video = Video(write_video(tmp_path / "v.mp4", 100))
    scorer = load_scorer(folder)
    candidates = encode_video(video, scorer.clip)
    assert candidates.features.shape == (4, 32)
    result = select_frames(scorer, candidates, "a red ball", 2, "clip-topk")
    best = np.sort(np.argsort(result["clip_scores"])[-2:])
    assert result["frame_idx"] == candidates.frame_idx[best].tolist()
    graphdef, agent = load_agent(folder)
    assert agent["mlp"]["linear_2"]["kernel"].shape[-1] == 32
    with pytest.raises(ValueError, match="the original's code reads agents of CLIP alone"):
        export(agent, folder, tmp_path / "exported")


def test_identity_is_that_of_the_weights(oracle, folder, encoder, tmp_path):
    oracle.save_pretrained(tmp_path)
    assert weights.checkpoint_identity(tmp_path) == encoder.identity
    tensors = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    weights.save_tensors(tmp_path, tensors | {"logit_scale": tensors["logit_scale"] + 1})
    assert weights.checkpoint_identity(tmp_path) != encoder.identity


def test_folders_that_are_not_supported(folder, tmp_path):
    config = weights.read_config(folder)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglip2"}))
    with pytest.raises(CheckpointError, match="'siglip2', not clip or siglip; of SigLIP 2 the models"):
        read_clip_config(tmp_path)
    config["text_config"]["projection_size"] = 24
    with pytest.raises(ValueError, match="texts are projected to 24 channels, but vision_config.hidden_size is 32"):
        Siglip2Config.from_hf(config)
    with pytest.raises(ValueError, match="size .* is not the 29 x 29 pixels of config.json's vision tower"):
        ImageProcessor.siglip(29, {"size": {"height": 224, "width": 224}})
