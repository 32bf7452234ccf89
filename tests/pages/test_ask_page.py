"""The page of `serve` as a person uses it, in headless Chromium."""

import os
import threading
import time
import urllib.parse

import chromium
import pytest
import scripted_rounds
from video_files import write_video

from tspo_jax.toy.caption_world import by_keywords

pytestmark = chromium.NEEDED
DONE = "['done', 'failed'].includes(document.getElementById('state').textContent)"
QUESTION = "Who opens the door?\nA. the cat\nB. <b>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    """(path) -> the browser at the page, which logged no error when the test is over."""
    browser.show_on_a_desk()

    def open_page(path="/"):
        browser.open(f"http://127.0.0.1:{server.server_address[1]}{path}")
        browser.until("document.readyState === 'complete' && typeof cards === 'object' && cards.size > 0")
        return browser

    open_page.server = server
    yield open_page
    expected = ("/videos/", "/previews/", "/stills/")  # a video that cannot be read, or is not a file
    assert [line for line in browser.errors() if not any(path in line for path in expected)] == []


def link(**fields):
    return "/?" + urllib.parse.urlencode(fields)


def test_the_page_in_a_browser(page):
    """A person types a question and presses the button; curve, frames and answer appear."""
    browser = page()
    browser.run("document.getElementById('video').value = 'short.mp4'")
    browser.run("document.getElementById('question').value = arguments[0]", "Who opens the door?")
    browser.run("document.getElementById('ask').click()")
    browser.until(DONE)
    said = "return [document.getElementById('state').textContent, document.getElementById('result').textContent]"
    state, text = browser.run(said)
    assert state == "done", text
    pictures = "[...document.querySelectorAll('#result img')].filter(i => i.complete && i.naturalWidth > 0).length"
    browser.until(f"{pictures} === 25")
    assert browser.run("return document.querySelectorAll('#result svg polyline').length") == 2
    assert browser.run(f"return {pictures}") == 5 * 5
    assert "5 frames <b> Who" in browser.run("return document.getElementById('result').textContent")
    browser.run("document.getElementById('video').value = 'broken.mp4'; document.getElementById('ask').click()")
    browser.until("document.getElementById('result').textContent.includes('not a video')")


def test_a_video_is_picked_by_its_picture_and_length_with_search(page):
    browser = page()
    card = "document.querySelector(\"[data-name='long.mp4']\")"
    browser.until(f"{card}.querySelector('img')?.naturalWidth === 144")
    assert browser.run(f"return {card}.querySelector('.length').textContent") == "0:40"
    browser.until("document.querySelector(\"[data-name='broken.mp4']\").classList.contains('unreadable')")
    browser.run(f"{card}.click()")
    browser.until("film.readyState > 0")
    assert browser.run("return [document.getElementById('video').value, Math.round(film.duration)]") == ["long.mp4", 40]
    assert browser.run("return location.search") == "?video=long.mp4"
    browser.run("const s = document.getElementById('search'); s.value = 'SHO'; s.dispatchEvent(new Event('input'))")
    names = "return [...document.querySelectorAll('#cards li:not([hidden])')].map(card => card.dataset.name)"
    assert browser.run(names) == ["short.mp4"]
    assert browser.run("return document.getElementById('count').textContent").startswith("1 of ")


def test_by_keyboard_alone(page):
    """To the search by /, to the cards by arrows, Enter picks; the curve and the frames are reached by Tab."""
    browser = page()
    browser.press("/", "mp4", "Down")
    first = browser.run("return document.activeElement.dataset.name")
    browser.press("Right")
    second = browser.run("return document.activeElement.dataset.name")
    assert browser.run("return [...cards.keys()].slice(0, 2)") == [first, second]
    browser.press("End", "Home", "Up")
    assert browser.run("return document.activeElement.id") == "search"
    browser.run("document.getElementById('search').select()")
    browser.press("short", "Enter")
    assert browser.run("return [shown, document.activeElement.id]") == ["short.mp4", "question"]
    browser.press("Why?", "Tab", "Tab", "Tab", "Enter")
    browser.until(DONE)
    browser.press("Tab")
    assert browser.run("return document.activeElement.getAttribute('role')") == "slider"
    browser.press("Right", "Right")
    browser.until("film.currentTime === 2")
    browser.press("Tab", "Right", "Enter")
    browser.until("film.currentTime === 1")
    assert browser.run("return document.activeElement.dataset.seconds") == "1.0"
    browser.press("Tab", "Enter")
    browser.until("[...document.querySelectorAll('.answer')].filter(button => button.hidden).length === 2")


def test_a_click_on_the_curve_or_a_frame_goes_to_that_moment(page):
    browser = page(link(video="long.mp4", question=QUESTION, num_frames=4))
    browser.until(DONE)
    browser.until("film.readyState > 0")
    click = """
        const chart = document.querySelector('#result svg'), box = chart.getBoundingClientRect();
        const { left, right } = chart.dataset, width = chart.viewBox.baseVal.width;
        const x = box.left + (+left + (right - left) * arguments[0]) / width * box.width;
        chart.dispatchEvent(new MouseEvent('click', { clientX: x, clientY: box.top + 20, bubbles: true }));
        return Number(document.querySelector('#result svg').getAttribute('aria-valuenow'));"""
    assert browser.run(click, 0.25) == pytest.approx(10, abs=0.2)
    browser.until("Math.abs(film.currentTime - 10) < 0.2")
    assert browser.run(click, 1.5) == pytest.approx(40, abs=0.2), "beyond the edge: the end"
    seconds = browser.run(
        "const f = document.querySelectorAll('#result figure.frame')[2]; f.click(); return +f.dataset.seconds"
    )
    browser.until(f"Math.abs(film.currentTime - {seconds}) < 0.1")
    assert browser.run("return document.querySelector('figure.shown').dataset.seconds") == f"{seconds:.1f}"


def test_a_video_of_the_store_alone_is_shown_frame_by_frame(page):
    browser = page(link(video="sub/stored.mp4", question="Why?", num_frames=2))
    browser.until(DONE)
    browser.until("film.hidden && still.naturalWidth > 0")
    browser.run("document.querySelectorAll('#result figure.frame')[1].click()")
    browser.until("still.complete && still.naturalWidth === 64")
    seconds = browser.run("return document.querySelectorAll('#result figure.frame')[1].dataset.seconds")
    assert browser.run("return still.getAttribute('src')") == f"/stills/sub/stored.mp4?at={float(seconds):g}"


def test_each_methods_answer_at_one_click_in_its_own_colour(page):
    browser = page(link(video="long.mp4", question=QUESTION, num_frames=3, method="aks"))
    browser.until(DONE)
    answers = "return [...document.querySelectorAll('.choice h4')].map(line => line.children[1].textContent.trim())"
    assert [bool(text) for text in browser.run(answers)] == [False, False, True, False, False]
    for number in range(4):
        browser.run("document.querySelector('button.answer:not([hidden]):not(:disabled)').click()")
        browser.until(
            f"[...document.querySelectorAll('.answer')].filter(button => button.hidden).length === {number + 2}"
        )
    texts = browser.run(answers)
    assert all("frames <b> Who" in text for text in texts) and len(texts) == 5
    colours = browser.run(
        "return [...document.querySelectorAll('.choice .key')].map(key => getComputedStyle(key).color)"
    )
    assert len(set(colours)) == 5
    assert browser.run("return document.querySelectorAll('.choice').length") == 5


def test_an_answer_in_rounds_grows_and_what_was_opened_stays_open(page):
    """The writer replies when the test lets it."""
    library, may_reply = page.server.library, threading.Semaphore(0)

    def reply(prompt):
        assert may_reply.acquire(timeout=60)
        return by_keywords(prompt)

    library.in_rounds = scripted_rounds.in_rounds_by(reply)
    try:
        browser = page(link(video="sub/stored.mp4", question=scripted_rounds.QUESTION, method="backtrack"))
        browser.until("document.getElementById('result').textContent.includes('not answered yet')")
        parts = "document.querySelectorAll('#result details')"
        browser.until(f"{parts}.length > 0")
        before = browser.run(f"{parts}[0].open = true; return {parts}.length")
        while not browser.run("return document.getElementById('result').textContent.includes('Round 1')"):
            may_reply.release()
            time.sleep(0.2)
        browser.until(f"{parts}.length > {before}")
        assert browser.run(f"return [...{parts}].map(part => part.open)")[:2] == [True, False]
        may_reply.release(100)
        browser.until(DONE)
        text = browser.run("return document.getElementById('result').textContent")
        assert browser.run("return document.getElementById('state').textContent") == "done", text
        assert "ended in phase" in text and "What is dropped <b>?" in text and "a red key" in text
        assert browser.run(f"return {parts}[0].open")
    finally:
        library.in_rounds = None
        may_reply.release(100)


def test_links_hold_video_and_question(page):
    """And back and forth in the browser shows what was there."""
    path = link(video="long.mp4", question=QUESTION, num_frames=3, method="uniform")
    browser = page(path)
    browser.until(DONE)
    assert browser.run("return document.getElementById('link').href").endswith(path)
    assert browser.run("return document.getElementById('question').value") == QUESTION
    browser.run("document.getElementById('question').value = 'Why?'; document.getElementById('ask').click()")
    browser.until("document.querySelector('#result h3')?.textContent === 'Why?'")
    browser.run("history.back()")
    browser.until("document.querySelector('#result h3')?.textContent === 'Who opens the door?'")
    assert browser.run("return document.getElementById('method').value") == "uniform"
    browser.open(browser.run("return location.href").replace("long.mp4", "gone.mp4"))
    assert browser.run("return document.getElementById('state').textContent") == "there is no video gone.mp4 here"


def test_a_link_on_another_site_fills_in_but_does_not_ask(page, tmp_path):
    other = tmp_path / "other.html"
    address = f"http://127.0.0.1:{page.server.server_address[1]}" + link(video="long.mp4", question="Why?")
    other.write_text(f"<script>location = {address!r}</script>")
    browser = page()
    browser.open(other.as_uri())
    browser.until("document.getElementById('question')?.value === 'Why?'")
    browser.until("film.readyState > 0")
    assert (
        browser.run("return document.getElementById('state').textContent + document.getElementById('ask').disabled")
        == "false"
    )


def test_on_a_phone(page):
    """Nothing is wider than the page, and the list makes room for what was picked."""
    browser = page()
    browser.emulate_phone(360, 740)
    assert browser.run("return [innerWidth, document.getElementById('library').open]") == [360, True]
    browser.run("document.querySelector(\"[data-name='short.mp4']\").click()")
    assert browser.run("return document.getElementById('library').open") is False
    browser.run("document.getElementById('question').value = 'Why?'; document.getElementById('ask').click()")
    browser.until(DONE)
    assert browser.run("return document.documentElement.scrollWidth") == 360
    size = "return parseFloat(getComputedStyle(document.querySelector('#result .tick')).fontSize)"
    scale = "document.querySelector('#result svg').getBoundingClientRect().width / 880"
    assert browser.run(f"{size} * {scale}") > 7, "times can be read below the curve"


def test_two_thousand_videos(page, tmp_path):
    """The page is there soon and asks for the pictures that are seen only; search and keys work on all."""
    folder = page.server.library.folder
    video = write_video(tmp_path / "one.mp4", num_frames=50)
    names = [f"part {i:04d}.mp4" for i in range(2000)]
    for name in names:
        os.link(video, folder / name)
    try:
        browser = page()
        assert browser.run("return cards.size") >= 2000
        browser.until("document.querySelectorAll('#cards img').length > 5 && loading === 0 && wanted.size === 0")
        assert browser.run("return document.querySelectorAll('#cards img').length") < 60
        browser.press("/", "part 1999", "Enter")
        assert browser.run("return shown") == "part 1999.mp4"
        browser.until("film.readyState > 0")
        browser.until("document.querySelector(\"[data-name='part 1999.mp4'] img\")")
    finally:
        for name in names:
            (folder / name).unlink()
