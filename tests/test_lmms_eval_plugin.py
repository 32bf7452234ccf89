"""The plugin inside the real lmms-eval: registration, and what a wrapped model gets to see."""

import json

import numpy as np
import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install lmms-eval")

from lmms_eval import models
from lmms_eval.api.instance import Instance
from lmms_eval.models.model_utils.load_video import read_video

from tspo_jax import lmms_eval_plugin
from tspo_jax.data.decode import Video

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


def test_mistakes(golden, index_file):
    with pytest.raises(ValueError, match="give either frame_idx"):
        make(model="dummy")
    with pytest.raises(ValueError, match="frame_idx needs benchmark"):
        make(model="dummy", frame_idx=index_file)
    with pytest.raises(ValueError, match="dummy has the other interface of lmms-eval; use --model=tspo$"):
        make("tspo_chat", model="dummy", frame_idx=index_file, benchmark="mlvu")
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
