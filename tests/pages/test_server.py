"""Real HTTP requests to a real server. The page in a browser: test_ask_page.py."""

import io
import json
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from video_files import shown_numbers, write_video

from tspo_jax.checkpoints.folders import ClipEncoder
from tspo_jax.data.decode import Video
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.pages import server as serve
from tspo_jax.pages.library import Job, Library, RequestError


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


def fetch(server, path, **headers):
    """(status, type of the content, content)."""
    url = f"http://127.0.0.1:{server.server_address[1]}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
            return response.status, response.headers.get_content_type(), response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get_content_type(), error.read()


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


def test_videos_in_folders_below(server):
    """A link to a folder outside is none of them."""
    library = server.library
    (library.folder / "trip").mkdir()
    os.link(library.folder / "short.mp4", library.folder / "trip" / "day 1.mp4")
    (library.folder / "out").symlink_to(library.folder.parent)
    try:
        assert "trip/day 1.mp4" in library.names() and not [name for name in library.names() if "secret" in name]
        assert wait(server, ask(server, video="trip/day 1.mp4"))["state"] == "done"
        assert fetch(server, "/videos/trip%2Fday%201.mp4")[0] == 200
        assert request(server, "/videos/out/secret.mp4")[0] == request(server, "/previews/out/secret.mp4")[0] == 404
    finally:
        (library.folder / "out").unlink()
        shutil.rmtree(library.folder / "trip")


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


def test_the_video_and_its_pictures(server):
    """Whole and in parts; a preview of each, and stills of those that are decoded."""
    whole = (server.library.folder / "long.mp4").read_bytes()
    assert fetch(server, "/videos/long.mp4") == (200, "video/mp4", whole)
    assert fetch(server, "/videos/long.mp4", Range="bytes=100-199") == (206, "video/mp4", whole[100:200])
    assert fetch(server, "/videos/long.mp4", Range=f"bytes={len(whole)}-")[0] == 416
    status, answer = request(server, "/videos/sub/stored.mp4")
    assert status == 404 and "not the file" in answer["error"]
    for name, seconds in (("long.mp4", 40), ("short.mp4", 5), ("sub/stored.mp4", 5), ("sub%2Fstored.mp4", 5)):
        status, answer = request(server, f"/previews/{name}")
        assert status == 200 and answer["seconds"] == pytest.approx(seconds, abs=0.1)
        assert answer["picture"].startswith("data:image/jpeg;base64,")
    assert request(server, "/previews/broken.mp4")[0] == 415
    assert request(server, "/previews/none.mp4")[0] == request(server, "/stills/none.mp4?at=1")[0] == 404
    shades = []
    for seconds in ("0", "1.99", "2", "4.2", "99"):
        status, kind, data = fetch(server, f"/stills/sub/stored.mp4?at={seconds}")
        assert (status, kind) == (200, "image/jpeg")
        shades += shown_numbers([np.asarray(Image.open(io.BytesIO(data)))])
    assert shades == [0, 25, 50, 40, 40], "the last of the frames at 0, 1 .. 4 seconds that was shown by then"
    assert request(server, "/stills/sub/stored.mp4?at=x") == (400, {"error": "at must be a number of seconds"})


def test_an_answer_without_pictures(server):
    """What a click on a method asks for."""
    job = wait(server, ask(server, video="short.mp4", num_frames=2, method="bin-max", show=False))
    assert job == {"state": "done", "share": job["share"], "html": "", "answer": "2 frames <b> Who"}
    status, answer = request(server, "/questions", "POST", {"video": "long.mp4", "question": "W?", "show": 1})
    assert status == 400 and "show must be" in answer["error"]


def test_the_page_runs_only_files_of_the_server(server):
    """And is in no frame of another site; its links ask at once only where the user typed or kept them."""
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    with urllib.request.urlopen(url, timeout=60) as response:
        rules, html = response.headers["Content-Security-Policy"], response.read().decode()
    assert "default-src 'self'" in rules and "frame-ancestors 'none'" in rules and "unsafe" not in rules
    files = re.findall(r"(?:src|href)='(/[^']*)'", html)
    assert len(files) == 4 and all(fetch(server, path)[0] == 200 for path in files)
    assert request(server, "/static/../server.py")[0] == request(server, "/static/none.css")[0] == 404
    for site, at_once in (("none", True), ("same-origin", True), ("cross-site", False), ("same-site", False)):
        assert ("data-at-once" in request(server, "/", **{"Sec-Fetch-Site": site})[1]) == at_once
    assert "data-at-once" not in request(server, "/")[1]


def test_a_body_of_unknown_length_or_that_ends_early(server):
    for head, body, status in (
        ("PUT /videos/n.mp4 HTTP/1.1\r\nTransfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n", 411),
        ("POST /questions HTTP/1.1\r\nContent-Length: 2", "[]", 400),
        ("DELETE /videos/long.mp4 HTTP/1.1", "", 404),
        ("POST / HTTP/1.1\r\nContent-Length: 0", "", 404),
    ):
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(f"{head}\r\nHost: localhost\r\n\r\n{body}".encode())
            assert connection.makefile().readline().split()[1] == str(status), head
    with socket.create_connection(server.server_address) as connection:
        connection.sendall(b"PUT /videos/n.mp4 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhello")
        wait_for_partial_videos(server, 1)
    wait_for_partial_videos(server, 0)


def wait_for_partial_videos(server, number):
    for _ in range(1200):
        found = list(server.library.folder.glob(".upload_*"))
        if len(found) == number:
            return
        time.sleep(0.05)
    raise AssertionError(found)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: lo",
        b"PUT /videos/n.mp4 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhel",
    ],
)
def test_a_silent_client_does_not_keep_its_connection(server, monkeypatch, sent):
    monkeypatch.setattr(serve, "SILENCE", 0.2)
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(sent)
        assert connection.recv(1) == b"", "closed"


def test_other_sites_may_not_ask(server):
    assert request(server, "/", Host="evil.example")[0] == 403
    assert request(server, "/questions", "POST", {}, Origin="http://evil.example")[0] == 403
    assert "Invalid IPv6" in request(server, "/videos", Origin="http://[")[1]["error"]


def test_too_many_questions(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_WAITING", 0)
    status, answer = request(server, "/questions", "POST", {"video": "long.mp4", "question": "W?"})
    assert status == 503 and "too many questions" in answer["error"]
