import io
import json
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from tspo_jax.checkpoints.folders import load_answerer, load_clip
from tspo_jax.models.clip import Clip
from tspo_jax.toy import answerer_training, clip_training, tiny_answerers, train_models
from tspo_jax.toy.fitting import fresh_params
from tspo_jax.toy.tiny_answerers import TINY_ANSWERERS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What main() leaves when nothing is trained: the folder, and what was seen on the way."""
    seen = SimpleNamespace(folder=tmp_path_factory.mktemp("checkpoints"))

    def train_clip(config, bank, token_ids, *, seed, num_steps, run_dir, report):
        assert bank.pixels.shape == (train_models.CLIP_FRAMES, 48, 48, 3)
        seen.clip_config, seen.clip_params = config, fresh_params(lambda rngs: Clip(config, rngs=rngs), seed)[1]
        seen.clip_ids = token_ids(["A tree in the desert", "the sea"])
        report(num_steps, 1.5)
        return seen.clip_params

    def train_projection(tiny, answerer, bank, *, seed, num_steps, run_dir, report):
        assert bank.pixels.shape == (600, 48, 48, 3) and num_steps == 7
        return answerer.params

    def train_language(tiny, answerer, bank, *, seed, num_steps, run_dir, report, batch_size):
        seen.llava_params, seen.tokenizer = answerer.params, answerer.tokenizer
        assert (num_steps, batch_size) == (9, 5)
        return answerer.params

    def measure(clip, answerer, seeds, world):
        seen.seeds = seeds
        return {"spread": 0.04}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_models, "CLIP_FRAMES", 300)
        patch.setattr(clip_training, "train_clip", train_clip)
        patch.setattr(answerer_training, "train_projection", train_projection)
        patch.setattr(answerer_training, "train_language", train_language)
        patch.setattr(train_models, "measure", measure)
        numbers = dict(num_frames=600, tower_steps=7, language_steps=9, batch_size=5, seed=3)
        given = SimpleNamespace(
            output=str(seen.folder), run_dir=str(seen.folder / "runs"), answerer="llava_video", clip="", **numbers
        )
        patch.setattr(train_models.flags, "FLAGS", given)
        train_models.main()
        given.answerer, given.clip = "qwen3_vl", str(seen.folder / "clip")
        patch.setattr(clip_training, "train_clip", None)  # the one that is there is taken
        patch.setattr(answerer_training, "train_language", lambda tiny, answerer, *_, **__: answerer.params)
        train_models.main()
    return seen


def assert_saved(loaded, params):
    """Equal but for the file's bfloat16."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(ml_dtypes.bfloat16)), loaded, params
    )


@pytest.mark.slow
def test_clip_loads_back(made):
    clip = load_clip(made.folder / "clip")
    assert clip.config == made.clip_config
    assert clip.processor == clip_training.clip_processor()
    assert_saved(clip.params, made.clip_params)
    # The same ids, but for the padding: with the end token in both.
    ids = clip.token_ids(["A tree in the desert", "the sea"])
    np.testing.assert_array_equal(ids[:, : made.clip_ids.shape[1]], made.clip_ids)
    assert np.all(ids[:, made.clip_ids.shape[1] :] == clip.config.text.eos_token_id)


@pytest.mark.slow
def test_llava_video_loads_back(made):
    answerer = load_answerer(made.folder / "llava_video")
    assert answerer.config == tiny_answerers.llava_config(len(answerer.tokenizer))
    assert answerer.processor.size == tiny_answerers.IMAGE_SIZE
    assert answerer.generation.eos_token_ids == (answerer.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    text = "<|im_start|>A. red<|im_end|>"
    assert answerer.tokenizer(text)["input_ids"] == made.tokenizer(text)["input_ids"]
    assert_saved(answerer.params, made.llava_params)


@pytest.mark.slow
def test_qwen3_vl_is_made_where_it_is_asked_for(made):
    answerer = load_answerer(made.folder / "qwen3_vl")
    assert answerer.config == TINY_ANSWERERS["qwen3_vl"].architecture(len(answerer.tokenizer)).config
    assert len(answerer.tokenizer("9.5 seconds")["input_ids"]) == 4  # times are among what the tokenizer learned from


@pytest.mark.slow
def test_files_have_the_formats_of_the_big_ones(made):
    clip = json.loads((made.folder / "clip" / "config.json").read_text())
    assert clip["architectures"] == ["CLIPModel"] and clip["model_type"] == "clip"
    llava = json.loads((made.folder / "llava_video" / "config.json").read_text())
    assert llava["architectures"] == ["LlavaQwenForCausalLM"] and llava["model_type"] == "llava_qwen"
    # The published tower's last layer is counted, but neither run nor kept.
    assert llava["vision_config"]["num_hidden_layers"] == tiny_answerers.llava_config(9).vision.num_hidden_layers + 1
    for name in ("clip", "llava_video"):
        files = {path.name for path in (made.folder / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert (made.folder / "clip" / "preprocessor_config.json").is_file()


@pytest.mark.slow
def test_quality_is_measured_on_videos_of_the_models_split_and_kept(made):
    assert json.loads((made.folder / "quality.json").read_text()) == {"spread": 0.04}
    assert made.seeds == [train_models.video_seed("models", 1, i) for i in range(train_models.QUALITY_VIDEOS)]


def test_bars_show_step_and_loss():
    text = io.StringIO()
    with Progress(console=Console(file=text)) as progress, train_models.steps(progress, "CLIP", 10) as report:
        report(4, 1.25)
        assert (progress.tasks[0].completed, progress.tasks[0].total) == (4, 10)
        assert progress.tasks[0].description == "CLIP, loss 1.250"
