"""Language models that reply to a text alone, behind one protocol (calls.Writer).

`open_writer` takes what a user names: a function of their own (`module:function`), or an OpenAI-compatible address.
The address is used only where it is named, and its key only comes from the environment. A writer never raises for what
a model or a network does: such a reply has an error in place of its text, and whoever asked goes on without it.
"""

import http.client
import importlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from tspo_jax.answering.calls import Reply, Writer

KEY_VARIABLE = "TSPO_WRITER_KEY"  # environment variable of an address's key; without it none is sent
_BYTES_PER_TOKEN = 3  # of a tokenizer that is not known: English has 4 or more, so the count is no less
_LONGEST_ERROR = 200


def open_writer(
    name: str, *, model: str = "", context: int = 32768, max_new_tokens: int = 1024, timeout: float = 120.0
) -> Writer:
    """The writer that `name` means: "module:function", or "http://..." or "https://..." of an address.

    Args:
      model: that the address is asked for.
      context: tokens of a prompt and its reply together.
      max_new_tokens: of a reply.
      timeout: seconds after which a reply is given up.
    Raises: ValueError for a name that means nothing, a function that cannot be imported and an address without a model.
    """
    if timeout <= 0:
        raise ValueError(f"the writer's timeout is {timeout} s; it must be positive")
    if not 0 < max_new_tokens < context:
        raise ValueError(f"the writer's context of {context} tokens has no room for {max_new_tokens} new ones")
    if name.startswith(("http://", "https://")):
        return AddressWriter(name, model, context, max_new_tokens, timeout)
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"the writer {name!r} is neither module:function nor an http address")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the writer {name!r} cannot be imported ({error})") from error
    if not callable(found):
        raise ValueError(f"the writer {name!r} is a {type(found).__name__}, not a function")
    return FunctionWriter(found, name, context, max_new_tokens, timeout)


class FunctionWriter:
    """A user's function: list of prompts -> list of as many texts.

    A call that takes longer than `timeout` seconds for each of its prompts is given up; Python cannot end its thread,
    which goes on behind.
    """

    def __init__(
        self,
        function: Callable[[list[str]], Sequence[str]],
        identity: str,
        context: int = 32768,
        max_new_tokens: int = 1024,
        timeout: float = 120.0,
    ):
        self.identity, self.context, self.max_new_tokens = identity, context, max_new_tokens
        self._function, self._timeout = function, timeout

    def count(self, text: str) -> int:
        return estimated_tokens(text)

    def write(self, prompts: Sequence[str]) -> list[Reply]:
        result: list = []

        def call() -> None:
            try:
                result.append(list(self._function(list(prompts))))
            except Exception as error:  # of the user's code, whatever it is
                result.append(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(limit := self._timeout * len(prompts))
        if not result:
            return [_failed(f"{self.identity}: no reply within {limit:g} s")] * len(prompts)
        (texts,) = result
        if isinstance(texts, Exception):
            return [_failed(f"{self.identity}: {type(texts).__name__}: {texts}")] * len(prompts)
        if len(texts) != len(prompts):
            return [_failed(f"{self.identity}: {len(texts)} texts for {len(prompts)} prompts")] * len(prompts)
        return [
            Reply(text) if isinstance(text, str) else _failed(f"{self.identity}: a {type(text).__name__}, no text")
            for text in texts
        ]


class AddressWriter:
    """An OpenAI-compatible server: POST `address`/chat/completions, greedy, one message a prompt.

    The key is that of the environment variable KEY_VARIABLE; it is in no file and no message, and it is not sent on to
    where the server redirects.
    """

    def __init__(self, address: str, model: str, context: int, max_new_tokens: int, timeout: float, at_once: int = 8):
        if not model:
            raise ValueError(f"the writer {address} needs the name of a model")
        parts = urlsplit(address)
        if not parts.hostname or parts.username or parts.password or parts.query:
            raise ValueError("the writer's address must be http(s)://host[:port]/path, without a key or a query in it")
        if not all("!" <= char <= "~" for char in os.environ.get(KEY_VARIABLE, "")):
            raise ValueError(f"the environment variable {KEY_VARIABLE} holds a space, a line break or another odd sign")
        self.identity = f"{address} {model} {max_new_tokens}"
        self.context, self.max_new_tokens = context, max_new_tokens
        self._address = address.rstrip("/") + "/chat/completions"
        self._model, self._timeout, self._at_once = model, timeout, at_once
        self._opener = urllib.request.build_opener(_NoRedirect)

    def count(self, text: str) -> int:
        return estimated_tokens(text)

    def write(self, prompts: Sequence[str]) -> list[Reply]:
        with ThreadPoolExecutor(min(self._at_once, max(len(prompts), 1))) as pool:
            return list(pool.map(self._ask, prompts))

    def _ask(self, prompt: str) -> Reply:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.max_new_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                came = b""
                while part := answer.read1():  # a server may keep a connection alive for long, byte by byte
                    came += part
                    if time.monotonic() > deadline:
                        raise TimeoutError
            text = json.loads(came)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            return _failed(f"the writer's server answered {error.code} {error.reason}")
        except TimeoutError:
            return _failed(f"no reply of the writer's server within {self._timeout:g} s")
        except (OSError, http.client.HTTPException) as error:
            return _failed(f"the writer's server cannot be reached ({getattr(error, 'reason', error)})")
        except (ValueError, KeyError, IndexError, TypeError):
            return _failed("the writer's server answered in another form than choices[0].message.content")
        return Reply(text) if isinstance(text, str) else _failed("the writer's server answered without a text")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None  # then the redirect is an HTTPError


def estimated_tokens(text: str) -> int:
    """Tokens of a text for a tokenizer that is not known, rather more than fewer."""
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


def _failed(error: str) -> Reply:
    return Reply(None, error[:_LONGEST_ERROR])
