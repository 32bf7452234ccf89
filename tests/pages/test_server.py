"""Real HTTP requests to a real server, and the page in headless Chromium where there is one."""

import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiny_store
from video_files import write_video

from tspo_jax.checkpoints.folders import ClipEncoder
from tspo_jax.data.decode import Video
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.pages import server as serve
from tspo_jax.pages.library import Job, Library, RequestError
from tspo_jax.selection import scoring


@pytest.fixture(scope="module")
def server(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "videos").mkdir()
    (folder / "secret.mp4").write_bytes(b"not for the page")
    (folder / "videos" / "link.mp4").symlink_to(folder / "secret.mp4")
    shutil.copy(golden / "tspo_agent.mp4", folder / "videos" / "long.mp4")
    write_video(folder / "videos" / "short.mp4", num_frames=125)
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    tiny_store.store_videos(
        folder / "store", {"sub/stored.mp4": folder / "videos" / "short.mp4"}, golden / "tspo_agent"
    )
    library = Library(
        folder / "videos",
        folder / "store",
        scoring.load_scorer(golden / "tspo_agent"),
        lambda frames, question: f"{len(frames)} frames <b> {question[:3]}",
    )
    with serve.Server(("127.0.0.1", 0), library, max_upload=200_000) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(server, path, method="GET", body=None, **headers):
    """(status, JSON or text)."""
    url = f"http://127.0.0.1:{server.server_address[1]}{path}"
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, text if text.startswith("<!DOCTYPE") else json.loads(text)


def ask(server, **fields):
    status, answer = request(server, "/questions", "POST", {"question": "Who opens the door?", **fields})
    assert status == 200, answer
    return answer["question"]


def wait(server, number):
    for _ in range(600):
        status, job = request(server, f"/questions/{number}")
        assert status == 200
        if job["state"] in ("done", "failed"):
            return job
        time.sleep(0.1)
    raise AssertionError(job)


def test_a_question_and_a_second_one_that_decodes_and_encodes_nothing(server, monkeypatch):
    """Not the frames that it shows and answers from either; nor does a first one about a video of the store."""
    job = wait(server, ask(server, video="long.mp4", num_frames=4))
    assert (job["state"], job["share"]) == ("done", 1.0), job
    assert job["html"].count("<img") == 5 * 4 and "4 frames &lt;b&gt; Who" in job["html"] and "polyline" in job["html"]

    def never(*_):
        raise AssertionError("decoded or encoded again")

    monkeypatch.setattr(Video, "__init__", never)
    monkeypatch.setattr(ClipEncoder, "image_features", never)
    again = wait(server, ask(server, video="long.mp4", question="Why?\nA. So\nB. Not so", method="uniform"))
    assert (again["state"], again["share"]) == ("done", 0.0) and "frames &lt;b&gt; Why" in again["html"], again
    stored = wait(server, ask(server, video="sub/stored.mp4", num_frames=2))
    assert stored["state"] == "done" and stored["html"].count("<img") == 5 * 2, stored


def test_a_video_that_was_replaced_is_decoded_again(server):
    path = server.library.folder / "replaced.mp4"
    for seconds in (2, 3):
        write_video(path, num_frames=25 * seconds)
        assert wait(server, ask(server, video="replaced.mp4"))["state"] == "done"
        store = FrameStore(server.library.store, server.library.scorer.clip.identity)
        assert store.video("replaced.mp4").num_frames == len(store.features("replaced.mp4")) == seconds
    path.unlink()


def test_a_store_alone(server):
    """No folder: nothing can be added, and frames without features get them when they are asked about."""
    library = server.library
    alone = Library(None, library.store, library.scorer)
    assert "sub/stored.mp4" in alone.names() and "broken.mp4" not in alone.names()
    assert "type='file'" not in serve.page(alone, ["topk"]) and "type='file'" in serve.page(library, ["topk"])
    with pytest.raises(RequestError, match="videos are not taken"):
        alone.save("new.mp4", [b"x"])
    features = library.store / "features" / library.scorer.clip.identity / "sub" / "stored.mp4.array_record"
    before = FrameStore(library.store, library.scorer.clip.identity).features("sub/stored.mp4")
    features.unlink()
    assert alone.ask(Job(), "sub/stored.mp4", "Why?", 2, "topk").count("<img") == 5 * 2
    after = FrameStore(library.store, library.scorer.clip.identity).features("sub/stored.mp4")
    np.testing.assert_allclose(after, before, atol=0.5)  # they were made from frames before JPEG
    with pytest.raises(ValueError, match="is no frame store"):
        Library(None, library.folder, library.scorer)


def test_two_requests_at_once(server):
    numbers = [ask(server, video=name, num_frames=3) for name in ("short.mp4", "long.mp4", "short.mp4")]
    jobs = [wait(server, number) for number in numbers]
    assert [job["state"] for job in jobs] == ["done"] * 3
    assert ["short.mp4" in job["html"] for job in jobs] == [True, False, True]


def test_names_that_are_no_utf_8_and_links_out_of_the_folder(server):
    path = Path(os.fsdecode(os.fsencode(server.library.folder) + b"/caf\xe9.mp4"))
    path.touch()
    status, html = request(server, "/")
    path.unlink()
    assert status == 200 and "<option>caf?.mp4</option>" in html
    assert "link.mp4" not in html and "<option>long.mp4</option>" in html


def test_a_broken_video_is_said_and_the_next_question_is_answered(server):
    job = wait(server, ask(server, video="broken.mp4"))
    assert job["state"] == "failed" and "is not a video, truncated or damaged" in job["html"]
    assert wait(server, ask(server, video="short.mp4"))["state"] == "done"


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/passwd", "link.mp4", "..%2Fsecret.mp4", "", "none.mp4"])
def test_files_outside_the_folder_do_not_exist(server, name):
    status, answer = request(server, "/questions", "POST", {"video": name, "question": "What?"})
    assert status == 404 and "there is no video" in answer["error"]
    assert request(server, f"/videos/{name}" if name else "/x")[0] == 404
    assert request(server, "/../secret.mp4")[0] == 404


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (b"[" * 50_000, 400, "not JSON"),
        ({"video": "long.mp4", "question": " "}, 400, "video and question are needed"),
        ({"video": "long.mp4", "question": "W?", "num_frames": 0}, 400, "num_frames must be a number from 1"),
        ({"video": "long.mp4", "question": "W?", "method": "best"}, 400, "method must be one of topk"),
        (b"x" * 100_001, 413, "more than 100000 bytes"),
    ],
)
def test_wrong_questions(server, body, status, message):
    found, answer = request(server, "/questions", "POST", body)
    assert found == status and message in answer["error"]


def test_uploads(server, tmp_path):
    video = write_video(tmp_path / "new.mp4", num_frames=50).read_bytes()
    assert request(server, "/videos/new%20one.mp4", "PUT", video) == (200, {"video": "new one.mp4"})
    assert "new one.mp4" in request(server, "/videos")[1]["videos"]
    assert wait(server, ask(server, video="new one.mp4"))["state"] == "done"
    for name, body, status, message in [
        ("text.mp4", b"hello", 415, "text.mp4 is not a video"),
        ("empty.mp4", b"", 415, "is empty"),
        ("notes.txt", video, 400, "is not the name of a video"),
        ("..%2Fout.mp4", video, 400, "is not the name of a video"),
        ("a%00.mp4", video, 400, "is not the name of a video"),
        (f"{'x' * 300}.mp4", video, 500, "File name too long"),
        ("long.mp4", video, 409, "there is a video long.mp4 already"),
        ("big.mp4", b"x" * 200_001, 413, "more than 200000 bytes"),
    ]:
        found, answer = request(server, f"/videos/{name}", "PUT", body)
        assert found == status and message in answer["error"], (name, answer)
    left = {path.name for path in server.library.folder.iterdir()}
    assert left == {"long.mp4", "short.mp4", "broken.mp4", "link.mp4", "new one.mp4"}


def test_other_sites_may_not_ask(server):
    assert request(server, "/", Host="evil.example")[0] == 403
    assert request(server, "/questions", "POST", {}, Origin="http://evil.example")[0] == 403
    assert "Invalid IPv6" in request(server, "/videos", Origin="http://[")[1]["error"]


def test_too_many_questions(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_WAITING", 0)
    status, answer = request(server, "/questions", "POST", {"video": "long.mp4", "question": "W?"})
    assert status == 503 and "too many questions" in answer["error"]


def chromedriver(port, path, body, method="POST"):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), method=method)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())["value"]


@pytest.mark.skipif(not (shutil.which("chromedriver") and shutil.which("chromium")), reason="needs chromium-driver")
def test_the_page_in_a_browser(server):
    """A person types a question and presses the button; curve, frames and answer appear."""
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        session = None
        try:
            line = next(line for line in driver.stdout if "started successfully on port" in line)
            port = int(line.rstrip(".\n").rsplit(" ", 1)[1])
            options = {"binary": shutil.which("chromium"), "args": ["--headless=new", "--no-sandbox", "--disable-gpu"]}
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            session = f"/session/{chromedriver(port, '/session', wanted)['sessionId']}"

            def run(script, *args):
                return chromedriver(port, f"{session}/execute/sync", {"script": script, "args": args})

            chromedriver(port, f"{session}/url", {"url": f"http://127.0.0.1:{server.server_address[1]}/"})
            run("document.getElementById('video').value = 'short.mp4'")
            run("document.getElementById('question').value = arguments[0]", "Who opens the door?")
            run("document.getElementById('ask').click()")
            for _ in range(300):
                state = run("return document.getElementById('state').textContent")
                if state in ("done", "failed"):
                    break
                time.sleep(0.1)
            assert state == "done"
            pictures = "return [...document.images].filter(i => i.complete && i.naturalWidth > 0).length"
            assert run("return document.querySelectorAll('#result svg polyline').length") == 2
            assert run(pictures) == 5 * 5
            assert "5 frames <b> Who" in run("return document.getElementById('result').textContent")
            run("document.getElementById('video').value = 'broken.mp4'; document.getElementById('ask').click()")
            for _ in range(100):
                if "not a video" in run("return document.getElementById('result').textContent"):
                    break
                time.sleep(0.1)
            assert "not a video" in run("return document.getElementById('result').textContent")
        finally:
            if session:
                chromedriver(port, session, {}, "DELETE")  # ends the browser, which outlives its driver otherwise
            driver.terminate()
