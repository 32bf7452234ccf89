"""Training on a tiny store: what it writes, exact resuming, no recompilation, the same on every mesh, clear errors."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_store import LONG, SHORT, make_store

from tspo_jax import config as cfg
from tspo_jax import train as training
from tspo_jax.answering import shapes
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_agent
from tspo_jax.data.questions import read_questions
from tspo_jax.evaluation import run as evaluate
from tspo_jax.models.layers import split_params
from tspo_jax.models.temporal_agent import TemporalAgent
from tspo_jax.runs.metrics import read_rows
from tspo_jax.runs.run_folder import RunFolderError, find_checkpoint
from tspo_jax.runs.training_log import NotFiniteError, TrainingLog
from tspo_jax.selection.scoring import read_agent
from tspo_jax.tspo import environment

pytestmark = pytest.mark.usefixtures("compile_once")
NUM_STEPS = 6
TIMES = ("seconds/", "compilations", "device_idle", "steps_per_second")


@pytest.fixture(scope="module")
def config(golden, tmp_path_factory):
    """6 steps of 8 questions, half of them needle samples, on two videos of 40 and 5 seconds."""
    folder = tmp_path_factory.mktemp("world")
    questions = folder / "questions.jsonl"
    rows = [
        {
            "video": (LONG, SHORT)[i % 2],
            "original_question": f"<image>\nWhich number is shown at moment {i}?\nA. one\nB. two\nC. three\nD. four",
            "solution": "<answer>b</answer>",
            "type": ("general", "specific")[i // 2 % 2],
        }
        for i in range(32)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = cfg.default()
    config.batch_size = 8
    config.num_steps = NUM_STEPS
    config.agent.clip = str(golden / "tspo_agent")
    config.answerer.folder = str(golden / "llava_video_grid")
    config.answerer.dtype = "float32"
    config.answerer.max_new_tokens = 2
    config.data.store = str(make_store(folder, golden))
    config.data.questions = str(questions)
    config.data.min_frames, config.data.max_frames = 0, 40
    config.data.buckets = (40,)
    config.data.general.k = 2
    config.data.specific.update(k=3, group_frames=5, max_true_groups=3, distractor_groups=4, max_distractor_groups=4)
    config.policy.group_size = 4
    config.policy.tau_start, config.policy.tau_end = 0.5, 0.2  # unlike tau 0.025, draws differ on these features
    config.checkpoint_every = 3
    return cfg.read(config)


def run(config, folder, num_devices=1):
    training.train(config, folder, jax.devices()[:num_devices])
    return read_rows(folder / "metrics.jsonl"), read_agent(folder)


def without_times(rows):
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, *run(config, folder)


def test_what_a_run_measures(config, undisturbed):
    folder, rows, _ = undisturbed
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    kinds = {name.split("/")[1] for row in rows for name in row if name.startswith("reward/")}
    assert kinds == {"general", "specific"}
    for step, row in enumerate(rows):
        kind = "specific" if "reward/specific" in row else "general"
        assert row[f"accuracy/{kind}"] <= 1
        assert row["loss"] == pytest.approx(0, abs=1e-6)
        assert row["tau"] == pytest.approx(0.5 - 0.05 * step)
        assert row["learning_rate"] == pytest.approx(5e-4 * (1 - step / NUM_STEPS))
        assert {f"seconds/{part}" for part in ("data", "sample", "fetch", "answer", "reward", "update")} <= row.keys()
        assert 0 <= row["device_idle"] < 1 and row["steps_per_second"] > 0
        assert {"advantage_std", "dead_groups", "unparsed", "grad_norm", "score_entropy", "unique_frames"} <= row.keys()
        if kind == "specific":
            assert row["reward/specific"] == pytest.approx(row["accuracy/specific"] + row["location/specific"])
            assert row["grad_norm"] > 0 and row["dead_groups"] < 1
            assert row["unique_frames"] <= 12
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


def test_no_compilation_after_the_first_step_of_each_kind(undisturbed):
    counts, seen = {}, set()
    for before, row in zip([None, *undisturbed[1]], undisturbed[1], strict=False):
        kind = "specific" if "reward/specific" in row else "general"
        if kind in seen and before:
            assert row["compilations"] == before["compilations"], f"step {row['step']} compiled again"
        seen.add(kind)
        counts[kind] = counts.get(kind, 0) + 1
    assert min(counts.values()) >= 2, "each kind came more than once"


def test_the_agent_moved(golden, undisturbed):
    before, after = load_agent(golden / "tspo_agent")[1], undisturbed[2]
    change = np.abs(np.asarray(before["mlp"]["linear_1"]["kernel"]) - after["mlp"]["linear_1"]["kernel"]).max()
    assert 1e-4 < change < 1e-2


@pytest.mark.slow
def test_what_a_run_computes_from_is_bound_by_content(config, tmp_path):
    """Other questions under the same path are refused by name; the same ones under another path are not."""

    def asking(path):
        return dataclasses.replace(config, num_steps=2, data=dataclasses.replace(config.data, questions=str(path)))

    questions, moved = tmp_path / "questions.jsonl", tmp_path / "elsewhere" / "moved.json"
    shutil.copy(config.data.questions, questions)
    moved.parent.mkdir()
    moved.write_text(json.dumps([json.loads(line) for line in questions.read_text().splitlines()]))
    first, _ = run(asking(questions), tmp_path / "run")
    assert run(asking(moved), tmp_path / "run")[0] == first
    moved.write_text(moved.read_text().replace("at moment 7", "at the moment 7"))
    with pytest.raises(RunFolderError, match=r"began with other content of config.data.questions: "):
        run(asking(moved), tmp_path / "run")


@pytest.mark.slow
def test_an_adapter_is_bound_by_content(config, golden, tmp_path):
    """Another one under the same path is refused by name; the same one under another path is not."""

    def with_adapter(folder):
        return dataclasses.replace(
            config, num_steps=1, answerer=dataclasses.replace(config.answerer, adapter=str(folder))
        )

    folder, moved = (shutil.copytree(golden / "lora_peft", tmp_path / name) for name in ("adapter", "moved"))
    first, _ = run(with_adapter(folder), tmp_path / "run")
    assert run(with_adapter(moved), tmp_path / "run")[0] == first
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * x for name, x in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(RunFolderError, match=r"began with other content of config.answerer.adapter: "):
        run(with_adapter(folder), tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"answerer.adapter: \S+moved there,  here"):
        run(with_adapter(""), tmp_path / "run")


@pytest.mark.slow
def test_resuming_is_exact(config, undisturbed, tmp_path, monkeypatch):
    """Stopped after step 5, started again: continues from the checkpoint of step 3 as if nothing had happened."""
    picked = []

    def recording(picks, original=environment.unique_frames):
        picked.append(picks)
        return original(picks)

    def stop_after_5(self, measured, original=TrainingLog.start_row):
        original(self, measured)
        if measured.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(environment, "unique_frames", recording)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLog, "start_row", stop_after_5)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4
    rows, agent = run(config, tmp_path)
    assert without_times(rows) == without_times(undisturbed[1])
    jax.tree.map(np.testing.assert_array_equal, agent, undisturbed[2])
    assert len(picked) == 8, "steps 4 and 5 were done twice"
    np.testing.assert_array_equal(picked[3], picked[5])
    np.testing.assert_array_equal(picked[4], picked[6])


def test_a_finished_run_says_so(config, undisturbed, capsys, monkeypatch):
    """And every run lists the bad lines of its question file."""
    bad = ["questions.jsonl:33: line: not valid json"]
    monkeypatch.setattr(training, "read_questions", lambda path, **_: (read_questions(path)[0], bad))
    rows, agent = run(config, undisturbed[0])
    said = capsys.readouterr().err
    assert "all 6 steps are done" in said and f"left out: {bad[0]}" in said
    assert rows == undisturbed[1]


def test_a_run_of_another_config_is_refused(config, undisturbed):
    other = dataclasses.replace(config, seed=1, optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0))
    with pytest.raises(RunFolderError, match=r"(?s)seed: 42 there, 1 here.*optimizer.learning_rate: 0.0005 there, 1.0"):
        run(other, undisturbed[0])


@pytest.fixture(scope="module")
def needles(config, tmp_path_factory):
    """Needle samples alone (few programs to compile on each mesh), and how they go on one device."""
    folder = tmp_path_factory.mktemp("needles")
    lines = Path(config.data.questions).read_text().splitlines(keepends=True)
    (folder / "needles.jsonl").write_text("".join(line for line in lines if '"specific"' in line))
    data = dataclasses.replace(config.data, questions=str(folder / "needles.jsonl"))
    config = dataclasses.replace(config, data=data)
    return config, *run(config, folder / "run")


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 4)])
@pytest.mark.slow
def test_same_on_every_mesh(needles, tmp_path, shape):
    config, expected_rows, expected_agent = needles
    mesh = dataclasses.replace(
        config.mesh, axes=(("data", shape[0]), ("model", shape[1])), split_over_data=shape == (2, 4)
    )
    rows, agent = run(dataclasses.replace(config, mesh=mesh), tmp_path, num_devices=shape[0] * shape[1])
    for row, expected in zip(without_times(rows), without_times(expected_rows), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), agent, expected_agent)


def test_shares_of_batches():
    config = cfg.default()
    assert training.loader_config(cfg.read(config)).mixture is None
    config.data.specific.share, config.data.general.share = 3, 1
    assert training.loader_config(cfg.read(config)).mixture == {"general": 1, "specific": 3}


def test_bad_input_is_named(config, tmp_path):
    wide = split_params(TemporalAgent(32, rngs=nnx.Rngs(0)))[1]
    weights.save_params(tmp_path / "wide", wide, weights.agent_format(weights.SELECTOR))
    (tmp_path / "wide" / "config.json").write_text("{}")

    def change(field, **values):
        return dataclasses.replace(config, **{field: dataclasses.replace(getattr(config, field), **values)})

    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(config.data.questions).read_text() + "{broken\n")

    for bad, message in (
        (change("data", questions=str(broken), strict=True), "broken.jsonl:33: line: not valid json"),
        (dataclasses.replace(config, batch_size=3), "batch_size is 3: it must be a multiple of mesh axis data"),
        (change("mesh", axes=(("data", 3), ("model", 1))), "does not make 2 devices"),
        (change("data", buckets=(8,)), "more than the largest of"),
        (change("policy", random_k=(2, 0)), "config.policy.random_k is .2, 0.: at least one frame"),
        (change("policy", random_k=(2, 26)), "26 frames are to be picked, but there may be only"),
        (change("policy", advantage="ppo"), "objective.advantage is 'ppo', not one of grpo"),
        (change("agent", kind="span"), "config.agent.kind is span, but config.policy.warm_start_steps is 0"),
        (change("agent", clip=str(tmp_path)), "holds no ..safetensors file"),
        (change("answerer", template="x"), "template is 'x', not one of"),
        (
            change("agent", init=str(tmp_path / "wide")),
            "an agent of width 32, but agent.clip gives features of width 64",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            training.train(bad, tmp_path / "run", jax.devices()[:2])
    assert not (tmp_path / "run").exists(), "a run that never started leaves nothing"


@pytest.mark.slow
def test_command_line_errors_are_one_line(tmp_path):
    command = [sys.executable, "-m", "tspo_jax.train", f"--run_dir={tmp_path}"]
    result = subprocess.run(
        [*command, "--config=configs/toy.py", "--config.optimizer.learnin_rate=1"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.strip() == ("error: config.optimizer.learnin_rate does not exist; did you mean learning_rate?")


@pytest.mark.slow
def test_everything_beyond_the_paper_at_once(config, tmp_path):
    """Two steps on labels, four of RL with random K, soft rewards, inner steps and a KL: it runs, and resumes."""
    policy = dataclasses.replace(
        config.policy, random_k=(2, 4), inner_steps=2, warm_start_steps=2, kl=0.01, entropy=0.001, dead_groups="skip",
        advantage="leave_one_out", log_prob="plackett_luce",
    )  # fmt: skip
    general, specific = (
        dataclasses.replace(kind, probability=1.0, coverage=0.1) for kind in (config.data.general, config.data.specific)
    )
    data = dataclasses.replace(config.data, general=general, specific=specific)
    agent = dataclasses.replace(config.agent, kind="question_aware")
    answerer = dataclasses.replace(config.answerer, option_text="{letter}")
    config = dataclasses.replace(config, policy=policy, data=data, agent=agent, answerer=answerer, num_steps=4)
    config = dataclasses.replace(config, profile_steps=1)
    rows, params = run(config, tmp_path)
    assert ["label_loss" in row for row in rows] == [True, True, False, False]
    for row in rows[2:]:
        kind = "specific" if "reward/specific" in row else "general"
        assert 0 < row[f"probability/{kind}"] < 1 and 0 < row[f"coverage/{kind}"] <= 1 and row["dead_groups"] == 0
        assert row["kl"] >= 0 and 0 <= row["clipped"] <= 1 and row["grad_norm"] > 0
    assert abs(params["modulation"]["kernel"]).max() > 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    graphdef, read = evaluate.read_agent(config, tmp_path)
    assert graphdef == load_agent(config.agent.clip, kind="question_aware")[0]
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_goes_on(config, undisturbed, tmp_path, monkeypatch):
    def terminate_in_step_2(self, measured, original=TrainingLog.start_row):
        original(self, measured)
        if measured.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLog, "start_row", terminate_in_step_2)
        assert not training.train(config, tmp_path, jax.devices()[:1])
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert find_checkpoint(tmp_path).name == "2"
    rows, agent = run(config, tmp_path)
    assert without_times(rows) == without_times(undisturbed[1])
    jax.tree.map(np.testing.assert_array_equal, agent, undisturbed[2])


@pytest.mark.slow
def test_a_step_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch):
    """Its batch is saved, and no checkpoint is of it."""

    def broken(config, rows, *args, original=environment.measure):
        return {name: x * np.float32(np.nan) for name, x in original(config, rows, *args).items()}

    monkeypatch.setattr(environment, "measure", broken)
    with pytest.raises(NotFiniteError, match="step 1: .*grad_norm.* not finite; its batch is in"):
        run(dataclasses.replace(config, checkpoint_every=1), tmp_path)
    (path,) = tmp_path.glob("not_finite_step_1*.npz")
    assert np.load(path)["features"].shape == (8, 40, 64)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_resuming_on_more_devices(needles, tmp_path):
    """Stopped on one device, continued on eight: the same to float tolerance."""
    config, expected_rows, expected_agent = needles
    run(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    rows, agent = run(config, tmp_path, num_devices=8)
    assert len(rows) == NUM_STEPS
    for row, expected in zip(without_times(rows), without_times(expected_rows), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), agent, expected_agent)


@pytest.mark.slow
def test_questions_answered_in_parts(config, undisturbed, tmp_path):
    """The same draws, answers and parameters, whatever is fetched meanwhile."""
    config = dataclasses.replace(config, answerer=dataclasses.replace(config.answerer, question_chunk=2))
    rows, agent = run(config, tmp_path)
    assert without_times(rows) == without_times(undisturbed[1])
    jax.tree.map(np.testing.assert_array_equal, agent, undisturbed[2])


@pytest.mark.slow
def test_one_long_question_does_not_set_the_length_of_all_prompts(config, tmp_path, monkeypatch, capsys):
    """Two lengths, told with the question and its cost, and the same run as with one."""
    rows = [json.loads(line) for line in Path(config.data.questions).read_text().splitlines()]
    rows = [row for row in rows if row["type"] == "general"]
    rows[0]["original_question"] = rows[0]["original_question"].replace("B. two", "B. two" + " or more" * 60)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dataclasses.replace(config.data, questions=str(questions))
    config = dataclasses.replace(config, num_steps=4, batch_size=4, data=data)
    lengths = []

    def recording(self, params, frames, index, prompt_ids, *args, original=Rollout.__call__):
        lengths.append(prompt_ids.shape[-1])
        return original(self, params, frames, index, prompt_ids, *args)

    monkeypatch.setattr(Rollout, "__call__", recording)
    found, agent = run(config, tmp_path / "few")
    few = lengths.copy()
    assert few.count(max(few)) == 1 and len(set(few)) == 2, "an epoch is four batches"
    said = " ".join(capsys.readouterr().err.split())
    assert f"prompts of 1 general questions are padded to {max(few)} tokens of text, the shortest to {min(few)}" in said
    assert re.search(r"prefills\d\.\d\dtimesasmuch\(\S*questions.jsonl:1\)", said.replace(" ", ""))  # it wraps
    monkeypatch.setattr(shapes, "ladder", partial(shapes.ladder, rungs=1))
    lengths.clear()
    rows, one = run(config, tmp_path / "one")
    assert set(lengths) == {max(few)}
    jax.tree.map(np.testing.assert_array_equal, agent, one)
    assert without_times(rows) == without_times(found)


@pytest.mark.slow
def test_one_step_stale_resumes_exactly(needles, tmp_path, monkeypatch):
    """Picks come from the agent before the last update: first as without, then not; a checkpoint has that agent."""
    config, plain, _ = needles
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, stale_steps=1))
    rows, agent = run(config, tmp_path / "whole")
    same = ("location/specific", "unique_frames")
    assert all(rows[0][name] == plain[0][name] for name in same), "the first agent drew the first picks"
    assert any(row[name] != other[name] for row, other in zip(rows, plain, strict=True) for name in same)
    assert all(row["clipped"] >= 0 for row in rows) and len(rows) == NUM_STEPS

    def stop_after_5(self, measured, original=TrainingLog.start_row):
        original(self, measured)
        if measured.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLog, "start_row", stop_after_5)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "cut")
    resumed, resumed_agent = run(config, tmp_path / "cut")
    assert without_times(resumed) == without_times(rows)
    jax.tree.map(np.testing.assert_array_equal, resumed_agent, agent)


@pytest.mark.slow
def test_held_out_questions_name_the_best_checkpoint(config, undisturbed, tmp_path, monkeypatch, capsys):
    """Evaluated after steps 2, 4 and 6; training is not changed by it; the best stays though one checkpoint is kept.
    That they are those of training is said."""
    accuracies = iter([0.25, 0.75, 0.5])

    def scripted(self, *args, original=training.HeldOut.measure):
        return original(self, *args) | {"topk": next(accuracies)}

    monkeypatch.setattr(training.HeldOut, "measure", scripted)
    config = dataclasses.replace(
        config,
        keep_checkpoints=1,
        checkpoint_every=5,
        held_out=cfg.HeldOut(every=2, questions=config.data.questions, num_questions=3),
        evaluation=dataclasses.replace(config.evaluation, budgets=(4,), batch_size=2),
    )
    rows, agent = run(config, tmp_path)
    said = capsys.readouterr().err
    assert "note: 32 of the 32 held-out questions are trained on as well" in said
    assert "note: 2 of the 2 held-out videos are trained on as well" in said and "fewer than a batch" not in said
    held_out = [row for row in rows if "held_out/topk" in row]
    assert [row["step"] for row in held_out] == [2, 4, 6] and all(0 <= row["held_out/uniform"] <= 1 for row in held_out)
    jax.tree.map(np.testing.assert_array_equal, agent, undisturbed[2])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    assert find_checkpoint(tmp_path / "best").name == "4" and find_checkpoint(tmp_path).name == "6"
    (answered,) = (tmp_path / "held_out").glob("rows_*.jsonl")
    steps = [(row["method"], row["step"]) for row in read_rows(answered)]
    assert len(steps) == 3 * 2 + 3 * 3 and steps.count(("uniform", 2)) == 3, "baselines are answered once"
    page = (tmp_path / "report.html").read_text()
    assert page.count("<section>") == 3 and "Accuracy on held-out questions" in page
