"""The report page: complete, well-formed, nothing from the network, and true to the run."""

import base64
import io
import json
import math
import re
import shutil
from xml.etree import ElementTree

import pytest
import tiny_store
from PIL import Image

from tspo_jax import config as cfg
from tspo_jax.evaluation import run as evaluate
from tspo_jax.evaluation.benchmarks import Item
from tspo_jax.pages import report, templates


def metrics_row(step):
    general = step % 2
    rates = (
        {"accuracy/general": 0.25 + 0.01 * step} if general else {"accuracy/specific": 0.5, "location/specific": 0.3}
    )
    shared = {"score_entropy": 4 - 0.01 * step, "grad_norm": 1.5, "dead_groups": 0.25, "seconds/answer": 3.0}
    held_out = {} if step % 10 else {"held_out/topk": 0.5}
    return {"step": step, **rates, **shared, **held_out}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, golden):
    """A run whose answers are made up; the scores and pictures are real."""
    folder = tmp_path_factory.mktemp("report")
    store = tiny_store.make_store(folder, golden)
    config = tiny_store.make_config(golden, store, tiny_store.write_questions(folder / "questions.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        tiny_store.fake_answerer(patch)
        evaluate.evaluate(cfg.read(config), folder / "run", golden / "tspo_agent")
    rows = [metrics_row(step) for step in range(1, 41)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_report(folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def html(run_dir):
    return (run_dir / "report.html").read_text()


@pytest.fixture(scope="module")
def tree(html):
    """The page as XML, which it is after its doctype."""
    doctype, _, rest = html.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)


def test_page_needs_nothing_from_outside(html, tree):
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link", html.replace("data:image/jpeg;base64,", ""))
    for element in tree.iter():
        assert not element.attrib.keys() & {"href", "srcset", "onclick", "onload"}
        assert element.attrib.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert "prefers-color-scheme: dark" in html


def test_every_frame_is_a_picture_with_its_time(run_dir, tree):
    """Two questions of each of three families, three methods, four frames each."""
    pictures = list(tree.iter("img"))
    assert len(pictures) == 6 * 3 * 4
    for picture in pictures:
        data = base64.b64decode(picture.attrib["src"].partition(",")[2])
        assert Image.open(io.BytesIO(data)).size[0] == templates.THUMBNAIL
        assert re.search(r"frame at \d+:\d\d\.\d", picture.attrib["alt"])


def test_evidence_frames_are_marked(run_dir, tree):
    rows = [json.loads(line) for line in (run_dir / "evaluation" / "rows.jsonl").read_text().splitlines()]
    shown = {"".join(s.find("h3").itertext()).split()[-1].rstrip("?") for s in tree.iter("section")}
    spans = {number: (float(number), float(number) + 2) for number in shown}
    expected = sum(
        spans[row["id"]][0] <= t <= spans[row["id"]][1]
        for row in rows
        if row["id"] in shown and row["k"] == 4
        for t in row["timestamps"]
    )
    assert sum(f.attrib.get("class") == "hit" for f in tree.iter("figure")) == expected > 0


def test_all_families_and_verdicts(run_dir, tree):
    rows = [json.loads(line) for line in (run_dir / "evaluation" / "rows.jsonl").read_text().splitlines()]
    sections = list(tree.iter("section"))
    assert [s.find("h3/span").text for s in sections] == sorted(["lookup", "position", "relation"] * 2)
    for section in sections:
        number = "".join(section.find("h3").itertext()).split()[-1].rstrip("?")
        right = {row["method"]: row["correct"] for row in rows if row["id"] == number and row["k"] == 4}
        verdicts = [c.find("h4")[1].attrib["class"] for c in section.iter("div") if c.attrib.get("class") == "choice"]
        assert verdicts == ["right" if right[m] else "wrong" for m in ("uniform", "clip-topk", "topk")]
        assert len([p for p in section.iter("polyline") if "score" in p.attrib["class"]]) == 2


def test_table_has_the_numbers_of_the_summary(run_dir, tree):
    summary = json.loads((run_dir / "evaluation" / "summary.json").read_text())
    tables = list(tree.iter("table"))
    assert len(tables) == 2  # one per budget
    for k, table in zip((4, 6), tables, strict=True):
        cells = [[cell.find("b").text for cell in line if cell.find("b") is not None] for line in table.find("tbody")]
        expected = {(r["label"], r["method"]): f"{100 * r['accuracy']:.1f}" for r in summary["accuracy"] if r["k"] == k}
        labels = ("all", "lookup", "position", "relation")
        assert cells == [[expected[label, m] for m in ("uniform", "clip-topk", "topk")] for label in labels]
        noise = sum(r["inside_noise"] for r in summary["differences"] if r["k"] == k)
        assert sum("inside the noise" in "".join(cell.itertext()) for cell in table.iter("td")) == noise


def test_curves(tree):
    charts = {c.find("svg/title").text: c for c in tree.iter("figure") if c.find("svg/title") is not None}
    assert set(report.CURVES) <= set(charts)
    reward = [p.attrib for p in charts["Accuracy reward"].iter("polyline")]
    assert [len(p["points"].split()) for p in reward] == [20] * 4  # raw and smooth of each kind
    raw = [float(point.split(",")[1]) for point in reward[0]["points"].split()]
    assert raw == sorted(raw, reverse=True)  # up on the page is down in SVG


def test_numbers_without_end_are_left_out():
    rows = [metrics_row(1), {"step": 2, "grad_norm": math.nan, "score_entropy": None}]
    assert report.curves(rows)["Gradient norm, before clipping"][0].steps == (1,)
    assert report.curves([]) == {}


def test_a_method_has_its_colour_in_its_curve():
    (curves,) = report.curves([{"step": 10, "held_out/topk": 0.5, "held_out/clip-topk": 0.4}]).values()
    assert [(curve.name, curve.colour) for curve in curves] == [
        ("trained agent", "topk"),
        ("CLIP top-k, untrained", "clip-topk"),
    ]


def test_facts_of_a_training():
    metrics = [{"step": i, "seconds/answer": 6.0, "device_idle": 0.9 if i <= 5 else 0.04} for i in range(1, 11)]
    facts = report.facts(cfg.Config(), metrics)
    assert facts["Steps"] == "10 of 625" and facts["Training time"] == "1.0 min"
    assert facts["Device waits for the host"] == "4% of the time"
    assert "Training time" not in report.facts(cfg.Config(), [])


def test_another_agent_than_was_evaluated(run_dir, tmp_path):
    shutil.copytree(run_dir / "evaluation", tmp_path / "evaluation")
    config = tmp_path / "evaluation" / "config.json"
    config.write_text(re.sub('"parameters_sha256": "[^"]*"', '"parameters_sha256": "other"', config.read_text()))
    with pytest.raises(ValueError, match="tspo_agent holds another agent than was evaluated in"):
        report.write_report(tmp_path)


def test_examples_are_spread_over_families_and_file():
    items = [Item(str(i), "v", "q", "p", (), "A", {"family": ("ab"[i % 2],)}) for i in range(20)]
    chosen = report.spread_out(items, 4)
    assert [(family, item.id) for family, item in chosen] == [("a", "0"), ("a", "10"), ("b", "1"), ("b", "11")]
    assert len(report.spread_out([Item("0", "v", "q", "p", (), "A", {})], 6)) == 1
