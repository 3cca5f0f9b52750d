"""Requests to a server: what is tried again, what is an error, and that the key stays where it belongs."""

import json
import logging
import socket
import threading
import urllib.error

import pytest

from hipexp.config.schema import ConfigError
from hipexp.run import endpoint
from hipexp.run.endpoint import Endpoint, Refused, is_here, wait_of
from hipexp.run.ledger import RunFailed, classify
from openai_stub import Reply, Stub

BODY = {"model": "served", "prompt": "The pass key is 71.\nThe pass key is", "max_tokens": 5, "temperature": 0}
SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "DELAYS_S", (0.0, 0.01, 0.01))
    monkeypatch.delenv(endpoint.KEY, raising=False)


@pytest.fixture
def server():
    with Stub() as stub:
        yield stub


def ask(server, timeout_s=10.0):
    return Endpoint(server.url, timeout_s).complete(BODY)


def test_an_answer_with_all_that_the_server_says(server):
    server.always.change = lambda told: told | {"system_fingerprint": "fp_1"}
    made = ask(server)
    assert (made.text, made.finish, made.prompt_tok, made.new_tok, made.by) == (" 71.", "stop", 29, 3, "served@1 fp_1")
    assert made.request_ms > 0
    path, headers, body = server.asked[0]
    assert (path, body) == ("/v1/completions", BODY)
    assert "Authorization" not in headers


BUSY = [Reply(429, headers={"Retry-After": "0"}), Reply(500, b"out of memory"), Reply(cut=True), Reply(503, b"loading")]


@pytest.mark.parametrize("reply", BUSY, ids=["429", "500", "cut", "503"])
def test_what_may_be_over_in_a_moment_is_tried_again(server, reply, caplog):
    server.replies = [reply, reply]
    with caplog.at_level(logging.WARNING, logger="hipexp"):
        assert ask(server).text == " 71."
    assert len(server.asked) == 3
    assert "try 2 of 4" in caplog.text


def test_tries_come_to_an_end(server):
    server.always = Reply(500, b"CUDA error: " + b"x" * 1000)
    with pytest.raises(
        RunFailed, match=r"/v1/completions answered 500 Internal Server Error: CUDA error: x+…; the server's own log"
    ) as caught:
        ask(server)
    assert len(server.asked) == 4
    assert len(str(caught.value)) < 600


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RunFailed, match=rf"{url}/completions cannot be reached, or broke off \(.*refused\); is the server running there"):
        Endpoint(url, 5.0).complete(BODY)


@pytest.mark.parametrize(
    "status, words",
    [
        (400, "answered 400 Bad Request: .*context is 4096 tokens"),
        (401, "set OPENAI_API_KEY to a key of this server"),
        (404, r"check model\.base_url, which most often ends in /v1, and model\.path, .* \(the server has served\)"),
        (422, "answered 422"),
        (302, "answered 302"),
    ],
)
def test_what_trying_again_cannot_mend_is_refused_at_once(server, status, words):
    server.always = Reply(status, b'{"error": "the context is 4096 tokens"}', {"Location": f"{server.url}/elsewhere"})
    asked = Endpoint(server.url, 10.0)
    asked.about("served")
    with pytest.raises(Refused, match=words) as caught:
        asked.complete(BODY)
    assert len(server.asked) == 1
    assert classify(caught.value) == "bad_config"


def first(**changed):
    return lambda told: told | {"choices": [told["choices"][0] | changed]}


@pytest.mark.parametrize(
    "reply, words",
    [
        (Reply(body=b"<html>Welcome</html>"), "answered with no JSON object, .*<html>Welcome"),
        (Reply(body=b"[]"), "answered with no JSON object"),
        (Reply(body=b'{"choices":' * 100_000), "answered with no JSON object, or one too deep"),
        (Reply(change=first(text="71 \ud83d")), "its text holds half of a surrogate pair"),
        (Reply(body=b'{"error": {"message": "no such adapter"}}'), "it holds no choice .*no such adapter"),
        (Reply(change=lambda told: told | {"choices": []}), "it holds no choice"),
        (Reply(change=lambda told: told | {"choices": ["text"]}), "it has not the form of an answer"),
        (Reply(change=first(text=None)), "its text is none"),
        (Reply(change=first(finish_reason="content_filter")), 'it ended by "content_filter"'),
        (Reply(change=first(finish_reason="abort")), 'it ended by "abort"'),
    ],
)
def test_what_is_no_answer_is_an_error(server, reply, words):
    server.always = reply
    with pytest.raises(RunFailed, match=words):
        ask(server)
    assert len(server.asked) == 1


@pytest.mark.parametrize("name", ["reasoning_content", "tool_calls"])
def test_a_message_without_text(server, name):
    messages = {"model": "served", "messages": [{"role": "user", "content": "The pass key is 71."}], "max_tokens": 5}
    server.always = Reply(change=first(message={"content": None, name: "Let me see"}))
    with pytest.raises(RunFailed, match=f"the message holds {name} and no text; switch that off in the server"):
        Endpoint(server.url, 10.0).chat(messages)
    server.always = Reply(change=first(message={"content": None}))
    assert Endpoint(server.url, 10.0).chat(messages).text == ""


def test_no_answer_in_time_is_not_waited_for_again(server):
    server.always = Reply(wait_s=1.0)
    with pytest.raises(RunFailed, match=r"gave no answer within model\.timeout_s=0\.1"):
        ask(server, 0.1)
    assert len(server.asked) == 1


def test_the_key_goes_to_the_server_and_nowhere_else(server, monkeypatch, caplog):
    monkeypatch.setenv(endpoint.KEY, f" {SECRET}\n")
    echo = Reply(500, f"bad key {SECRET}".encode())
    server.replies = [echo] * 4
    with caplog.at_level(logging.WARNING, logger="hipexp"), pytest.raises(RunFailed, match=r"bad key \*\*\*") as caught:
        ask(server)
    assert SECRET not in f"{caught.value}{caplog.text}"
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {f"Bearer {SECRET}"}


KEYS = ["sk-very-secret", 'sk"very\\secret', "sk/very/secret", "sk-1"]


@pytest.mark.parametrize("key", KEYS)
def test_the_key_is_taken_out_of_all_that_a_server_says(server, monkeypatch, caplog, key):
    monkeypatch.setenv(endpoint.KEY, key)
    escaped = json.dumps(key)[1:-1]
    asked, hidden = Endpoint(server.url, 5.0), (key, escaped, escaped.replace("/", r"\/"))
    server.version, server.models = f"1 {key}", [{"id": "served", "root": f"/{key}", "meta": {key: [{"of": key}]}}, {"id": f"for {key}"}]
    told = asked.about("served")
    assert told == {"version": "1 ***", "lists": {"root": "/***", "meta": {"***": [{"of": "***"}]}}}
    server.always.change = lambda told: told | {"model": f"of {key}", "system_fingerprint": key}
    assert asked.complete(BODY).by == "of *** ***"
    shown = []
    for form in hidden:
        for reply in (
            Reply(404, f"no {form}".encode(), reason=f"No {form}"),
            Reply(500, f"no {form}".encode(), reason=f"No {form}"),
            Reply(body=f"<p>{form}</p>".encode()),
            Reply(change=first(finish_reason=key)),
            Reply(change=first(finish_reason={"why": key})),
        ):
            server.always = reply
            with caplog.at_level(logging.WARNING, logger="hipexp"), pytest.raises((RunFailed, Refused)) as caught:
                asked.complete(BODY)
            shown.append(str(caught.value))
    assert all("***" in text for text in shown)
    assert not any(form in text for form in hidden for text in (*shown, caplog.text))


def test_the_key_is_taken_out_of_what_is_no_http(monkeypatch, caplog):
    monkeypatch.setenv(endpoint.KEY, SECRET)

    def answer():
        for _ in range(4):
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(f"no {SECRET}\r\n\r\n".encode())

    with socket.create_server(("127.0.0.1", 0)) as server, caplog.at_level(logging.WARNING, logger="hipexp"):
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(RunFailed, match=r"broke off \(no \*\*\*") as caught:
            Endpoint(f"http://127.0.0.1:{server.getsockname()[1]}/v1", 5.0).complete(BODY)
    assert SECRET not in f"{caught.value}{caplog.text}"


def test_an_answer_that_holds_the_key_is_none_but_a_short_key_may_be_a_word(server, monkeypatch):
    server.always.change = first(text=f"it is {SECRET}")
    monkeypatch.setenv(endpoint.KEY, SECRET)
    with pytest.raises(RunFailed, match="its text holds OPENAI_API_KEY") as caught:
        ask(server)
    assert SECRET not in str(caught.value)
    monkeypatch.setenv(endpoint.KEY, "it")
    assert ask(server).text == f"it is {SECRET}"
    server.always = Reply(400, b"it is written, and it limits")
    with pytest.raises(Refused, match=r"\*\*\* is written, and \*\*\* limits"):
        ask(server)


@pytest.mark.parametrize("key", ["sk\nevil", "schlüssel"])
def test_a_key_that_no_header_can_hold(monkeypatch, key):
    monkeypatch.setenv(endpoint.KEY, key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY must be printable ASCII") as caught:
        Endpoint("http://localhost/v1", 1.0)
    assert key not in str(caught.value)


def test_no_proxy_leads_to_this_machine(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(server).text == " 71."
    assert [is_here(f"http://{host}/v1") for host in ("localhost:8000", "127.0.0.5", "[::1]:80", "example.org", "10.0.0.1")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_what_a_server_says_of_itself(server):
    server.models = [{"id": "other"}, {"id": "served", "max_model_len": 4096, "root": "/models/a", "created": 7}, "strange"]
    assert Endpoint(f"{server.url}/", 5.0).about("served") == {"version": "1.0", "lists": {"root": "/models/a", "max_model_len": 4096}}
    server.models, server.version = [{"id": ["served"]}, {"id": "served", "root": "\ud83d"}], "\udc00 1"
    assert Endpoint(server.url, 5.0).about("served") == {"version": "\ufffd 1", "lists": {"root": "\ufffd"}}
    deep = []
    for _ in range(700):
        deep = [deep]
    server.models, server.version = [{"id": "served", "meta": deep}], "1"
    assert Endpoint(server.url, 5.0).about("served")["lists"] in ({}, {"meta": deep})
    server.models, server.version = None, None
    assert Endpoint(server.url, 5.0).about("served") == {"version": None, "lists": {}}


def test_a_server_says_how_long_to_wait(server, monkeypatch):
    def wait(text):
        return wait_of(urllib.error.HTTPError("http://x", 429, "", {"Retry-After": text}, None))

    assert [wait("7"), wait("-1"), wait("Wed, 21 Oct 2026 07:28:00 GMT"), wait(None)] == [7.0, 0.0, 0.0, 0.0]
    asked, pauses = Endpoint(server.url, 5.0), []
    monkeypatch.setattr(asked._stopped, "wait", pauses.append)
    server.replies = [Reply(429, headers={"Retry-After": "7"}), Reply(429, headers={"Retry-After": "9999"})]
    assert asked.complete(BODY).text == " 71."
    assert pauses == [7.0, endpoint.MOST_DELAY_S]


def test_whoever_is_stopped_tries_no_more(server):
    server.always = Reply(500)
    asked = Endpoint(server.url, 5.0)
    asked.stop()
    with pytest.raises(RunFailed):
        asked.complete(BODY)
    assert len(server.asked) == 1
