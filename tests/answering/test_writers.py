import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tspo_jax.answering import writers
from tspo_jax.answering.writers import estimated_tokens, open_writer

# ---- a user's function


def echo(prompts):
    return [prompt.upper() for prompt in prompts]


def slow(prompts):
    time.sleep(0.5)
    return prompts


def broken(prompts):
    raise RuntimeError("no licence")


def short(prompts):
    return []


def numbers(prompts):
    return list(range(len(prompts)))


not_a_function = 7


def test_function():
    writer = open_writer(f"{__name__}:echo")
    assert [reply.text for reply in writer.write(["a", "b"])] == ["A", "B"]
    assert writer.identity == f"{__name__}:echo"


@pytest.mark.parametrize(
    ("name", "error"),
    [("slow", "no reply within 0.04 s"), ("broken", "no licence"), ("short", "0 texts"), ("numbers", "a int, no text")],
)
def test_function_that_fails(name, error):
    replies = open_writer(f"{__name__}:{name}", timeout=0.02).write(["a", "b"])
    assert [reply.text for reply in replies] == [None, None]
    assert all(error in reply.error for reply in replies)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("no_such_module_here:f", "cannot be imported"),
        (f"{__name__}:nothing", "cannot be imported"),
        (f"{__name__}:not_a_function", "a int, not a function"),
        ("gpt", "neither module:function nor"),
        ("http://localhost:1/v1", "name of a model"),
        ("http://user:secret@localhost/v1", "without a key"),
    ],
)
def test_names_that_mean_nothing(name, error):
    with pytest.raises(ValueError, match=error) as caught:
        open_writer(name, model="m" if "secret" in name else "")
    assert "secret" not in str(caught.value)


def test_limits():
    with pytest.raises(ValueError, match="timeout is 0"):
        open_writer(f"{__name__}:echo", timeout=0)
    with pytest.raises(ValueError, match="no room"):
        open_writer(f"{__name__}:echo", context=100, max_new_tokens=100)


# ---- an address


class Server(BaseHTTPRequestHandler):
    seen: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append((self.path, dict(self.headers), body))
        prompt = body["messages"][0]["content"]
        if prompt == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")
            self.end_headers()
            return
        if prompt == "late":
            time.sleep(0.6)
        self.send_response(503 if prompt == "down" else 200)
        self.end_headers()
        if prompt == "drip":
            for _ in range(20):
                with contextlib.suppress(OSError):  # the other side has hung up
                    self.wfile.write(b"\n")
                    self.wfile.flush()
                time.sleep(0.05)
        message = {"content": None if prompt == "empty" else prompt[::-1]}
        answer = b"<html>" if prompt == "html" else json.dumps({"choices": [{"message": message}]}).encode()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_address(address, monkeypatch):
    monkeypatch.setenv(writers.KEY_VARIABLE, "s3cret")
    Server.seen.clear()
    writer = open_writer(address, model="big", max_new_tokens=7, timeout=0.3)
    prompts = ["abc", "down", "html", "empty", "late", "redirect"]
    replies = writer.write(prompts)
    assert replies[0].text == "cba" and [reply.text for reply in replies[1:]] == [None] * 5
    for reply, error in zip(replies[1:], ("503", "another form", "without a text", "within 0.3 s", "302"), strict=True):
        assert error in reply.error and "s3cret" not in reply.error
    assert "s3cret" not in writer.identity
    assert {path for path, *_ in Server.seen} == {"/v1/chat/completions"}  # nothing was sent to where it redirects
    (_, headers, body), *_ = [one for one in Server.seen if one[2]["messages"][0]["content"] == "abc"]
    assert headers["Authorization"] == "Bearer s3cret"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("big", 7, 0)


def test_a_server_that_keeps_the_connection_alive_is_late_too(address):
    began = time.monotonic()
    (reply,) = open_writer(address, model="big", timeout=0.3).write(["drip"])
    assert "within 0.3 s" in reply.error and time.monotonic() - began < 0.8
    assert open_writer(address, model="big", timeout=30).write(["drip"])[0].text == "pird"


@pytest.mark.parametrize("key", ["s3cret\n", "s3 cret", "s3cr\u00e9t"])
def test_a_key_that_no_header_can_hold(key, monkeypatch):
    monkeypatch.setenv(writers.KEY_VARIABLE, key)
    with pytest.raises(ValueError, match=writers.KEY_VARIABLE) as found:
        open_writer("http://127.0.0.1:9/v1", model="big")
    assert "s3" not in str(found.value)


def test_address_without_a_key_and_without_a_server(address, monkeypatch):
    monkeypatch.delenv(writers.KEY_VARIABLE, raising=False)
    Server.seen.clear()
    assert open_writer(address, model="big").write(["ab"])[0].text == "ba"
    assert "Authorization" not in Server.seen[0][1]
    (reply,) = open_writer("http://127.0.0.1:9/v1", model="big", timeout=2).write(["a"])
    assert "cannot be reached" in reply.error
    assert open_writer(address, model="big").write([]) == []


def test_estimated_tokens():
    assert estimated_tokens("") == 0 and estimated_tokens("abcd") == 2 and estimated_tokens("é\ud800") >= 1
