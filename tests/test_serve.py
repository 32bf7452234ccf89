"""Real HTTP requests to a real server, and the page in headless Chromium where there is one."""

import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
from video_files import write_video

from tspo_jax import scoring, select_frames, serve


@pytest.fixture(scope="module")
def encoded():
    """Names of videos that were decoded and encoded."""
    return []


@pytest.fixture(scope="module")
def server(golden, tmp_path_factory, encoded):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "videos").mkdir()
    (folder / "secret.mp4").write_bytes(b"not for the page")
    (folder / "videos" / "link.mp4").symlink_to(folder / "secret.mp4")
    shutil.copy(golden / "tspo_agent.mp4", folder / "videos" / "long.mp4")
    write_video(folder / "videos" / "short.mp4", num_frames=125)
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    with pytest.MonkeyPatch.context() as patch:

        def encode_video(video, *args):
            encoded.append(video.info.path.rsplit("/", 1)[1])
            return scoring.encode_video(video, *args)

        patch.setattr(select_frames, "encode_video", encode_video)
        library = serve.Library(
            folder / "videos",
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


def test_a_question_and_a_second_one_that_encodes_nothing(server, encoded):
    job = wait(server, ask(server, video="long.mp4", num_frames=4))
    assert job["state"] == "done" and (job["done"], job["total"]) == (40, 40), job
    assert job["html"].count("<img") == 5 * 4 and "4 frames &lt;b&gt; Who" in job["html"] and "polyline" in job["html"]
    assert encoded.count("long.mp4") == 1
    again = wait(server, ask(server, video="long.mp4", question="Why?\nA. So\nB. Not so", method="uniform"))
    assert again["state"] == "done" and again["total"] == 0 and "frames &lt;b&gt; Why" in again["html"]
    assert encoded.count("long.mp4") == 1


def test_two_requests_at_once(server):
    numbers = [ask(server, video=name, num_frames=3) for name in ("short.mp4", "long.mp4", "short.mp4")]
    jobs = [wait(server, number) for number in numbers]
    assert [job["state"] for job in jobs] == ["done"] * 3
    assert ["short.mp4" in job["html"] for job in jobs] == [True, False, True]


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
