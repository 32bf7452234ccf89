"""Videos of a folder and of a store; questions about them: test_server.py."""

import shutil

import pytest
import scripted_rounds
import tiny_store
from video_files import write_video

from tspo_jax.checkpoints.detector import load_detector
from tspo_jax.pages import library as library_module
from tspo_jax.pages.library import Job, Library, RequestError
from tspo_jax.selection import scoring
from tspo_jax.selection.searching import Searcher
from tspo_jax.toy.caption_world import by_keywords


@pytest.fixture(scope="module")
def library(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    write_video(folder / "videos" / "a.mp4", num_frames=75)
    tiny_store.store_videos(folder / "store", {"sub/b.mp4": folder / "videos" / "a.mp4"}, golden / "tspo_agent")
    (folder / "store" / "beside.array_record").write_bytes(b"")
    return Library(folder / "videos", folder / "store", scoring.load_scorer(golden / "tspo_agent"))


@pytest.mark.parametrize(
    "name",
    ["../beside", "/sub/b.mp4", "sub/../sub/b.mp4", "sub//b.mp4", ".", "", "a\0.mp4", "\ud800", "x" * 300 + ".mp4"],
)
def test_names_that_lead_elsewhere_are_no_videos(library, name):
    for look in (library.path, library.preview, lambda name: library.still(name, 0)):
        with pytest.raises(RequestError, match="there is no video") as caught:
            look(name)
        assert caught.value.status == 404


def test_a_preview_is_made_once_for_a_file(library, monkeypatch):
    first = library.preview("a.mp4")
    assert first["seconds"] == pytest.approx(3, abs=0.1) and library.names() == ["a.mp4", "sub/b.mp4"]
    monkeypatch.setattr(library_module.preview, "preview", lambda *_: 1 / 0)
    assert library.preview("a.mp4") == first
    write_video(library.folder / "other.mp4", num_frames=25)
    shutil.move(library.folder / "other.mp4", library.folder / "a.mp4")
    with pytest.raises(ZeroDivisionError):
        library.preview("a.mp4")


def test_no_still_of_a_video_that_is_not_decoded(library):
    with pytest.raises(RequestError, match="a.mp4 is not decoded yet"):
        library.still("a.mp4", 1.0)
    assert library.still("sub/b.mp4", -5.0)[:2] == b"\xff\xd8"


def test_a_search_is_one_more_method(golden, library):
    """Its frames are answered from and shown; where it finds nothing the page says that they are evenly spaced."""
    asked = []

    def answer(frames, question, times):
        asked.append(len(frames))
        return "a door"

    for targets, ground in ((("red ball",), None), ((), lambda *_: ((), ()))):
        searcher = Searcher(load_detector(golden / "owlvit_tiny"), targets=targets, ground=ground)
        searching = Library(library.folder, library.store, library.scorer, answer, searcher)
        job = Job()
        html = searching.ask(job, "sub/b.mp4", "Where?", 2, "tstar")
        assert job.answer == "a door" and asked.pop() == 2
        assert "T*, search by a detector" in html
        assert ("evenly spaced, no object to search for was named" in html) == (ground is not None)


def test_an_answer_in_rounds_is_shown_while_it_goes_on(library):
    """Each reply of the writer is asked for when the page shows all that came before it."""
    job, pages = Job(), []

    def reply(prompt):
        pages.append((job.state, job.html))
        return by_keywords(prompt)

    library.in_rounds = scripted_rounds.in_rounds_by(reply)
    html = library.ask(job, "sub/b.mp4", scripted_rounds.QUESTION, 4, "backtrack")
    library.in_rounds = None
    assert len(pages) >= 4 and {state for state, _ in pages} == {"answering"}
    assert all("not answered yet" in page and "a yard" in page for _, page in pages)
    assert [page.count("<details>") for _, page in pages] == sorted({page.count("<details>") for _, page in pages})
    assert "Round 1" in pages[-1][1] and "Round 1" not in pages[0][1]
    assert (
        "&lt;b&gt;" in html and "ended in phase" in html and html.count("<details>") > pages[-1][1].count("<details>")
    )
    assert job.answer == "A" and "<strong>a red key</strong>" in html
