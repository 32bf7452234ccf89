"""Preference training on a tiny store: exact resuming, the same on a mesh, reference kept, clear errors."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_store import LONG, SHORT, make_store

from tspo_jax import config as cfg
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.data.questions import QuestionError
from tspo_jax.models.layers import merge_params
from tspo_jax.runs.metrics import read_rows
from tspo_jax.runs.preemption import Preemption
from tspo_jax.runs.run_folder import RunFolderError, read_part
from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo import trained
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.train_answerer import train

pytestmark = pytest.mark.usefixtures("compile_once")
PAIRS = [
    {"id": "a", "video": LONG, "prompt": "<image>\nWhat is shown?", "chosen": "A number.", "rejected": "Nothing"},
    {"id": "b", "video": SHORT, "prompt": "Which?\nA. one\nB. two", "chosen": "B", "rejected": "A", "answer": "B"},
    {"id": "c", "video": LONG, "prompt": "Which?\nA. one\nB. two", "chosen": "A", "rejected": "B", "answer": "A"},
    {"id": "d", "video": LONG, "prompt": "And then?", "chosen": "It counts on.", "rejected": "The end"},
]
SHAPES_NOTHING = ("seconds/", "compilations", "device_idle", "steps_per_second")


@pytest.fixture(scope="module")
def world(golden, tmp_path_factory):
    """A config of 4 steps of 2 pairs each, on one device."""
    folder = tmp_path_factory.mktemp("world")
    picks = {"chosen": [[LONG, 3], [LONG, 4]], "rejected": [[LONG, 9]]}
    rows = [row | {"picks": picks} for row in PAIRS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tpo_config.default()
    config.answerer.folder = str(golden / "llava_video_grid")
    config.answerer.dtype = "float32"
    config.answerer.max_new_tokens = 2
    config.data.store = str(make_store(folder, golden))
    config.data.pairs = config.data.held_out = str(folder / "pairs.jsonl")
    config.data.num_frames = 3
    config.data.answer_buckets = (16,)
    config.batch_size, config.num_steps, config.checkpoint_every = 2, 4, 2
    config.optimizer.lora_rate = config.optimizer.full_rate = 1e-2
    config.lora.r = 2
    config.held_out.every, config.held_out.num_pairs = 4, 3
    return config


def config_of(world, **changes) -> TpoConfig:
    changed = world.copy_and_resolve_references()
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        (changed[group] if group else changed)[field] = value
    return cfg.read(changed, TpoConfig)


def run(config, run_dir, num_devices=1) -> list[dict]:
    """Trains; the rows of metrics, without what depends on time."""
    assert train(config, run_dir, jax.devices()[:num_devices])
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{name: x for name, x in row.items() if not name.startswith(SHAPES_NOTHING)} for row in rows]


@pytest.fixture(scope="module")
def lora_run(world, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("lora")
    return run_dir, run(config_of(world), run_dir)


def test_what_a_run_says(lora_run):
    _, rows = lora_run
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[0]["losses/dpo"] == pytest.approx(np.log(2)) and steps[0]["rewards/accuracies"] == 0
    assert steps[0]["learning_rate"] == 0 and steps[1]["learning_rate"] == pytest.approx(1e-2)
    assert steps[-1]["rewards/margins"] > 0.01
    (evaluated,) = [row for row in rows if "eval_loss" in row]
    assert evaluated["step"] == 4 and evaluated["eval_rewards/margins"] > 0


def test_resuming_is_exact(world, lora_run, tmp_path, monkeypatch, capfd):
    """Stopped by the signal after two steps, and started again. That pairs are held out and trained on is said."""
    whole_dir, whole = lora_run
    config = config_of(world)
    monkeypatch.setattr(Preemption, "must_stop", lambda self, done: done == 2)
    assert not train(config, tmp_path, jax.devices()[:1])
    assert "note: 4 of the 4 held-out questions are trained on as well (about" in " ".join(
        capfd.readouterr().err.split()
    )
    monkeypatch.undo()
    assert run(config, tmp_path) == whole
    a, b = (read_part(folder, trained.PART) for folder in (whole_dir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_other_content_is_refused_by_name(world, lora_run, tmp_path):
    """The same pairs in another file are the same run; other pairs, or most of them bad, are not."""
    run_dir, rows = lora_run
    whole = [json.loads(line) for line in Path(world.data.pairs).read_text().splitlines()]
    path = tmp_path / "moved.json"
    path.write_text(json.dumps(whole))
    assert run(config_of(world, data__pairs=str(path)), run_dir) == rows
    path.write_text(json.dumps([*whole[:3], whole[3] | {"chosen": "It goes on."}]))
    with pytest.raises(RunFolderError, match="began with other content of config.data.pairs: "):
        run(config_of(world, data__pairs=str(path)), run_dir)
    path.write_text(json.dumps([*whole, {}]))
    with pytest.raises(QuestionError, match=r"1 bad question\(s\) of 5"):
        run(config_of(world, data__pairs=str(path)), tmp_path / "run")


@pytest.mark.slow
def test_full_training_on_a_mesh_with_a_stored_reference(world, tmp_path):
    """One device, and data 2 x model 2 with accumulation; the second uses the reference of the first."""
    stored = tmp_path / "reference.jsonl"
    changes = {"full": True, "reference__file": str(stored), "held_out__every": 0, "num_steps": 2}
    one = run(config_of(world, **changes, batch_size=4), tmp_path / "one")
    assert len(stored.read_text().splitlines()) == 1 + len(PAIRS)
    before = stored.read_bytes()
    axes = (("data", 2), ("model", 2))
    many = run(config_of(world, **changes, batch_size=4, accumulate=2, mesh__axes=axes), tmp_path / "many", 4)
    assert stored.read_bytes() == before
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"rewards/accuracies"}:  # at the first step of rounding alone
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), name


@pytest.mark.slow
def test_reference_of_other_weights_is_refused(world, tmp_path):
    stored = tmp_path / "reference.jsonl"
    changes = {"reference__mode": "stored", "reference__file": str(stored), "held_out__every": 0, "num_steps": 2}
    run(config_of(world, **changes), tmp_path / "run")
    with pytest.raises(ValueError, match="another reference.*\n.*num_frames: 3 there, 2 here"):
        train(config_of(world, **changes, data__num_frames=2), tmp_path / "other", jax.devices()[:1])
    rows = [json.loads(line) for line in stored.read_text().splitlines()]
    for row in rows[1:]:
        row["chosen"] -= 5
    stored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="rewards are not 0 at the first step: .*chosen answers differ"):
        train(config_of(world, **changes), tmp_path / "again", jax.devices()[:1])


def text_logits(answerer, ids) -> np.ndarray:
    language = merge_params(answerer.graphdef, answerer.params).language_model
    hidden, _ = language(language.embed_tokens(ids), np.arange(ids.shape[1])[None])
    return np.asarray(language.logits(hidden))


@pytest.mark.slow
def test_full_run_loads_as_a_folder_and_in_hugging_faces_class(world, golden, tmp_path):
    """Exported by the command; its language model in torch gives the same logits."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = config_of(world, full=True, held_out__every=0, num_steps=2)
    run(config, tmp_path / "run")
    command = [sys.executable, "-m", "tspo_jax.export", f"--checkpoint={tmp_path / 'run'}"]
    done = subprocess.run([*command, f"--output={tmp_path / 'out'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "lost by rounding to bfloat16" in done.stderr
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(golden / "llava_video_grid" / "model.safetensors")
    assert tensors.keys() == base.keys() and {x.dtype for x in tensors.values()} == {np.dtype("bfloat16")}
    description = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**description)).float()
    own = {name: torch.tensor(x.astype(np.float32)) for name, x in tensors.items() if name in theirs.state_dict()}
    theirs.load_state_dict(own, strict=True)
    answerer = load_answerer(tmp_path / "out")
    ids = np.arange(3, 40)[None]
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(text_logits(answerer, ids), expected, atol=1e-4)


@pytest.mark.slow
def test_adapter_where_an_answerer_is_named(world, lora_run, golden, tmp_path):
    """The commands answer and evaluate's loader take it; a folder of another model is refused."""
    run_dir, _ = lora_run
    trained.write_adapter(run_dir, tmp_path / "adapter")
    np.savez(tmp_path / "frames.npz", frames=np.zeros((2, 28, 28, 3), np.uint8))
    base = golden / "llava_video_grid"
    command = [sys.executable, "-m", "tspo_jax.answer", f"--answerer={base}", f"--frames={tmp_path / 'frames.npz'}"]
    command += ["--question=Why?", "--max_new_tokens=2"]
    answers = [
        subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], [f"--adapter={tmp_path / 'adapter'}"])
    ]
    assert json.loads(answers[0])["token_ids"] != json.loads(answers[1])["token_ids"]
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        load_answerer(base, adapter=base)
    with pytest.raises(ValueError, match="merge it first"):
        train(config_of(world, answerer__adapter=str(tmp_path / "adapter")), tmp_path / "run", jax.devices()[:1])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"optimizer__lora_rate": 0.0}, "learning_rate is 0.0: nothing would be learnt"),
        ({"num_steps": 1}, "warm-up takes 1 of 1 steps"),
        ({"data__max_tokens": 130}, "more than the 130 of the context; 2 frames would fit"),
        ({"preference__beta": 0.0}, "beta is 0.0"),
        ({"batch_size": 3, "accumulate": 3, "mesh__axes": (("data", 2), ("model", 1))}, "batch_size / accumulate is 1"),
        ({"lora__targets": ("q_proj", "lm_head")}, "lora.targets names lm_head"),
        ({"data__held_out": ""}, "held_out names no pairs"),
    ],
)
def test_bad_settings_are_refused(world, tmp_path, changes, said):
    num_devices = 2 if "mesh__axes" in changes else 1
    with pytest.raises(ValueError, match=said):
        train(config_of(world, **changes), tmp_path, jax.devices()[:num_devices])
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "row, said",
    [
        ({"video": "none.mp4"}, "pair x: video none.mp4 is not in .*; run python -m tspo_jax.predecode"),
        ({"shown": [[SHORT, 99]]}, "shows frame 99 of short.mp4"),
        ({"rejected": "B"}, "rejected: is equal to chosen"),
        ({"chosen": " "}, "chosen: must be a text that is not empty"),
    ],
)
def test_bad_pairs_are_listed(world, tmp_path, row, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIRS[1] | {"id": "x"} | row) + "\n")
    with pytest.raises(ValueError, match=said):
        train(config_of(world, data__pairs=str(path), held_out__every=0), tmp_path / "run", jax.devices()[:1])
