"""Runs against a server: the same samples, ledger and scores as of a loaded model, and no score of a prompt that was not read as sent."""

import dataclasses
import json
import threading
import time

import pyarrow.parquet as pq
import pytest

import fake_hf
from hipexp.config.schema import ConfigError, Model
from hipexp.run import endpoint, served
from hipexp.run.identity import key_of
from hipexp.run.ledger import RunFailed, is_done, read_json, read_rows
from hipexp.run.point import check_point, execute, folder_of, report, run_point, stored
from hipexp.suites.framing import Cut, frame, template_of
from hipexp.suites.sample import ProtocolCard, Sample
from openai_stub import TOKENIZER, Reply, Stub

SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "DELAYS_S", (0.0, 0.0))
    monkeypatch.delenv(endpoint.KEY, raising=False)


@pytest.fixture
def server():
    with Stub() as stub:
        yield stub


@pytest.fixture
def point(fake, experiment, model_folder, server, monkeypatch):
    """``point(prompt="text", task="passkey", samples=2)``: an experiment with the stub's model; fields of ``Model`` or of ``Task``."""
    monkeypatch.setattr("hipexp.hf.load_tokenizer", lambda model: TOKENIZER)

    def make(**changed):
        own = {name for name in (item.name for item in dataclasses.fields(Model)) if name in changed}
        task = {name: value for name, value in changed.items() if name not in (*own, "task")}
        one = experiment(name=changed.get("task", "infbench"), **task)
        settings = {"path": "served", "name": "served", "base_url": server.url, "tokenizer": str(model_folder)}
        one.model = Model(**settings | {name: changed[name] for name in own})
        return one

    return make


def told(rows):
    names = ("subtask", "sample", "prediction", "references", "score", "removed_tok", "length_tok", "depth", "status")
    return [{name: row[name] for name in names} for row in rows]


def test_a_server_gives_what_the_same_model_gives_here(point, experiment, server, monkeypatch):
    here = execute(experiment())
    monkeypatch.setattr(fake_hf.SETTINGS, "fail", AssertionError("a model was loaded"))
    folder = execute(point())
    rows = read_rows(folder)
    assert told(rows) == told(read_rows(here))
    assert [(row["context_tok"], row["served_tok"]) for row in rows] == [(row["context_tok"],) * 2 for row in read_rows(here)]
    assert [body["prompt"] for body in server.prompts] == [TOKENIZER(TOKENIZER.decode(body["prompt"])).input_ids for body in server.prompts]
    asked = {(path, *sorted(body), body["model"], body["temperature"]) for path, _, body in server.asked}
    assert asked == {("/v1/completions", "max_tokens", "model", "prompt", "temperature", "served", 0)}
    summaries = [read_json(one / "summary.json") for one in (here, folder)]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    assert summaries[1]["pipeline"] == "served"


def test_nothing_is_made_up(point, capsys):
    folder = run_point(point())
    row, summary = read_rows(folder)[0], read_json(folder / "summary.json")
    assert [row[name] for name in ("prefill_ms", "decode_ms", "peak_bytes", "exact")] == [None] * 4
    assert (row["request_ms"] > 0, row["finish"], row["answered_by"]) == (True, "stop", "served@1")
    assert summary["latency"]["request_ms"] > 0
    assert (summary["latency"]["prefill_ms"], summary["memory"]["peak_bytes"], summary["exact"]) == (None, None, None)
    assert pq.read_table(folder / "records.parquet").column("prefill_ms").null_count == 8
    assert read_json(folder / "env.json")["device"].startswith("not known: served at http")
    text = capsys.readouterr().out
    assert "attention: the server's (served at http" in text
    assert "request s" in text
    assert "prefill s" not in text
    assert "peak MiB" not in text
    assert "passkey 0: score 100.0, request " in (folder / "log.txt").read_text()


def test_the_card_says_how_answers_came_about(point, server):
    card = read_json(execute(point(concurrent=2)) / "card.json")
    assert card["model"]["served"] == {
        "base_url": server.url, "endpoint": "/completions", "prompt": "tokens", "model": "served", "server": None, "temperature": 0,
        "concurrent": 2, "version": "1.0", "lists": {"owned_by": "stub"}, "answered_by": ["served@1"],
    }  # fmt: skip
    assert card["stops"] == ["end of text, as the server's model has it"]
    assert card["decoding"].startswith("greedy (temperature 0;")
    assert (card["new_tok"]["kv_retrieval"] > 0, card["model"]["n_layers"], card["model"]["dtype"]) == (True, None, None)


@pytest.mark.parametrize("prompt, sent", [("auto", str), ("text", str)])
def test_text_is_sent_where_no_token_ids_are_taken(point, server, prompt, sent):
    server.takes_ids = False
    folder = execute(point(prompt=prompt))
    assert all(type(body["prompt"]) is sent for body in server.prompts)
    assert [row["score"] for row in read_rows(folder)] == [100.0] * 8
    assert read_json(folder / "card.json")["model"]["served"]["prompt"] == "text"


def test_token_ids_that_are_refused_name_the_repair(point, server):
    server.takes_ids = False
    with pytest.raises(ConfigError, match=r"^passkey 0 \(\d+ tokens and up to \d+ new ones\): .*answered 400.*model\.prompt=text"):
        execute(point(prompt="tokens"))
    assert read_json(folder_of(point(prompt="tokens")) / "status.json")["class"] == "bad_config"


def test_a_chat_is_one_user_turn_and_says_so(point, server):
    folder = execute(point(prompt="chat"))
    assert {path for path, _, _ in server.asked} == {"/v1/chat/completions"}
    body = server.prompts[0]
    assert [message["role"] for message in body["messages"]] == ["user"]
    card, row = read_json(folder / "card.json"), read_rows(folder)[0]
    assert card["chat_template"] == "the server's own"
    assert "one user turn of the server's chat template" in card["note"]
    assert "one user turn of the server's chat template" in report(point(prompt="chat"), folder)
    assert row["context_tok"] == row["served_tok"] == len(TOKENIZER(body["messages"][0]["content"]).input_ids) + 10
    assert row["score"] == 100.0


def usage(**changed):
    return lambda told: told | {"usage": told["usage"] | {name: change(told["usage"][name]) for name, change in changed.items()}}


@pytest.mark.parametrize(
    "prompt, change, words",
    [
        ("tokens", usage(prompt_tokens=lambda n: n - 1), r"^passkey 0 was sent as \d+ tokens, and the server read \d+ .*: it has cut the prompt"),
        ("text", usage(prompt_tokens=lambda n: n // 2), "it has cut the prompt"),
        ("text", usage(prompt_tokens=lambda n: n + 1), "it adds tokens such as a second start token"),
        ("chat", usage(prompt_tokens=lambda n: n - 12), "it has cut the prompt"),
        ("tokens", usage(completion_tokens=lambda n: 999), r"got 999 new tokens where max_tokens=\d+ was asked for"),
        ("tokens", lambda told: usage(completion_tokens=lambda n: 1)(told) | {"choices": [told["choices"][0] | {"finish_reason": "length"}]},
         "got 1 of .* new tokens, and then the server's context was full"),
    ],
)  # fmt: skip
def test_what_was_not_read_as_sent_is_no_score(point, server, prompt, change, words):
    one = point(prompt=prompt)
    server.always = Reply(change=change)
    with pytest.raises(RunFailed, match=words):
        execute(one)
    assert read_rows(folder_of(one)) == []
    assert not (folder_of(one) / "summary.json").exists()


def without(*names):
    def change(told):
        told = json.loads(json.dumps(told))
        for name in names:
            told["usage"].pop(name, None), told["choices"][0].pop(name, None)
        return told

    return change


@pytest.mark.parametrize("missing, whole", [(3, False), (9, False), (2, True), (0, True)])
def test_a_chat_cut_by_less_than_the_template_is_seen(point, server, missing, whole):
    server.replies, server.always = [Reply()], Reply(change=usage(prompt_tokens=lambda n: n - missing))
    if whole:
        card = read_json(execute(point(prompt="chat")) / "card.json")
        assert card["model"]["served"]["template_tok"] == 11
        assert "chat template (usage" not in card["note"]
    else:
        with pytest.raises(RunFailed, match="it has cut the prompt"):
            execute(point(prompt="chat"))


def test_a_chat_does_not_go_on_with_another_template(point, server):
    interrupted(point(prompt="chat"), server, kept=4)
    server.always = Reply(change=usage(prompt_tokens=lambda n: n + 1))
    with pytest.raises(
        RunFailed, match=r"another server than when this run began \(then \{'template_tok': 11\}, now \{'template_tok': 12\}"
    ):
        execute(point(prompt="chat"))


def test_a_template_of_unknown_length_is_named(point, server):
    server.replies = [Reply(change=without("prompt_tokens"))]
    card = read_json(execute(point(prompt="chat")) / "card.json")
    assert card["model"]["served"]["template_tok"] is None
    assert "did not count the tokens of its chat template" in card["note"]


def test_the_turn_that_measures_a_template_need_not_be_answered(point, server):
    server.replies = [Reply(change=lambda told: told | {"choices": [{"message": {"content": None, "reasoning_content": "Hm"}}]})]
    assert read_json(execute(point(prompt="chat")) / "card.json")["model"]["served"]["template_tok"] == 11


def test_a_text_counts_without_the_blanks_that_templates_strip():
    padded = "  ab 12\n\n\n"
    ids = TOKENIZER(padded).input_ids
    question = served.question_of(sample(padded, ids), TOKENIZER, "chat", 11)
    assert (question.told[0]["content"], question.least_tok) == (padded, len(TOKENIZER("ab 12", False).input_ids) + 11 - 2)


@pytest.mark.parametrize("made_tok, whole", [(1, False), (3, False), (4, True), (6, True)])
def test_an_answer_at_its_limit_is_counted_here_if_the_server_does_not(point, server, made_tok, whole):
    text = TOKENIZER.decode(TOKENIZER("1.2.3.", False).input_ids[:made_tok])

    def change(told):
        told = without("completion_tokens")(told)
        told["choices"][0] |= {"text": text, "finish_reason": "length"}
        return told

    server.always = Reply(change=change)
    one = point(subtasks=["passkey"])
    if whole:
        assert [row["new_tok"] for row in read_rows(execute(one))] == [made_tok] * 4
    else:
        with pytest.raises(RunFailed, match=rf"passkey 0 got {made_tok} of 6 new tokens, and then the server's context was full"):
            execute(one)
        assert read_rows(folder_of(one)) == []


def test_an_answer_without_a_reason_for_its_end_is_named_as_unchecked(point, server):
    server.replies, server.always = [Reply()] * 3, Reply(change=without("finish_reason"))
    folder = execute(point())
    note = "nobody knows whether it cut them (6 of 8 samples)"
    assert note in read_json(folder / "card.json")["note"]
    assert note in report(point(), folder)


def interrupted(one, server, kept=3):
    """The folder of a run that was stopped after some samples."""
    server.replies, server.always = [Reply()] * (kept + (one.model.prompt == "auto")), Reply(401)
    with pytest.raises(ConfigError, match=r"^http.* answered 401"):  # no sample is to blame
        execute(one)
    server.always = Reply()
    server.asked.clear()
    return folder_of(one)


@pytest.mark.parametrize("first, sent", [("tokens", list), ("text", str)])
def test_a_run_goes_on_in_the_way_that_it_began(point, server, first, sent):
    folder = interrupted(point(prompt=first), server)
    other = {"tokens": "text", "text": "tokens"}[first]
    with pytest.raises(RunFailed, match=rf"model\.prompt={other} is not how this run began, .* sent as {first}; use model\.prompt={first}"):
        execute(point(prompt=other))
    assert (server.asked, len(read_rows(folder))) == ([], 3)
    execute(point())  # auto takes token ids from this server, if it is asked
    assert [type(body["prompt"]) for _, _, body in server.asked] == [sent] * 5
    assert read_json(folder / "card.json")["model"]["served"]["prompt"] == first


def test_a_stored_result_is_none_for_prompts_sent_in_another_way(point, server):
    folder = execute(point(prompt="text"))
    server.asked.clear()
    assert execute(point()) == execute(point(prompt="text")) == folder
    with pytest.raises(RunFailed, match=r"model\.prompt=tokens is not how this run began"):
        execute(point(prompt="tokens"))
    assert server.asked == []


@pytest.mark.parametrize("status, repair", [(401, False), (403, False), (404, False), (413, False), (429, False), (500, True), (505, True)])
def test_auto_takes_only_some_answers_for_no_to_token_ids(point, server, status, repair):
    server.always = Reply(status, headers={"Retry-After": "0"})
    with pytest.raises((ConfigError, RunFailed), match=rf"^http\S*/completions answered {status}") as caught:
        execute(point())
    assert ("model.prompt=text" in str(caught.value)) == repair
    assert all(body["max_tokens"] == 1 for _, _, body in server.asked)


@pytest.mark.parametrize("status", [400, 415, 422, 501])
def test_auto_sends_text_where_token_ids_are_refused(point, server, status):
    server.replies = [Reply(status)]
    assert read_json(execute(point()) / "card.json")["model"]["served"]["prompt"] == "text"


def test_the_card_says_at_the_end_what_was_removed(point):
    card = read_json(execute(point(truncate_tok=300)) / "card.json")
    removed = {row["subtask"]: 0 for row in read_rows(folder_of(point(truncate_tok=300)))}
    for row in read_rows(folder_of(point(truncate_tok=300))):
        removed[row["subtask"]] += row["removed_tok"]
    assert card["truncation"]["removed_tok"] == removed
    assert min(removed.values()) > 0


def test_the_card_says_what_is_cut_here(point):
    named = ("suite", "protocol", "edition", "template", "wording", "metric", "scorer", "length_tok", "samples", "new_tok", "data")
    card = ProtocolCard(**dict.fromkeys(named, ""), stops=["end of text", "samsum: the end of a line"])
    suite, model = type("Suite", (), {"card": lambda self: card})(), point().model
    told = {"prompt": "tokens"}
    assert served.card_of(suite, model, told).stops == [
        "end of text, as the server's model has it",
        "samsum: the end of a line, cut off here",
    ]


def test_a_server_that_does_not_count_is_named_as_unchecked(point, server):
    server.replies = [Reply()] * 3  # the first is for `auto`
    server.always = Reply(change=lambda told: {name: value for name, value in told.items() if name != "usage"})
    folder = execute(point())
    rows = read_rows(folder)
    assert [row["served_tok"] is None for row in rows] == [False] * 2 + [True] * 6
    assert all(row["context_tok"] > 0 and row["new_tok"] > 0 for row in rows)
    note = "nobody knows whether it read them whole (6 of 8 samples)"
    assert note in read_json(folder / "card.json")["note"]
    assert note in report(point(), folder)


def test_a_run_that_failed_continues_where_it_was(point, server):
    server.replies, server.always = [Reply()] * 4, Reply(400, b"the context is full")
    with pytest.raises(ConfigError, match="passkey 3"):
        execute(point())
    folder, asked = folder_of(point()), len(server.asked)
    before = read_rows(folder)
    server.always = Reply()
    execute(point())
    rows = read_rows(folder)
    assert (len(before), rows[:3], len(server.asked) - asked) == (3, before, 5)
    assert [(row["subtask"], row["sample"]) for row in rows] == [(name, i) for name in ("passkey", "kv_retrieval") for i in range(4)]
    server.asked.clear()
    execute(point())
    (folder / "summary.json").unlink()
    execute(point())
    assert (server.asked, stored(point()), is_done(folder, key_of(point()))) == ([], True, True)
    assert read_json(folder / "card.json")["model"]["served"]["version"] == "1.0"


def test_another_server_at_the_same_address_does_not_go_on(point, server):
    server.replies, server.always = [Reply()] * 4, Reply(400)
    with pytest.raises(ConfigError):
        execute(point())
    server.always, server.version = Reply(), "2.0"
    with pytest.raises(
        RunFailed, match=r"another server than when this run began \(then \{'version': '1\.0'\}, now \{'version': '2\.0'\}\)"
    ):
        execute(point())
    assert len(read_rows(execute(point(server="new")))) == 8


def test_requests_at_once_are_answered_in_order(point, server):
    here = execute(point())
    server.replies, server.always = [Reply(), Reply(wait_s=0.3)], Reply(wait_s=0.05)
    server.most_busy = 0
    folder = execute(point(concurrent=3, server="again"))
    assert server.most_busy == 3
    assert told(read_rows(folder)) == told(read_rows(here))


def test_an_error_ends_all_requests_at_once(point, server, monkeypatch):
    execute(point())
    first, before = server.prompts[0]["prompt"], set(threading.enumerate())
    monkeypatch.setattr(endpoint, "DELAYS_S", (1.0,) * 100)
    server.choose = lambda body: Reply(400) if body["prompt"] == first else Reply(500) if body["max_tokens"] > 1 else None
    with pytest.raises(ConfigError, match="passkey 0"):
        execute(point(concurrent=4, server="again"))
    end = time.monotonic() + 30  # nobody goes on trying, which would take 100 s
    while set(threading.enumerate()) - before:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_key_is_in_no_file(point, server, monkeypatch):
    monkeypatch.setenv(endpoint.KEY, SECRET)
    server.replies = [Reply(), Reply(500, f"no, {SECRET}".encode())]
    server.version, server.always = f"1.0 {SECRET}", Reply(change=lambda told: told | {"model": SECRET})
    folder = execute(point())
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {f"Bearer {SECRET}"}
    text = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"no, ***" in text
    assert SECRET.encode() not in text
    monkeypatch.delenv(endpoint.KEY)
    assert stored(point())


def test_the_run_key_is_of_model_server_tokenizer_and_kind_of_prompt(point, model_folder):
    key = key_of(point())
    same = [{"prompt": "tokens"}, {"prompt": "text"}, {"concurrent": 8}, {"timeout_s": 5}, {"name": "other"}]
    assert {key_of(point(**one)) for one in same} == {key}
    (model_folder / "model.safetensors").write_bytes(b"the weights here are not what the server has")
    (model_folder / "README.md").write_text("words")
    assert key_of(point()) == key
    others = [{"prompt": "chat"}, {"path": "other"}, {"base_url": "http://elsewhere/v1"}, {"server": "vllm 1"}, {"trained_tok": 99}]
    keys = [key_of(point(**one)) for one in others]
    assert len({key, *keys}) == 6
    assert key_of(point(server="vllm 1", base_url="http://elsewhere/v1")) == keys[3]
    (model_folder / "tokenizer.json").write_text("another tokenizer")
    assert key_of(point()) != key


def test_the_trained_length_is_known_or_asked_for(point, model_folder):
    grid = {"task": "passkey", "samples": 1, "depths": [0.5]}
    (model_folder / "config.json").write_text(json.dumps({"max_position_embeddings": 400}))
    folder = execute(point(**grid))
    assert list(read_json(folder / "summary.json")["scores"]) == ["passkey@400", "passkey@800", "passkey@1600"]
    (model_folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.tokenizer=.* has no readable config\.json; set model\.trained_tok"):
        check_point(point(**grid))
    assert "passkey@500" in read_json(execute(point(trained_tok=500, **grid)) / "summary.json")["scores"]


def sample(prompt, tokens, **more):
    return Sample("passkey", 0, prompt, tokens, ["1"], 8, 100, **more)


def test_the_text_of_a_prompt_has_its_tokens_or_is_refused():
    plain = "ab 12"
    ids = TOKENIZER(plain).input_ids
    assert served.text_of(sample(plain, ids), TOKENIZER) == plain
    assert served.text_of(sample(f"<s>{plain}", ids), TOKENIZER) == plain  # a template that writes the start token
    assert served.text_of(sample("xyz 99 ab 12", ids), TOKENIZER) == plain  # cut to these tokens
    seam = [1, *TOKENIZER("x", False).input_ids, *TOKENIZER("y", False).input_ids]
    with pytest.raises(ConfigError, match=r"no text has exactly the tokens of this prompt .* use model\.prompt=tokens"):
        served.text_of(sample("x middle y", seam), TOKENIZER)
    assert served.text_of(sample("x middle y", seam), TOKENIZER, exact=False) == "xy"


def test_the_text_of_a_template_keeps_its_special_tokens():
    class Turns(type(TOKENIZER)):
        def __call__(self, text, add_special_tokens=True):
            before, *turns = text.split("<turn>")
            whole = super().__call__(before, add_special_tokens)
            for turn in turns:
                whole.input_ids += [9999, *super().__call__(turn, False).input_ids]
            return whole

        def decode(self, ids, **how):
            return super().decode([one for one in ids if one != 9999], **how)

    tokenizer = Turns()
    text = "<turn>ab<turn>"
    assert served.text_of(sample(f"<s>{text}", tokenizer(text).input_ids), tokenizer) == text


def test_a_user_turn_is_what_a_template_comes_around():
    turn = served.UserTurn(TOKENIZER)
    assert template_of(turn) == ("", "", True)
    framed = frame("text", turn, limit_tok=None, cut=Cut(True, True), chat=True, system="You help.")
    assert (framed.prompt, framed.tokens) == ("You help.\n\ntext", TOKENIZER("You help.\n\ntext").input_ids)
    assert turn.decode(framed.tokens) == framed.prompt


def test_an_answer_of_one_line_is_cut_here():
    assert [served.first_line(text) for text in ("one\ntwo", "\n\none\ntwo", "one", "")] == ["one", "one", "one", ""]
    suite = type("Suite", (), {"score": lambda self, sample, prediction: float(prediction == "one")})()
    made = endpoint.Answer("\none\ntwo", "stop", 7, 3, "served", 1.0)
    row = served.row_of(suite, sample("p", [1, 2], one_line=True), made, TOKENIZER)
    assert (row["prediction"], row["score"]) == ("one", 1.0)
