"""Making pairs: frames with and without the evidence, what becomes a pair, resuming, a tiny answerer."""

import json

import jax
import numpy as np
import pytest
from tiny_store import LONG, SHORT, make_store, store_lengths, write_questions

from tspo_jax import config as cfg
from tspo_jax.data.questions import Question, QuestionError
from tspo_jax.tpo import building
from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.pairs import read_pairs

LENGTHS = {f"{i}.mp4": 40 + i for i in range(8)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_lengths(tmp_path_factory.mktemp("store"), LENGTHS)


def question(video="3.mp4", kind="general", evidence=((10.0, 13.0),), answer="B"):
    text = "Which?\nA. one\nB. two\nC. three"
    return Question(0, video, "Which?", text, ("one", "two", "three"), answer, kind, "f:1", None, evidence)


def config_of(output, **build) -> TpoConfig:
    config = tpo_config.default()
    config.build.update(output=str(output), questions="q", frames=6, sparse_frames=2, attempts=3, **build)
    return cfg.read(config, TpoConfig)


def watch(stage, total, done):
    return lambda count: None


class Seeing:
    """Answers B where a frame of 10 to 12 is shown, else A; two of three times it says nothing of use."""

    def __init__(self):
        self.asked = []

    def __call__(self, requests):
        for request in requests:
            self.asked.append(request.id)
            sees = ((request.picks >= 10) & (request.picks < 13)).any(axis=1)
            yield [(request, ["It is B." if s else ("A", "hm")[i % 2] for i, s in enumerate(sees)])]


def test_frames_of_a_question_with_evidence(store, tmp_path):
    asked = building.frame_sets(question(), "q:1", store, list(LENGTHS), config_of(tmp_path))
    video, (frames,) = asked.sets["evidence"]
    assert video == "3.mp4" and {10, 11, 12} <= set(frames.tolist()) and len(frames) == 6
    video, draws = asked.sets["irrelevant"]
    assert video == "3.mp4" and draws.shape == (3, 6) and not np.isin(draws, [10, 11, 12]).any()
    _, draws = asked.sets["incomplete"]
    assert draws.shape == (3, 2) and np.isin(draws, frames).all() and (np.diff(draws) > 0).all()
    again = building.frame_sets(question(), "q:1", store, list(LENGTHS), config_of(tmp_path))
    np.testing.assert_array_equal(again.sets["irrelevant"][1], asked.sets["irrelevant"][1])


def test_frames_of_questions_without_evidence(store, tmp_path):
    general = building.frame_sets(question(evidence=()), "q", store, list(LENGTHS), config_of(tmp_path))
    assert set(general.sets) == {"evidence", "incomplete"}
    needle = building.frame_sets(question("3.mp4", "specific", ()), "q", store, list(LENGTHS), config_of(tmp_path))
    other, _ = needle.sets["irrelevant"]
    assert other != "3.mp4" and needle.sets["evidence"][0] == "3.mp4"
    shown = building.shown_frames(needle, store, list(LENGTHS), config_of(tmp_path))
    assert {"3.mp4"} < {video for video, _ in shown}
    assert building.shown_frames(general, store, list(LENGTHS), config_of(tmp_path)) is None


@pytest.mark.parametrize(
    "style, chosen, rejected", [("own", "It is B.", "A"), ("letter", "B", "A"), ("text", "two", "one")]
)
def test_right_with_and_wrong_without_is_a_pair(store, tmp_path, style, chosen, rejected):
    questions = {"a": question(), "b": question("4.mp4"), "c": question("5.mp4", answer="C")}
    result = building.build(config_of(tmp_path, answer_style=style), questions, store, Seeing(), watch, "model1")
    pairs = [pair for side in ("train", "heldout") for pair in read(tmp_path / f"{side}.jsonl")]
    irrelevant = {pair.video: pair for pair in pairs if pair.recipe == "irrelevant"}
    assert set(irrelevant) == {"3.mp4", "4.mp4"}, "the third is answered wrong with the evidence too"
    for pair in pairs:
        assert (pair.chosen, pair.rejected, pair.answer) == (chosen, rejected, "B")
        assert any(10 <= frame < 13 for _, frame in pair.evidence_picks)
        assert not any(10 <= frame < 13 for _, frame in pair.rejected_picks)
        assert "Which?" in pair.prompt and ("letter" in pair.prompt) == (style != "text")
    assert result["counts"]["questions"] == 3 and result["counts"]["right_with_evidence"] == 2
    assert result["yield"]["irrelevant"] == pytest.approx(2 / 3)
    card = (tmp_path / "README.md").read_text()
    assert "| irrelevant | 66.7% |" in card and "model1" in card


def read(path):
    return read_pairs(path)[0] if path.read_text() else []


def test_an_answer_without_an_option_is_not_rejected(store, tmp_path):
    def mute(requests):
        for request in requests:
            yield [(request, ["B" if (picks == 11).any() else "hm" for picks in request.picks])]

    with pytest.raises(ValueError, match="no pair came of it .questions 1, right with evidence 1"):
        building.build(config_of(tmp_path), {"a": question()}, store, mute, watch, "m")
    assert (tmp_path / "README.md").is_file()


def test_resumed_after_a_kill_nothing_is_asked_again(store, tmp_path):
    questions = {name: question(name) for name in LENGTHS}
    whole = building.build(config_of(tmp_path / "whole"), questions, store, Seeing(), watch, "m")

    class Killed(Seeing):
        def __call__(self, requests):
            for i, batch in enumerate(super().__call__(requests)):
                if i == 3:
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        building.build(config_of(tmp_path / "cut"), questions, store, Killed(), watch, "m")
    rest = Seeing()
    assert building.build(config_of(tmp_path / "cut"), questions, store, rest, watch, "m") == whole
    assert len([name for name in rest.asked[: len(LENGTHS)]]) and rest.asked.count("0.mp4") == 2  # not its evidence


@pytest.mark.parametrize(
    "build, said",
    [
        ({"recipes": ("other",)}, "recipes has other"),
        ({"recipes": ()}, "recipes is empty"),
        ({"answer_style": "poem"}, "answer_style is 'poem'"),
        ({"sparse_frames": 6}, "must be less than build.frames"),
    ],
)
def test_settings_that_make_no_pairs(tmp_path, build, said):
    config = tpo_config.default()
    config.build.update(output=str(tmp_path), questions="q", frames=6, **build)
    with pytest.raises(ValueError, match=said):
        building.check(cfg.read(config, TpoConfig))


@pytest.mark.parametrize("name", ["q.jsonl", "0_30_s_youtube_mc_v0_1.json"])
def test_a_file_of_mostly_bad_questions_is_a_wrong_file(tmp_path, name):
    """Of either form; a few bad ones are left out and said."""
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. one\nB. two"}, {"from": "gpt", "value": "B"}]
    if name.endswith(".jsonl"):
        write_questions(tmp_path / name)
        lines = (tmp_path / name).read_text().splitlines()
    else:
        records = [{"id": f"{i}", "video": "3.mp4", "data_source": ".", "conversations": turns} for i in range(12)]
        lines = list(map(json.dumps, records))
    few, many = [*lines, "{"], [*lines, "{", '{"id": 3}']
    (tmp_path / name).write_text("\n".join(few))
    known, bad = building.read_known(tmp_path / name, False, 0.1)
    assert (len(known), len(bad)) == (12, 1)
    (tmp_path / name).write_text("\n".join(many))
    with pytest.raises(QuestionError, match=r"2 bad question\(s\) of 14, above max_bad = 10%"):
        building.read_known(tmp_path / name, False, 0.1)


@pytest.mark.slow
def test_the_whole_with_a_tiny_answerer(golden, tmp_path):
    """Its answers name nothing: every stage is asked and filed, and the run says that no pair came of them."""
    config = tpo_config.default()
    config.answerer.folder, config.answerer.dtype = str(golden / "llava_video_grid"), "float32"
    config.answerer.max_new_tokens = 2
    config.data.store = str(make_store(tmp_path, golden))
    rows = write_questions(tmp_path / "questions.jsonl", num=4).read_text()
    (tmp_path / "questions.jsonl").write_text(
        rows + json.dumps(json.loads(rows.splitlines()[0]) | {"video": "none.mp4"})
    )
    config.build.update(questions=str(tmp_path / "questions.jsonl"), output=str(tmp_path / "pairs"), frames=3)
    config.build.update(sparse_frames=1, batch_size=2)
    with pytest.raises(ValueError, match="no pair came of it .questions 4, right with evidence 0"):
        building.run(cfg.read(config, TpoConfig), jax.devices()[:1], watch)
    lines = (tmp_path / "pairs" / "1_evidence.jsonl").read_text().splitlines()
    assert {json.loads(line)["video"] for line in lines} == {LONG, SHORT} and len(lines) == 4
