"""The answerer without a video, against Hugging Face's class, and as a captioner of stored videos."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_store import LONG, SHORT, make_store

from tspo_jax.answering import prompts
from tspo_jax.answering.calls import CaptionCall
from tspo_jax.answering.given_frames import answer
from tspo_jax.answering.own_models import (
    OwnCaptioner,
    OwnWriter,
    TextAnswers,
    default_mesh,
    identity_of,
    nearest,
    padded_length,
    within,
)
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.models.preprocessing import Qwen3Processor, QwenProcessor
from tspo_jax.models.qwen2 import rope_angles
from tspo_jax.models.qwen2_5_vl import mrope_angles

TEXTS = ["Which of them?\nA. one\nB. two", "Say it again, and then say something else.", "x " * 200]


@pytest.fixture(scope="module")
def answerer(golden):
    return load_answerer(golden / "llava_video_grid")


@pytest.fixture(scope="module")
def store(tmp_path_factory, golden):
    return FrameStore(make_store(tmp_path_factory.mktemp("own_models"), golden))


@pytest.fixture(scope="module")
def replies(answerer):
    return TextAnswers(answerer, 6, batch_size=2)(TEXTS)


def test_hugging_face(golden, answerer, replies):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = golden / "llava_video_grid"
    config = json.loads((folder / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    model = Qwen2ForCausalLM(Qwen2Config(**{name: config[name] for name in names if name in config})).eval()
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    wanted = {name: tensors[name].float() for name in model.state_dict() if name in tensors}
    missing, unexpected = model.load_state_dict(wanted, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    end = answerer.generation.eos_token_ids
    for text, reply in zip(TEXTS, replies, strict=True):
        prompt = prompts.render_text(text, answerer.template)
        ids = answerer.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            shown = torch.tensor([ids])
            out = model.generate(
                shown, attention_mask=torch.ones_like(shown), max_new_tokens=6, do_sample=False,
                eos_token_id=list(end), pad_token_id=answerer.generation.pad_token_id,
            )[0, len(ids) :]  # fmt: skip
        assert reply == answerer.tokenizer.decode(out.tolist(), skip_special_tokens=True).strip()


@pytest.mark.slow
def test_replies_do_not_depend_on_the_batch_or_the_mesh(golden, answerer, replies):
    one_by_one = TextAnswers(answerer, 6, batch_size=1)
    assert [one_by_one([text])[0] for text in TEXTS] == replies
    assert one_by_one.num_compilations == len({padded_length(len(one_by_one.tokens(text))) for text in TEXTS})
    folder = golden / "llava_video_grid"
    mesh = sharding.make_mesh((("data", 1), ("model", 2)), jax.devices()[:2])
    split = load_answerer(folder, sharding=sharding.answerer_sharding(mesh, weights.read_config(folder)))
    assert TextAnswers(split, 6, batch_size=2, mesh=mesh)(TEXTS) == replies
    assert one_by_one([]) == []


def test_text_counts_all_axes_alike():
    """Of the models whose positions have three axes: text alone is turned as by one."""
    positions = jnp.arange(7)[None]
    three = mrope_angles(jnp.stack([positions] * 3, -1), np.repeat(np.arange(3), (2, 3, 3)), 16, 1e4)
    np.testing.assert_allclose(three, rope_angles(positions, 16, 1e4), rtol=1e-6)


def test_prompts_without_a_video():
    for name in prompts.TEMPLATES:
        text = prompts.render_text("Why?\n<image> <|video_pad|>", name)
        assert "Why?" in text and "vision" not in text and "<image>" not in text and "video_pad" not in text
        assert text.endswith("<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="empty"):
        prompts.render_text(" <image>")
    with pytest.raises(ValueError, match="template is 'x'"):
        prompts.render_text("Why?", "x")


def test_writer(answerer, replies):
    writer = OwnWriter(TextAnswers(answerer, 6), context=400)
    assert [reply.text for reply in writer.write(TEXTS)] == replies and writer.count("") == 0
    assert writer.count(TEXTS[2]) > writer.count(TEXTS[0]) > 10
    assert writer.identity != identity_of(answerer, "chatml_direct", 6)
    with pytest.raises(ValueError, match="context of 6"):
        OwnWriter(TextAnswers(answerer, 6), context=6)
    assert OwnWriter(TextAnswers(answerer, 6)).context == 4096  # the positions that the model has


@pytest.mark.slow
def test_captions_are_answers_about_the_frames(answerer, store):
    rollout = Rollout.of(answerer, max_new_tokens=4)
    captioner = OwnCaptioner(answerer, store, rollout, default_mesh(), batch_size=2)
    calls = [
        CaptionCall(LONG, (0.0, 1.0, 2.0), 100, "Describe it."),
        CaptionCall(LONG, (10.2, 10.7), 100, "Read the text."),
        CaptionCall("absent.mp4", (0.0,), 100, "Describe it."),
        CaptionCall(SHORT, (1.0, 2.0, 3.0), 100, "Describe it."),
    ]
    found = captioner.describe(calls)
    assert found[2].text is None and "absent.mp4 is not in" in found[2].error
    for call, reply in ((calls[0], found[0]), (calls[1], found[1]), (calls[3], found[3])):
        picks = nearest(store.video(call.video).timestamps, call.times)
        prompt = prompts.render(call.instruction, answerer.template, "")
        assert reply.text == answer(answerer, rollout, store.frames(call.video, picks), prompt)["answer"]


def test_nearest():
    times = np.array([0.0, 1.0, 2.0, 4.0])
    assert nearest(times, (0.0, 0.4, 0.6, 2.9, 3.1, 99.0)).tolist() == [0, 0, 1, 2, 3, 3]
    assert nearest(np.array([5.0]), (0.0, 9.0)).tolist() == [0, 0]


def test_padded_length():
    assert [padded_length(n) for n in (1, 256, 257, 512, 513, 1025)] == [256, 256, 512, 512, 1024, 2048]


def test_limits(answerer):
    with pytest.raises(ValueError, match="batch_size 0"):
        TextAnswers(answerer, 4, batch_size=0)


def test_frames_have_at_most_so_many_pixels(answerer):
    """Of coarse clips and of finer ones, near their aspect ratio; more than the processor's own limit never."""
    assert within(answerer, 100) is answerer  # LLaVA-Video's frames have the tower's size
    of_one_size = QwenProcessor(unit=28, frame_size=(56, 56))
    for processor in (QwenProcessor(unit=28), Qwen3Processor(unit=32).for_frames(4), of_one_size):
        qwen = dataclasses.replace(answerer, processor=processor)
        sizes = [within(qwen, most).processor.size_of(1080, 1920) for most in (128 * 28 * 28, 512 * 28 * 28)]
        for (height, width), most in zip(sizes, (128 * 28 * 28, 512 * 28 * 28), strict=True):
            assert 0.4 * most < height * width <= most and height / width == pytest.approx(1080 / 1920, rel=0.2)
    small = dataclasses.replace(answerer, processor=QwenProcessor(unit=28, max_pixels=50_000, min_pixels=10_000))
    height, width = within(small, 512 * 28 * 28).processor.size_of(1080, 1920)
    assert height * width <= 50_000
