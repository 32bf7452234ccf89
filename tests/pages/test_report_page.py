"""The report as text of HTML, from numbers that are made up."""

from xml.etree import ElementTree

import numpy as np

from tspo_jax.evaluation import results
from tspo_jax.pages import report, report_page


def test_frames_of_an_index_file_and_what_the_numbers_lack():
    shared = {"k": 8, "groups": {}}
    rows = [shared | {"id": str(i), "video": f"v{i}", "method": "uniform", "correct": True} for i in range(4)]
    rows += [row | {"method": "frame-idx", "correct": False} for row in rows[:3]]
    summary = results.summarize(rows, ()) | {"missing_videos": ["<lost>.mp4"]}
    html = report_page.page("Run", {}, {}, summary, report.NAMES, [])
    assert "index file<br />− uniform" in html and "<small>(3)</small>" in html and "&lt;lost&gt;.mp4" in html


def test_text_of_others_cannot_break_the_page():
    """A question, an option and an answer with mark-up and control characters."""
    bad = "<b>&\"'</section>"
    choice = report_page.Choice("topk", "topk", [1.0], [np.zeros((8, 8, 3), np.uint8)], "\x00\x07" + bad, False)
    scores = np.array([0.1, 0.3])
    example = report_page.Example(
        bad, bad, [bad, "x"], "A", bad, 2.0, [(0.0, 1.0)], np.array([0.0, 1.0]), scores, scores, [choice]
    )
    summary = {"num_questions": 1, "num_videos": 1, "accuracy": [], "differences": [], "controls": [], "rounds": []}
    page = report_page.page(bad, {bad: bad}, {}, summary, {}, [example])
    texts = list(ElementTree.fromstring(page.partition("\n")[2]).itertext())
    assert sum(text.strip().endswith(bad) for text in texts) >= 4
