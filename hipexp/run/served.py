"""A run against a model that a server has loaded: samples and prompts are made here, answers come from there.

What the model reads is checked: by the numbers of tokens that the server counts, a prompt that it cut, to which it added a start token,
or that its tokenizer reads otherwise gives an error, never a score.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from types import SimpleNamespace
from typing import Any

from hipexp.config.schema import ConfigError, Experiment, Model
from hipexp.run.endpoint import Answer, Endpoint, Refused, Unwell
from hipexp.run.identity import WEIGHTS, facts_of, files_revision, model_revision, version_of
from hipexp.run.job import Job
from hipexp.run.ledger import Ledger, RunFailed, read_json
from hipexp.suites.sample import ProtocolCard, Sample, Suite
from hipexp.track import Trackers

CHAT = (
    "model.prompt=chat: every prompt is one user turn of the server's chat template, whatever the protocol says; a system message or the "
    "beginning of an answer stands inside of it, and lengths do not count the template"
)
UNMEASURED = (
    "the server did not count the tokens of its chat template (usage.prompt_tokens): a prompt that it cut by no more than these looks whole"
)
UNCHECKED = "the server does not count the tokens of prompts (usage.prompt_tokens): nobody knows whether it read them whole"
UNEXPLAINED = "the server does not say why answers ended (finish_reason): nobody knows whether it cut them"
UNTAKEN = (400, 415, 422, 501)  # what servers that take no token ids answer
SEAM_TOK = 2  # tokens that can differ where two texts meet, or between what was made and its text


class UserTurn:
    """A tokenizer whose chat template adds nothing: what a prompt is before a server's own template comes around it."""

    chat_template = "the server's"

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, turns: list[dict[str, str]], **_: Any) -> str:
        """The words of the turns, a blank line between."""
        return "\n\n".join(turn["content"] for turn in turns)


@dataclass(frozen=True)
class Question:
    """A sample as it is sent: ``told``, token ids, text or messages, in the field ``kind``.

    The server has to count ``least_tok`` to ``most_tok`` tokens in it; None is without limit.
    """

    sample: Sample
    kind: str
    told: Any
    least_tok: int
    most_tok: int | None


def job(experiment: Experiment, ledger: Ledger) -> Job:
    """The run of an experiment with a served model. The server is asked for nothing if nothing is left to do.

    Raises ``RunFailed`` if the server is another one than when the run began.
    """
    from hipexp.run.point import check_unchanged, load_tokenizer, open_suite_for, removed_tok, summarize

    model, tokenizer = experiment.model, load_tokenizer(experiment.model)
    trained_tok = facts_of(model).trained_tok
    suite = open_suite_for(experiment, UserTurn(tokenizer) if model.prompt == "chat" else tokenizer, trained_tok)
    assert suite is not None and model.base_url is not None
    check_unchanged(experiment, ledger.key)
    points = [(item.subtask, item.index) for item in suite.items()]
    server = Endpoint(model.base_url, model.timeout_s)
    before = read_json(ledger.folder / "card.json").get("model", {}).get("served") if ledger.rows else None
    if before:
        check_kind(before, model)
    told = before if before and all(ledger.has(*one) for one in points) else introduce(server, model, tokenizer, before)
    if before:
        check_same(before, told, model)
    card = card_of(suite, model, told)
    plain = card.to_dict() | {"strategy": strategy(told)}

    def measure(ledger: Ledger, trackers: Trackers) -> dict[str, Any]:
        try:
            run_samples(experiment, suite, tokenizer, server, told, ledger, trackers)
        finally:
            server.stop()
        final = dataclasses.replace(card, note=note_of(card.note, ledger.rows))
        plain["note"], plain["truncation"]["removed_tok"] = final.note, removed_tok(ledger.rows)
        plain["model"]["served"] = told | {"answered_by": sorted({row["answered_by"] for row in ledger.rows})}
        ledger.write("card.json", plain)
        summary = summarize(final, ledger.rows)
        summary["latency"]["request_ms"] = round(statistics.median(row["request_ms"] for row in ledger.rows), 3)
        return summary

    return Job(points, plain, measure)


def introduce(server: Endpoint, model: Model, tokenizer: Any, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """How the server is asked, and what it says of itself, for the card; what a run began with (``before``) decides for ``auto``."""
    about, prompt = server.about(model.path), model.prompt
    if prompt == "auto":
        prompt = before["prompt"] if before else find_kind(server, model, tokenizer)
    endpoint = "/chat/completions" if prompt == "chat" else "/completions"
    asked: dict[str, Any] = {
        "base_url": server.base_url,
        "endpoint": endpoint,
        "prompt": prompt,
        "model": model.path,
        "server": model.server,
    }
    if prompt == "chat":
        asked["template_tok"] = count_template(server, model, tokenizer)
    return asked | {"temperature": 0, "concurrent": model.concurrent} | about


def find_kind(server: Endpoint, model: Model, tokenizer: Any) -> str:
    """``tokens`` if the server continues one, else ``text``. Raises as ``Endpoint.complete`` for what has other causes."""
    try:
        server.complete(request(model, "prompt", list(tokenizer("a").input_ids), 1))
    except (Refused, Unwell) as error:
        if error.code in UNTAKEN:
            return "text"
        if error.code is None or error.code < 500:
            raise
        raise RunFailed(
            f"{error}; it was asked to continue token ids, and if it is these that it cannot take: model.prompt=text"
        ) from error
    return "tokens"


def count_template(server: Endpoint, model: Model, tokenizer: Any) -> int | None:
    """The tokens that the server's chat template puts around a user turn; None if it does not count."""
    counted = server.count_chat(request(model, "messages", [{"role": "user", "content": "a"}], 1))
    return None if counted is None else max(0, counted - len(tokenizer("a", add_special_tokens=False).input_ids))


def check_kind(before: dict[str, Any], model: Model) -> None:
    """Raise ``RunFailed`` if prompts are to be sent in another way than those of the rows that are there (one run, one way)."""
    if model.prompt not in ("auto", before["prompt"]):
        raise RunFailed(
            f"model.prompt={model.prompt} is not how this run began, whose prompts were sent as {before['prompt']}; "
            f"use model.prompt={before['prompt']} or auto, or move the folder of the run away"
        )


def check_same(before: dict[str, Any], told: dict[str, Any], model: Model) -> None:
    """Raise ``RunFailed`` if the server says other things than when the run began (one run, one server); silence tells nothing."""
    both = [name for name in ("version", "lists", "template_tok") if before.get(name) and told.get(name)]
    changed = [name for name in both if before[name] != told[name]]
    if changed:
        was, now = ({name: one[name] for name in changed} for one in (before, told))
        raise RunFailed(
            f"model.base_url={model.base_url} is another server than when this run began (then {was}, now {now}); "
            "give the new one a name, as in model.server=new, which is another run, or move the folder of the run away"
        )


def strategy(told: dict[str, Any]) -> list[str]:
    """What is known of how answers come about, in words."""
    version = f", version {told['version']}" if told.get("version") else ""
    kind = {"tokens": "token ids", "text": "text", "chat": "messages"}[told["prompt"]]
    return [f"attention: the server's ({told['model']} at {told['base_url']}{version}; prompts are sent as {kind} to {told['endpoint']})"]


def card_of(suite: Suite, model: Model, told: dict[str, Any]) -> ProtocolCard:
    """The protocol card with what is known of the model, the server and the way between."""
    card, chat = suite.card(), told["prompt"] == "chat"
    known = {
        "revision": model_revision(model),
        "dtype": None,
        "trained_tok": facts_of(model).trained_tok,
        "n_layers": None,
        "transformers": version_of("transformers"),
        "tokenizer": {"path": model.tokenizer or model.path, "revision": files_revision(model, without=WEIGHTS)},
        "served": told,
    }
    stops = [stop.replace("end of text", "end of text, as the server's model has it") for stop in card.stops]
    return dataclasses.replace(
        card,
        model=known,
        stops=[stop + ", cut off here" if "line" in stop else stop for stop in stops],
        decoding="greedy (temperature 0; penalties are the server's, and off unless somebody set them there)",
        chat_template="the server's own" if chat else card.chat_template,
        note="; ".join(filter(None, [card.note, CHAT if chat else "", UNMEASURED if chat and told.get("template_tok") is None else ""])),
    )


def note_of(note: str, rows: list[dict[str, Any]]) -> str:
    """The card's note, with what could not be checked."""
    unknown = {words: sum(row[name] is None for row in rows) for name, words in (("served_tok", UNCHECKED), ("finish", UNEXPLAINED))}
    return "; ".join(filter(None, [note, *(f"{words} ({n} of {len(rows)} samples)" for words, n in unknown.items() if n)]))


def run_samples(
    experiment: Experiment, suite: Suite, tokenizer: Any, server: Endpoint, told: dict[str, Any], ledger: Ledger, trackers: Trackers
) -> None:
    """Do every sample that is not in the ledger yet, ``model.concurrent`` at a time; rows are in the order of the samples."""
    from hipexp.run.point import mean_scores, token_bar

    todo = [item for item in suite.items() if not ledger.has(item.subtask, item.index)]

    def ask(question: Question) -> Answer:
        return answer(server, experiment.model, question)

    with token_bar(sum(item.length_tok for item in todo)) as bar:
        # Questions are made in this thread: a tokenizer cannot be used by two at once.
        questions = (question_of(suite.sample(item), tokenizer, told["prompt"], told.get("template_tok") or 0) for item in todo)
        for item, (question, made) in zip(todo, in_order(ask, questions, experiment.model.concurrent), strict=True):
            ledger.append(row_of(suite, question.sample, made, tokenizer))
            trackers.log(ledger.rows[-1], mean_scores(ledger.rows))
            bar.set_description(f"{experiment.task.name} {item.subtask} {item.index}")
            bar.advance_to(item.length_tok)


def in_order(work: Callable[[Question], Answer], questions: Iterable[Question], at_once: int) -> Iterator[tuple[Question, Answer]]:
    """Questions with their answers, in order, of which up to ``at_once`` are under way."""
    waiting: deque[tuple[Question, Future[Answer]]] = deque()
    for question in questions:
        waiting.append((question, begin(work, question)))
        if len(waiting) == at_once:
            first, answer = waiting.popleft()
            yield first, answer.result()
    for first, answer in waiting:
        yield first, answer.result()


def begin(work: Callable[[Question], Answer], question: Question) -> Future[Answer]:
    """Start work on a thread that does not keep the process from ending: a stopped run does not wait for answers."""
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(work(question))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def question_of(sample: Sample, tokenizer: Any, prompt: str, template_tok: int = 0) -> Question:
    """A sample as it is sent; a chat template puts ``template_tok`` tokens around it. Raises as ``text_of``."""
    if prompt == "chat":
        text = text_of(sample, tokenizer, exact=False)
        least = len(tokenizer(text.strip(), add_special_tokens=False).input_ids)  # templates strip
        return Question(sample, "messages", [{"role": "user", "content": text}], least + max(0, template_tok - SEAM_TOK), None)
    told = sample.tokens if prompt == "tokens" else text_of(sample, tokenizer)
    return Question(sample, "prompt", told, len(sample.tokens), len(sample.tokens))


def answer(server: Endpoint, model: Model, question: Question) -> Answer:
    """The greedy answer to a sample.

    Raises as ``Endpoint.post``, naming a sample that is refused, and ``RunFailed`` if the server did not read what was sent.
    """
    sample = question.sample
    name, send = f"{sample.subtask} {sample.index}", server.chat if question.kind == "messages" else server.complete
    try:
        made = send(request(model, question.kind, question.told, sample.max_new_tok))
    except Refused as error:
        if error.code not in (*UNTAKEN, 413):
            raise
        size = f"{len(sample.tokens)} tokens and up to {sample.max_new_tok} new ones"
        other = "; if the server takes no token ids: model.prompt=text" if model.prompt == "tokens" else ""
        raise ConfigError(f"{name} ({size}): {error}{other}") from error
    check_prompt(made, question.least_tok, question.most_tok, name)
    return made


def request(model: Model, kind: str, prompt: Any, new_tok: int) -> dict[str, Any]:
    """What is asked: these fields every server knows, and some know no others."""
    return {"model": model.path, kind: prompt, "max_tokens": new_tok, "temperature": 0}


def text_of(sample: Sample, tokenizer: Any, exact: bool = True) -> str:
    """The text that a server's tokenizer, which adds special tokens, makes the tokens of a sample of.

    Raises ``ConfigError`` if there is none; if it need not be ``exact``, as inside of a chat template, the decoded tokens are as good.
    """
    start = tokenizer.bos_token or ""
    bare = tokenizer.decode(sample.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for text in (sample.prompt, sample.prompt.removeprefix(start), bare):
        if list(tokenizer(text).input_ids) == sample.tokens:
            return text
    if not exact:
        return bare
    raise ConfigError(
        f"{sample.subtask} {sample.index}: no text has exactly the tokens of this prompt (a cut or a chat template lies between), so that "
        "model.prompt=text would change it; use model.prompt=tokens, or chat"
    )


def check_prompt(made: Answer, least: int, most: int | None, name: str) -> None:
    """Raise ``RunFailed`` if the server counts other tokens than it was sent; ``most`` None is without limit."""
    counted = made.prompt_tok
    if counted is None or (least <= counted and (most is None or counted <= most)):
        return
    if counted < least:
        why = (
            "it has cut the prompt or left out a start token, or model.tokenizer is not the served model's; "
            "give the server a longer context, use model.prompt=tokens, or name the tokenizer"
        )
    else:
        why = (
            "it adds tokens such as a second start token, or model.tokenizer is not the served model's; "
            "use model.prompt=tokens, or name the tokenizer"
        )
    raise RunFailed(f"{name} was sent as {least} tokens, and the server read {counted} (usage.prompt_tokens): {why}")


def count_new(made: Answer, tokenizer: Any, sample: Sample) -> int:
    """The tokens of an answer, as the server counts them, else as we do. Raises ``RunFailed`` for too many, or a cut before the limit."""
    name, limit = f"{sample.subtask} {sample.index}", sample.max_new_tok
    if made.new_tok is None:
        new_tok, least = len(tokenizer(made.text, add_special_tokens=False).input_ids), limit - SEAM_TOK
    else:
        new_tok, least = made.new_tok, limit
        if new_tok > limit:
            raise RunFailed(f"{name} got {new_tok} new tokens where max_tokens={limit} was asked for; this server heeds no limit")
    if made.finish == "length" and new_tok < least:
        raise RunFailed(f"{name} got {new_tok} of {limit} new tokens, and then the server's context was full; give it a longer one")
    return new_tok


def row_of(suite: Suite, sample: Sample, made: Answer, tokenizer: Any) -> dict[str, Any]:
    """The line of ``samples.jsonl`` of an answer. ``request_ms`` is the whole request, the server's queue and the way included.

    ``context_tok`` and ``new_tok`` are as the server counts (with its template, and mostly with the stop token), else as we do.
    ``finish``, ``served_tok`` (its count of the prompt) and ``answered_by`` are what it said; None is unknown. Raises as ``count_new``.
    """
    from hipexp.run.point import scored

    prediction = first_line(made.text) if sample.one_line else made.text
    new_tok = count_new(made, tokenizer, sample)
    return scored(suite, sample, prediction) | {
        "context_tok": len(sample.tokens) if made.prompt_tok is None else made.prompt_tok,
        "new_tok": new_tok,
        "prefill_ms": None,
        "decode_ms": None,
        "peak_bytes": None,
        "exact": None,
        "traffic": {},
        "request_ms": round(made.request_ms, 3),
        "finish": made.finish,
        "served_tok": made.prompt_tok,
        "answered_by": made.by,
        **sample.meta,
    }


def first_line(text: str) -> str:
    """The first line that is not empty. Cut here, since no server can be told that an answer must not begin with a line's end."""
    return text.lstrip("\n").split("\n", 1)[0]
