"""The plugin inside the real lmms-eval: registration, and what wrapped models get to see, its own ones among them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install lmms-eval")

from lmms_eval import models
from lmms_eval.api.instance import Instance
from lmms_eval.models.model_utils.load_video import read_video
from safetensors.numpy import load_file

from tspo_jax import lmms_eval_plugin
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.decode import Video
from tspo_jax.models.layers import merge_params

FRAMES = [0, 100, 275, 975]


@pytest.fixture
def index_file(tmp_path):
    rows = [{"question_id": "q0", "frame_idx": FRAMES}, {"question_id": "far", "frame_idx": [5000]}]
    (tmp_path / "idx.json").write_text(json.dumps(rows))
    return tmp_path / "idx.json"


@pytest.fixture(autouse=True)
def registered():
    for manifest in lmms_eval_plugin.manifests():
        models.MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)


def requests(model, golden, *questions):
    docs = [{"question_id": q, "question": "Who opens the door?\n(A) x\n(B) y"} for q in questions]
    model.task_dict["mlvu"] = {"test": docs}
    visual = lambda document: [str(golden / "tspo_agent.mp4")]  # noqa: E731
    return [
        Instance(
            request_type="generate_until",
            arguments=("Why?", {}, visual, i, "mlvu", "test"),
            idx=0,
            metadata={"task": "mlvu", "doc_id": i, "repeats": 1},
        )
        for i in range(len(docs))
    ]


def seen_by(model, monkeypatch):
    """Video files that the wrapped model opens."""
    paths = []
    monkeypatch.setattr(type(model.model), "_touch_visual", lambda self, visual: paths.append(visual) or 0.0)
    return paths


def make(name="tspo", **arguments):
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    return models.get_model(name, force_simple=name == "tspo").create_from_arg_string(text)


def test_a_wrapped_model_sees_the_frames_of_the_index_file(golden, index_file, monkeypatch):
    model = make(model="dummy", read_bytes=1, response="B", frame_idx=index_file, benchmark="mlvu")
    paths = seen_by(model, monkeypatch)
    assert model.generate_until(requests(model, golden, "q0")) == ["B"]
    (path,) = paths
    clip, video = Video(path), Video(golden / "tspo_agent.mp4")
    assert (clip.num_frames, clip.fps) == (4, 1.0)
    np.testing.assert_array_equal(list(Video(path, "pyav").frames(range(4))), list(video.frames(FRAMES)))
    # lmms-eval's own reader takes all of them.
    assert len(read_video(path, num_frm=4)) == 4


def test_a_wrapped_model_sees_the_frames_of_an_agent(golden, monkeypatch):
    model = make(model="dummy", read_bytes=1, agent=golden / "tspo_agent", num_frames=5)
    paths = seen_by(model, monkeypatch)
    model.generate_until(requests(model, golden, "a", "b"))
    assert paths[0] == paths[1] and Video(paths[0]).num_frames == 5


def test_chat_messages(golden, index_file):
    model = make(model="dummy", frame_idx=index_file, benchmark="mlvu")
    path = str(golden / "tspo_agent.mp4")
    content = [{"type": "video", "url": path}, {"type": "text", "text": "see a.mp4"}]
    (message,) = model._with_clips([{"role": "user", "content": content}], {"question_id": "q0"})
    video, text = message["content"]
    assert text == content[1] and video["url"] != path and Video(video["url"]).num_frames == 4


CHAT = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' if part['type'] == 'video' else part['text'] }}{% endfor %}{% endif -%}
<|im_end|>
{% endfor %}<|im_start|>assistant
"""
LANGUAGE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=280)
LANGUAGE |= dict(num_key_value_heads=2, eos_token_id=256, bos_token_id=None)


def tokenizer(transformers, golden, *tokens):
    """The golden byte-level tokenizer with more tokens, and their ids."""
    found = transformers.Qwen2Tokenizer.from_pretrained(golden / "llava_video_grid")
    found.add_special_tokens({"additional_special_tokens": list(tokens)})
    found.chat_template = CHAT
    return found, found.convert_tokens_to_ids(list(tokens))


def write_qwen(folder, golden, transformers):
    """A small random Qwen2.5-VL; more arguments of lmms-eval's class for it."""
    pytest.importorskip("qwen_vl_utils")
    words, (start, end, image, video) = tokenizer(
        transformers, golden, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=64)
    ids = dict(vision_start_token_id=start, vision_end_token_id=end, image_token_id=image, video_token_id=video)
    config = transformers.Qwen2_5_VLConfig(
        text_config=LANGUAGE | {"rope_parameters": rope}, vision_config=vision | {"fullatt_block_indexes": [1]}, **ids
    )
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    images, videos = transformers.Qwen2VLImageProcessor(), transformers.Qwen2VLVideoProcessor()
    transformers.Qwen2_5_VLProcessor(images, words, videos, chat_template=CHAT).save_pretrained(folder)
    return dict(max_num_frames=4, min_pixels=28**2, max_pixels=224**2)


def write_llava(folder, golden, transformers):
    """A small random LLaVA-OneVision in the format of llava-hf, which LLaVA-Video has there too."""
    words, (image, video) = tokenizer(transformers, golden, "<image>", "<video>")
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlavaOnevisionConfig(
        text_config=LANGUAGE | {"model_type": "qwen2"},
        vision_config=vision | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
        image_token_id=image,
        video_token_id=video,
    )
    transformers.LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size),
        words,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHAT,
    ).save_pretrained(folder)
    return dict(max_frames_num=4, dtype="float32")


@pytest.mark.parametrize(
    ("name", "wrapped", "write"),
    [("tspo", "qwen2_5_vl", write_qwen), ("tspo_chat", "qwen2_5_vl", write_qwen), ("tspo", "llava_hf", write_llava)],
)
def test_models_of_lmms_eval_answer_from_the_chosen_frames(
    golden, index_file, tmp_path, monkeypatch, name, wrapped, write
):
    """Its real classes, with small random weights on the CPU: their processors get these frames, in order."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    import transformers

    torch.manual_seed(0)
    options = write(tmp_path / "model", golden, transformers)
    files = dict(frame_idx=index_file, benchmark="mlvu", pretrained=tmp_path / "model")
    model = make(name, model=wrapped, device="cpu", device_map="cpu", **files, **options)
    assert type(model.model).__module__.startswith("lmms_eval.models.")
    (request,) = requests(model, golden, "q0")
    if name == "tspo_chat":
        content = [{"type": "video", "url": str(golden / "tspo_agent.mp4")}, {"type": "text", "text": "Why?"}]
        messages = lambda document: [{"role": "user", "content": content}]  # noqa: E731
        request.arguments = ("Why?", messages, {"max_new_tokens": 2}, 0, "mlvu", "test")
    else:
        request.arguments = ("Why?", {"max_new_tokens": 2}, *request.arguments[2:])
    shown = []
    processor = type(getattr(model.model, "processor", None) or model.model._image_processor)
    call = processor.__call__
    monkeypatch.setattr(
        processor,
        "__call__",
        lambda self, *args, **kwargs: shown.append(kwargs["videos"]) or call(self, *args, **kwargs),
    )
    (answer,) = model.generate_until([request])
    assert isinstance(getattr(answer, "text", answer), str)
    ((frames,),) = shown
    frames = np.asarray(frames, np.float32)
    frames = frames if frames.shape[-1] == 3 else frames.transpose(0, 2, 3, 1)
    H, W = frames.shape[1:3]
    every_second = range(0, 1000, 25)
    candidates = [
        np.asarray(Image.fromarray(frame).resize((W, H)), np.float32)
        for frame in Video(golden / "tspo_agent.mp4").frames(every_second)
    ]
    nearest = [int(np.argmin([np.abs(frame - other).mean() for other in candidates])) for frame in frames]
    assert [every_second[i] for i in nearest] == FRAMES


def test_adapters_change_the_wrapped_model_as_they_change_ours(golden, tmp_path):
    """The golden adapters on a torch model, by peft, give the logits of our answerer with them."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    base = golden / "llava_video_grid"
    network = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**json.loads((base / "config.json").read_text())))
    tensors = load_file(base / "model.safetensors")
    own = {name: torch.tensor(tensors[name].astype(np.float32)) for name in network.state_dict()}
    network.load_state_dict(own)
    wrapped, ids = SimpleNamespace(_model=network.float().eval()), np.arange(3, 40)[None]
    lmms_eval_plugin.put_adapter(wrapped, str(golden / "lora_peft"))
    with torch.no_grad():
        found = wrapped._model(torch.tensor(ids)).logits.numpy()
    for adapter, is_same in (("", False), (golden / "lora_peft", True)):
        answerer = load_answerer(base, adapter=adapter)
        language = merge_params(answerer.graphdef, answerer.params).language_model
        hidden, _ = language(language.embed_tokens(ids), np.arange(ids.shape[1])[None])
        assert np.allclose(found, language.logits(hidden), atol=1e-4) == is_same
    other = SimpleNamespace(_model=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="(?i)target modules"):
        lmms_eval_plugin.put_adapter(other, str(golden / "lora_peft"))


def test_mistakes(golden, index_file):
    with pytest.raises(ValueError, match="give either frame_idx"):
        make(model="dummy")
    with pytest.raises(ValueError, match="Dummy.* holds no torch model"):
        make(model="dummy", frame_idx=index_file, benchmark="mlvu", adapter=golden / "lora_peft")
    with pytest.raises(ValueError, match="frame_idx needs benchmark"):
        make(model="dummy", frame_idx=index_file)
    with pytest.raises(ValueError, match="dummy has the other interface of lmms-eval; use --model=tspo$"):
        make("tspo_chat", model="dummy", frame_idx=index_file, benchmark="mlvu")
    twice = index_file.with_name("twice.jsonl")
    twice.write_text('{"question_id": "q0", "frame_idx": [0]}\n' * 2)
    with pytest.raises(ValueError, match="question q0 has a second selection"):
        make(model="dummy", frame_idx=twice, benchmark="mlvu")
    model = make(model="dummy", read_bytes=1, frame_idx=index_file, benchmark="mlvu")
    with pytest.raises(ValueError, match="question far: frame 5000 was chosen"):
        model.generate_until(requests(model, golden, "far"))
    with pytest.raises(ValueError, match="no row for question lost"):
        model.generate_until(requests(model, golden, "lost"))


def test_the_installed_package_registers_it():
    from importlib.metadata import entry_points

    found = [entry for entry in entry_points(group="lmms_eval.models") if entry.name == "tspo"]
    if not found:
        pytest.skip("tspo_jax is not installed as a package here")
    assert {manifest.model_id for manifest in found[0].load()()} == {"tspo", "tspo_chat"}
