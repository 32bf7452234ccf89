"""Labels of two tiny videos by the golden answerer: scores frame by frame, resuming, coarse to fine, the command."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_store
from tiny_store import LONG, SHORT

from tspo_jax import config as cfg
from tspo_jax.answering import prompts
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import QuestionError, read_questions
from tspo_jax.devices.sharding import make_mesh
from tspo_jax.label_evidence import label_evidence
from tspo_jax.tspo import evidence_labels
from tspo_jax.tspo.evidence_labels import EvidenceLabels, Labelling, overlap, seconds_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden):
    folder = tmp_path_factory.mktemp("labels")
    tiny_store.make_store(folder, golden)
    tiny_store.write_questions(folder / "questions.jsonl", num=2)
    return folder


@pytest.fixture(scope="module")
def setting(golden, folder):
    answerer = load_answerer(golden / "llava_video_grid")
    mesh = make_mesh((("data", 1), ("model", 1)), jax.devices()[:1])
    questions = read_questions(folder / "questions.jsonl")[0]
    return questions, FrameStore(folder / "store"), answerer, Rollout.of(answerer, max_new_tokens=2), mesh


def make(setting, path, **how):
    return EvidenceLabels(*setting, Labelling(**how), path, batch_size=1)


def test_scores_are_those_of_the_answerer(setting, tmp_path):
    """Frame by frame, whatever is answered together."""
    questions, store, answerer, _, _ = setting
    labels = make(setting, tmp_path / "scores.jsonl", group=16)
    assert labels.cost()["answers"] == labels.cost()["frames"] == 45  # 40 and 5 frames
    found = dict(labels.label())
    assert labels.cost() == {"answers": 0, "frames": 0, "tokens": 0} and labels.num_answers() == 45
    rollout = Rollout.of(answerer, max_new_tokens=2)
    for question in questions:
        assert found[question].scores.shape == (store.video(question.video).num_frames,)
        assert ((found[question].scores >= 0) & (found[question].scores <= 1)).all()
    question = next(question for question in questions if question.video == SHORT)
    options = prompts.option_tokens([question], "{letter}", answerer.tokenizer)
    prompt = prompts.render(question.question, answerer.template)
    ids, lengths = prompts.pad([prompts.tokenize(prompt, answerer.tokenizer)], answerer.generation.pad_token_id)
    for i in (0, 4):
        pixels = np.stack([answerer.processor.crop(frame) for frame in store.frames(SHORT, [i])])[None]
        answers = rollout(answerer.params, pixels, np.zeros((1, 1, 1), int), ids, lengths, options)
        probability = np.exp(np.asarray(answers.option_log_probs)[0, 0, 1])  # every answer is B
        assert found[question].scores[i] == pytest.approx(float(probability), abs=1e-4)


@pytest.mark.slow
def test_a_stopped_run_goes_on(setting, tmp_path, monkeypatch):
    """No window is answered twice."""
    whole = [label.scores for _, label in make(setting, tmp_path / "whole.jsonl", group=4).label()]
    answered = []

    def stopping(requests, *args):
        for batch in scored(requests, *args):
            answered.extend(window for request, _, _ in batch for window in request.id[1])
            yield batch
            if len(answered) == 12:
                raise KeyboardInterrupt

    scored = evidence_labels.scored_requests
    monkeypatch.setattr(evidence_labels, "scored_requests", stopping)
    with pytest.raises(KeyboardInterrupt):
        list(make(setting, tmp_path / "parts.jsonl", group=4).label())
    labels = make(setting, tmp_path / "parts.jsonl", group=4)
    assert labels.num_answers() == 12 and labels.cost()["answers"] == 33
    parts = [label.scores for _, label in labels.label()]
    assert len(answered) == 45
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_coarse_to_fine_finds_what_all_frames_give(setting, tmp_path, monkeypatch):
    """With scores that stand out in one stretch: few frames are looked at, and the span is the same."""
    looked_at = []

    def scored(requests, *_):
        for request in requests:
            looked_at.extend(np.unique(request.picks).tolist())
            picks = request.picks[:, 0]
            right = np.where((picks >= 17) & (picks <= 25), 0.9, 0.2) if request.video == LONG else 0.3 + 0 * picks
            yield [(request, ["B"] * len(picks), np.log(np.stack([1 - right, right], axis=-1)))]

    monkeypatch.setattr(evidence_labels, "scored_requests", scored)
    labels = {}
    for coarse in (1, 4):
        looked_at.clear()
        found = make(setting, tmp_path / f"{coarse}.jsonl", coarse=coarse, group=4).label()
        labels[coarse] = {question.video: label for question, label in found}
        assert len(looked_at) == {1: 45, 4: 10 + 1 + 13}[coarse] or coarse == 4 and len(looked_at) < 30
    for video in (LONG, SHORT):
        assert labels[1][video].span == labels[4][video].span
    assert labels[1][LONG].span == (17, 25) and labels[1][LONG].evidence == ((17.0, 26.0),)
    assert labels[1][SHORT].span is None and labels[1][SHORT].evidence == ()


def test_windows(setting, tmp_path, monkeypatch):
    """Frames that are shown together share a score; the last window is filled up with the last frame."""
    shown = []

    def scored(requests, *_):
        for request in requests:
            shown.append(request.picks)
            right = request.picks[:, 0] / 100
            yield [(request, ["B"] * len(right), np.log(np.stack([1 - right, np.maximum(right, 1e-9)], axis=-1)))]

    monkeypatch.setattr(evidence_labels, "scored_requests", scored)
    labels = make(setting, tmp_path / "scores.jsonl", window=3, group=2)
    found = {question.video: label.scores for question, label in labels.label()}
    assert found[SHORT].tolist() == pytest.approx([0, 0, 0, 0.03, 0.03], abs=1e-6)
    assert found[LONG].shape == (40,) and all(picks.shape == (2, 3) for picks in shown)
    assert max(int(picks.max()) for picks in shown) == 39


def test_whether_the_answer_is_right(setting, tmp_path, monkeypatch):
    texts = iter(["B. two", "A", "nothing", "b"] * 40)

    def scored(requests, *_):
        for request in requests:
            yield [(request, [next(texts) for _ in request.picks], None)]

    monkeypatch.setattr(evidence_labels, "scored_requests", scored)
    (_, first), *_ = make(setting, tmp_path / "scores.jsonl", score="correct", group=4).label()
    assert first.scores[:4].tolist() == [1, 0, 0, 1]


def test_seconds_of_a_span(folder):
    video = FrameStore(folder / "store").video(LONG)
    assert seconds_of((3, 5), video) == (3.0, 6.0)
    assert seconds_of((38, 39), video) == (38.0, 40.0)


def test_overlap():
    assert overlap([(0, 4)], [(2, 6)]) == pytest.approx(2 / 6)
    assert overlap([(0, 1), (3, 4)], [(0, 4)]) == pytest.approx(0.5)
    assert overlap([(0, 1)], [(1, 2)]) == 0 and overlap([(1, 1)], [(1, 1)]) == 0


@pytest.mark.parametrize(
    ("how", "message"),
    [({"window": 0}, "window is 0"), ({"coarse": 0}, "coarse"), ({"score": "luck"}, "score is 'luck'")],
)
def test_what_makes_no_sense(how, message):
    with pytest.raises(ValueError, match=message):
        Labelling(**how)


@pytest.mark.slow
def test_command_line(golden, folder, tmp_path):
    """The written file is a question file with the spans; a wrong one is refused in one line."""
    config = tmp_path / "config.py"
    config.write_text(
        "from tspo_jax.config import default\n\n\ndef get_config():\n    config = default()\n"
        f"    config.answerer.folder = {str(golden / 'llava_video_grid')!r}\n"
        "    config.answerer.dtype, config.answerer.max_new_tokens = 'float32', 1\n"
        f"    config.data.store = {str(folder / 'store')!r}\n"
        f"    config.data.questions = {str(folder / 'questions.jsonl')!r}\n    return config\n"
    )
    command = [sys.executable, "-m", "tspo_jax.label_evidence", f"--config={config}"]
    good = subprocess.run(
        [*command, f"--output={tmp_path / 'labelled.jsonl'}", "--coarse=2"], capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    result = json.loads(good.stdout)
    assert result["questions"] == 2 and 22 <= result["answers"] <= 45
    assert "22 answers of 1 frame(s), 22 frames encoded" in good.stderr  # every second one of 40 and of 5
    questions = read_questions(tmp_path / "labelled.jsonl")[0]
    assert sum(bool(question.evidence) for question in questions) == result["labelled"]
    assert [(q.query, q.options, q.answer) for q in questions] == [
        (q.query, q.options, q.answer) for q in read_questions(folder / "questions.jsonl")[0]
    ]
    bad = subprocess.run([*command, f"--output={folder / 'questions.jsonl'}"], capture_output=True, text=True)
    assert bad.returncode == 1 and "is the question file itself" in bad.stderr and bad.stderr.count("\n") == 1


def test_bad_questions_are_told(folder, tmp_path, capsys):
    """Each is named; too many of them are a wrong file."""
    path = tmp_path / "questions.jsonl"
    good = (folder / "questions.jsonl").read_text().splitlines()[0].replace(".mp4", "_absent.mp4")
    path.write_text("\n".join([good, "{", ""]))
    config = cfg.default()
    config.data.store, config.data.questions, config.data.max_bad = str(folder / "store"), str(path), 0.5
    with pytest.raises(ValueError, match="lacks 1 videos"):
        label_evidence(cfg.read(config), Labelling(), tmp_path / "labelled.jsonl")
    assert f"left out: {path}:2: line: not valid json" in capsys.readouterr().err
    config.data.max_bad = 0.1
    with pytest.raises(QuestionError, match=r"1 bad question\(s\) of 2"):
        label_evidence(cfg.read(config), Labelling(), tmp_path / "labelled.jsonl")
