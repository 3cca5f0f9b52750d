"""An OpenAI-compatible server over HTTP: what is asked, what is tried again, what an answer must hold."""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from hipexp.config.schema import ConfigError
from hipexp.run.ledger import RunFailed

LOG = logging.getLogger("hipexp")
KEY = "OPENAI_API_KEY"
BUSY = (408, 425, 429, 500, 502, 503, 504)  # may be over in a moment
DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # between tries
MOST_DELAY_S = 60.0  # of what a server asks for
CONNECT_S, ASIDE_S = 10.0, 10.0
SHOWN = 300  # characters of an answer that a message shows
SHORT = 8  # a key of fewer characters may be a part of other words
ENDS = ("stop", "length", "eos_token", "stop_sequence", None)  # None: some servers give no reason
REPAIRS = {
    401: f"set {KEY} to a key of this server",
    403: f"set {KEY} to a key of this server that may use the model",
    404: "check model.base_url, which most often ends in /v1, and model.path, the model's id there",
    500: "the server's own log says more",
    429: "wait, or use a smaller model.concurrent; finished samples are kept",
}


class Refused(ConfigError):
    """The server will not do what it was asked, however often; ``code`` is its HTTP status."""

    def __init__(self, reason: str, code: int):
        super().__init__(reason)
        self.code = code


class Unwell(RunFailed):
    """The server did not do what it was asked in any try; ``code`` is its last HTTP status, None without one."""

    def __init__(self, reason: str, code: int | None):
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Answer:
    """What came back. ``finish``: why it ends; ``prompt_tok``, ``new_tok``: as the server counted; None is what it did not say.

    ``by``: the model and its fingerprint as the server names them; ``request_ms``: of the whole request, its last try.
    """

    text: str
    finish: str | None
    prompt_tok: int | None
    new_tok: int | None
    by: str
    request_ms: float


class Endpoint:
    """The server at ``base_url``. An API key comes from ``$OPENAI_API_KEY`` and is never shown or written.

    Requests that fail for a moment are made again, after pauses. Safe to use from several threads.
    """

    def __init__(self, base_url: str, timeout_s: float):
        self.base_url, self._timeout_s, self._stopped = base_url.rstrip("/"), timeout_s, Event()
        self._ids: list[str] = []
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"{KEY} must be printable ASCII, which it is not; set it again, or unset it for a server without keys")
        self._secret = pattern_of(self._key)
        proxies = [urllib.request.ProxyHandler({})] if is_here(base_url) else []
        self._opener = urllib.request.build_opener(NoRedirect, Http, Https, *proxies)

    def stop(self) -> None:
        """No more tries: whoever waits for one gives up."""
        self._stopped.set()

    def complete(self, body: dict[str, Any]) -> Answer:
        """The continuation of a prompt. Raises as ``post``, and ``RunFailed`` for an answer that is none."""
        return self._answer("/completions", body)

    def chat(self, body: dict[str, Any]) -> Answer:
        """The answer to messages. Raises as ``complete``."""
        return self._answer("/chat/completions", body)

    def count_chat(self, body: dict[str, Any]) -> int | None:
        """The tokens that the server counts in messages, whatever it answers; None if it does not count. Raises as ``post``."""
        usage = self.post("/chat/completions", body)[0].get("usage")
        return count(usage, "prompt_tokens") if isinstance(usage, dict) else None

    def _answer(self, path: str, body: dict[str, Any]) -> Answer:
        told, request_ms = self.post(path, body)
        try:
            made = read_answer(told, request_ms)
            if len(self._key) >= SHORT and self._secret.search(made.text):
                raise ValueError(f"its text holds {KEY}, which is written nowhere")
            return replace(made, by=self._hide(made.by))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            why = self._hide(str(error)) if isinstance(error, ValueError) else "it has not the form of an answer"
            raise RunFailed(f"{self.base_url}{path} answered with what cannot be scored: {why} ({self._show(json.dumps(told))})") from error

    def post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """What the server answers, and how many ms it took. Raises ``Refused`` for what trying again cannot mend, else ``RunFailed``."""
        url, code = self.base_url + path, None
        for number, delay in enumerate((*DELAYS_S, None), start=1):
            started = time.perf_counter()
            try:
                with failures_in_words(url, self._timeout_s):
                    data = self._send(url, json.dumps(body).encode(), self._timeout_s)
                return self._read(url, data), (time.perf_counter() - started) * 1e3
            except urllib.error.HTTPError as error:
                reason, asked_s, code = self._reason(url, error), wait_of(error), error.code
                if error.code not in BUSY:
                    raise Refused(reason, error.code) from error
            except Broken as error:
                reason, asked_s, code = self._hide(str(error)), 0.0, None
            if delay is None or self._stopped.is_set():
                break
            pause = min(max(delay, asked_s), MOST_DELAY_S)
            LOG.warning("%s; try %d of %d in %.0f s", reason, number + 1, len(DELAYS_S) + 1, pause)
            if self._stopped.wait(pause):
                break
        raise Unwell(f"{reason}; the same command continues once the server is well", code)

    def about(self, model: str) -> dict[str, Any]:
        """What the server says of itself and of a model, as far as it does not change by itself: ``version``, and its entry in the list."""
        listed = self._look(f"{self.base_url}/models").get("data")
        models = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        entries = {one["id"]: one for one in models if isinstance(one.get("id"), str)}
        self._ids = list(entries)
        entry = entries.get(model, {})
        version = self._look(f"{self.base_url.removesuffix('/v1')}/version").get("version")
        lists = {name: entry[name] for name in ("owned_by", "root", "max_model_len", "meta") if name in entry}
        with suppress(RecursionError):
            return {"version": self._hide_in(version), "lists": self._hide_in(lists)}
        return {"version": None, "lists": {}}

    def _look(self, url: str) -> dict[str, Any]:
        with suppress(OSError, http.client.HTTPException, ValueError, RecursionError):
            told = json.loads(self._send(url, None, ASIDE_S))
            return told if isinstance(told, dict) else {}
        return {}

    def _send(self, url: str, data: bytes | None, timeout_s: float) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "hipexp"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        with self._opener.open(urllib.request.Request(url, data, headers), timeout=timeout_s) as response:
            return bytes(response.read())

    def _read(self, url: str, data: bytes) -> dict[str, Any]:
        with suppress(ValueError, RecursionError):
            told = json.loads(data)
            json.dumps(told)  # so that nothing later is nested too deeply
            if isinstance(told, dict):
                return told
        raise RunFailed(
            f"{url} answered with no JSON object, or one too deep, as no OpenAI-compatible server does: "
            f"{self._show(data.decode(errors='replace'))}"
        )

    def _reason(self, url: str, error: urllib.error.HTTPError) -> str:
        with error:
            try:
                body = error.read().decode(errors="replace")
            except (OSError, http.client.HTTPException):
                body = ""
        repair = f"; {REPAIRS[error.code]}" if error.code in REPAIRS else ""
        if error.code == 404 and self._ids:
            repair += f" (the server has {self._hide(', '.join(self._ids[:10]))})"
        return f"{url} answered {error.code} {self._hide(str(error.reason))}: {self._show(body) or 'nothing more'}{repair}"

    def _show(self, text: str) -> str:
        """The beginning of an answer, on one line, without the key."""
        text = " ".join(self._hide(text).split())
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"

    def _hide(self, text: str) -> str:
        """A text of the server without the key, and with U+FFFD for what is no character."""
        return self._secret.sub("***", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def _hide_in(self, told: Any) -> Any:
        """What JSON holds, without the key. Raises ``RecursionError`` where it is nested too deeply."""
        if isinstance(told, dict):
            return {self._hide(name): self._hide_in(value) for name, value in told.items()}
        if isinstance(told, list):
            return [self._hide_in(value) for value in told]
        return self._hide(told) if isinstance(told, str) else told


def pattern_of(key: str) -> re.Pattern[str]:
    """Finds a key in a text, also as JSON writes it; a short one only as a whole word, and an empty one never."""
    if not key:
        return re.compile(r"(?!)")
    quoted = json.dumps(key)[1:-1]
    forms = "|".join(map(re.escape, (quoted.replace("/", r"\/"), quoted, key)))
    return re.compile(rf"(?<!\w)(?:{forms})(?!\w)" if len(key) < SHORT else forms)


class Broken(Exception):
    """A connection that could not be made, or that broke."""


@contextmanager
def failures_in_words(url: str, timeout_s: float) -> Iterator[None]:
    """What goes wrong below HTTP becomes ``Broken``; no answer in time becomes ``RunFailed``, since the next try would take as long."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except TimeoutError as error:
        raise RunFailed(f"{url} gave no answer within model.timeout_s={timeout_s:g}; use a larger one, or shorter prompts") from error
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        raise Broken(f"{url} cannot be reached, or broke off ({cause or type(error).__name__}); is the server running there?") from error


def wait_of(error: urllib.error.HTTPError) -> float:
    """The seconds that a server asks to wait."""
    try:
        return max(0.0, float(error.headers.get("Retry-After") or 0))
    except ValueError:  # a date
        return 0.0


def read_answer(told: dict[str, Any], request_ms: float) -> Answer:
    """The answer in a response; ValueError says why it is none (a strange form raises other errors)."""
    if not told.get("choices"):
        raise ValueError("it holds no choice")
    choice, usage = told["choices"][0], told.get("usage") or {}
    finish = choice.get("finish_reason")
    if finish not in ENDS:
        raise ValueError(f"it ended by {json.dumps(finish)}, which is neither a stop nor the limit of new tokens")
    by = " ".join(told[name] for name in ("model", "system_fingerprint") if isinstance(told.get(name), str))
    text = choice["text"] if "text" in choice else text_of_message(choice["message"])
    if not isinstance(text, str):
        raise ValueError("its text is none")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("its text holds half of a surrogate pair, which is no character")
    return Answer(text, finish, count(usage, "prompt_tokens"), count(usage, "completion_tokens"), by, request_ms)


def text_of_message(message: dict[str, Any]) -> str:
    """What an assistant says; ValueError where it only thought, called a tool or refused."""
    if message.get("content") is None:
        for name in ("reasoning_content", "reasoning", "tool_calls", "refusal"):
            if message.get(name):
                raise ValueError(f"the message holds {name} and no text; switch that off in the server, or use model.prompt=tokens")
    return str(message.get("content") or "")


def count(usage: dict[str, Any], name: str) -> int | None:
    """A number of tokens, or None where there is none."""
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_here(url: str) -> bool:
    """Whether a server is on this machine, where no proxy leads."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A server that has moved is an error: a request that follows would lose its body and give the key to somebody else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Patient(http.client.HTTPConnection):
    """A connection that is soon made or not at all, and then waits long for an answer."""

    def connect(self) -> None:
        patience, self.timeout = self.timeout, CONNECT_S
        try:
            super().connect()
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {CONNECT_S:g} s") from error
        self.sock.settimeout(patience)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class PatientTls(Patient, http.client.HTTPSConnection):
    """The same over TLS."""


class Http(urllib.request.HTTPHandler):
    """Opens patient connections."""

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(Patient, request)


class Https(urllib.request.HTTPSHandler):
    """Opens patient connections over TLS."""

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(PatientTls, request)
