"""Prompts and cuts, token by token, beside lm_eval's prompts and the official scripts' rules of cutting, retold here without our code.

Where no official prompt file is at hand its words are taken from lm_eval, whose templates are the official ones up to white space at their
ends: what is compared is which fields of a row go where, the chat template, special tokens and the cut.
"""

import json
import re
from functools import cache
from importlib.resources import files
from types import SimpleNamespace

import pytest
import yaml
from tokenizers import Tokenizer

import official_data
from hipexp.config.schema import Task
from hipexp.suites import open_suite
from hipexp.suites.data.registry import LONGBENCH, LONGBENCH_E
from hipexp.suites.framing import template_of
from hipexp.suites.infbench_official import SUBTASKS as INFBENCH
from hipexp.suites.lm_eval import needles, suite_module
from hipexp.suites.ruler import SUBTASKS as RULER
from hipexp.suites.ruler import Ruler
from ruler_data import write_resources

pytest.importorskip("lm_eval")

NOT_CHAT = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
LIMITS = (None, 200, 201)
IN_LM_EVAL = {name: re.sub("_eng$", "_en", name) for name in INFBENCH if name != "math_calc"}


class Chat:
    """The tokenizer of the embedded model with a chat template that writes the start token, as Llama's do."""

    chat_template, bos_token = "turns", "<s>"

    def __init__(self):
        self.inner = Tokenizer.from_file(str(files("hipexp.needle") / "model" / "tokenizer.json"))

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=self.inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids, skip_special_tokens):
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, turns, tokenize, add_generation_prompt, date_string):
        return self.bos_token + "".join(f"<{one['role']}>\n{one['content']}\n" for one in turns) + "<assistant>\n"


class Loader(yaml.SafeLoader):
    """Knows the names of functions in lm_eval's task files."""


Loader.add_constructor("!function", lambda loader, node: SimpleNamespace(name=loader.construct_scalar(node).partition(".")[2]))


@cache
def lm_eval_task(suite, name):
    """The task file of lm_eval."""
    return yaml.load((files("lm_eval.tasks") / suite / f"{name}.yaml").read_text(encoding="utf-8"), Loader)


def rendered(suite, name, doc):
    """The prompt that lm_eval makes of a row."""
    from jinja2 import Environment

    task = lm_eval_task(suite, name)
    told = task["doc_to_text"]
    if isinstance(told, str):
        return task.get("description", "") + Environment(keep_trailing_newline=True).from_string(told).render(**doc)
    return task.get("description", "") + getattr(suite_module(f"{suite}.utils"), told.name)(doc)


@pytest.fixture(scope="module")
def chat():
    return Chat()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small rows, and prompt files in the official form with lm_eval's words."""
    folder = official_data.write_all(tmp_path_factory.mktemp("data"))
    longbench = {name: rendered("longbench", name, {"context": "{context}", "question": "{input}"}) for name in LONGBENCH}
    (folder / "longbench" / "dataset2prompt.json").write_text(json.dumps(longbench))
    asks = {
        "input": "func_7(3) The largest number of",
        "context": "{context}",
        "options": [f"{{OPTION_{letter}}}" for letter in "ABCD"],
        "answer": ["{OPTION_A}"],
    }
    found = {name: rendered("infinitebench", f"infinitebench_{IN_LM_EVAL[name]}", asks) for name in IN_LM_EVAL}
    for name, text in found.items():
        for said, place in (
            ("What is the largest number in the following list?", "{prefix}"),
            (asks["input"], "{input}"),
            ("func_7(3)", "{func_call}"),
            ("func_7", "{func}"),
        ):
            text = text.replace(said, place)
        found[name] = text
    (folder / "infbench" / "prompt.py").write_text(f"gpt4_templates = {found!r}\nyarn_mistral_templates = {found!r}\n", encoding="utf-8")
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def in_chat(tokenizer, *turns):
    """Turns as the official scripts would give them to a tokenizer that writes the start token, which stands once here."""
    text = tokenizer.apply_chat_template(list(turns), False, True, None)
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("limit_tok", LIMITS)
@pytest.mark.parametrize("subtask", [*LONGBENCH, *(f"{name}_e" for name in LONGBENCH_E)])
def test_longbench(data, chat, subtask, limit_tok):
    """Officially: both halves of the limit, rounded down, decoded one by one without special tokens; then the chat template, on 15 tasks."""
    task = Task(name="longbench", protocol="official", data=str(data), subtasks=[subtask], samples=2, truncate_tok=limit_tok)
    suite, name = open_suite(task, chat, 1000, 0), subtask.removesuffix("_e")
    for item, row in zip(suite.items(), rows_of(data / "longbench" / "data" / f"{subtask}.jsonl"), strict=False):
        text = rendered("longbench", name, {"context": row["context"], "question": row["input"]})
        ids = chat(text).input_ids
        if limit_tok and len(ids) > limit_tok:
            half = int(limit_tok / 2)
            text = chat.decode(ids[:half], True) + chat.decode(ids[-half:], True)
        theirs = chat(text).input_ids if name in NOT_CHAT else in_chat(chat, {"role": "user", "content": text})
        sample = suite.sample(item)
        assert sample.tokens == theirs and sample.references == row["answers"]
        assert bool(sample.removed_tok) == bool(limit_tok and len(ids) > limit_tok)


@pytest.mark.parametrize("limit_tok", LIMITS)
@pytest.mark.parametrize("subtask", IN_LM_EVAL)
def test_infbench(data, chat, subtask, limit_tok):
    """Officially, for GPT-4: half of the limit from the start and the rest from the end, decoded together; then system and user message.

    For base models: both halves rounded down, decoded together, no chat template. MInference: a system message alone, then both halves
    of the limit less the new tokens, rounded down, as tokens.
    """
    row = rows_of(data / "infbench" / f"{subtask}.jsonl")[0]
    text = rendered("infinitebench", f"infinitebench_{IN_LM_EVAL[subtask]}", row)

    def ours(protocol):
        task = Task(name="infbench", protocol=protocol, data=str(data), subtasks=[subtask], samples=1, truncate_tok=more(protocol))
        suite = open_suite(task, chat, 1000, 0)
        return suite.sample(suite.items()[0])

    def more(protocol):
        return limit_tok + new_tok if protocol == "minference" and limit_tok else limit_tok

    new_tok = {"passkey": 15, "number_string": 20, "kv_retrieval": 80, "longbook_sum_eng": 1200, "math_find": 3}.get(subtask, 40)
    new_tok = 5 if subtask.startswith("code") else new_tok
    ids = chat(text).input_ids
    cut = bool(limit_tok) and len(ids) > limit_tok
    gpt4 = chat.decode(ids[0 : limit_tok // 2] + ids[-limit_tok // 2 :], True) if cut else text
    base = chat.decode(ids[0 : limit_tok // 2] + ids[-(limit_tok // 2) :], True) if cut else text
    system = {"role": "system", "content": "You are a helpful assistant"}
    assert ours("chat").tokens == in_chat(chat, system, {"role": "user", "content": gpt4})
    assert ours("completion").tokens == chat(base).input_ids
    whole = in_chat(chat, {"role": "system", "content": text})
    half = limit_tok // 2 if limit_tok else 0
    assert ours("minference").tokens == (whole[:half] + whole[-half:] if limit_tok and len(whole) > limit_tok else whole)
    assert ours("minference").max_new_tok == new_tok


def ruler_words(subtask):
    """Template and answer prefix of lm_eval."""
    if subtask.startswith("niah"):
        needles()
        template = suite_module("ruler.niah_utils").TEMPLATE
        return template, " The special magic {type_needle_v} for {query} mentioned in the provided text are"
    family = "qa" if subtask.startswith("qa") else subtask
    config = suite_module(f"ruler.{family}_utils").CONFIG
    config = config.get("variable_tracking", config)
    return config["template"], config["answer_prefix"].replace("assgined", "assigned")


@pytest.mark.parametrize("subtask", [pytest.param(name, marks=pytest.mark.slow if name.startswith("niah") else ()) for name in RULER])
def test_ruler(chat, tmp_path, subtask):
    """lm_eval's template, filled with what the sample is about, in a user turn, and the answer prefix after the assistant's header."""
    before, after, special = template_of(chat)
    assert not special

    def count(text):
        return len(chat(text, add_special_tokens=False).input_ids)

    suite = Ruler(
        (subtask,),
        1,
        8192,
        lambda text: chat(text, add_special_tokens=False).input_ids,
        count,
        42,
        write_resources(tmp_path),
        (before, after),
    )
    sample = suite.sample(suite.items()[0])
    template, prefix = ruler_words(subtask)
    if subtask.startswith("niah") and len(sample.references) == 1:
        for said, instead in (("Some", "A"), ("are all", "is"), ("are", "is")):
            template, prefix = template.replace(said, instead), prefix.replace(said, instead)
    fields = {"context": "(?P<context>.*)", "query": "(?P<query>.*)", "type_needle_v": "(?P<type_needle_v>[a-z]+)", "num_v": "5"}
    text = sample.prompt.removeprefix(before)
    asked = re.fullmatch(pattern_of(template, fields) + re.escape(after) + ".*", text, re.DOTALL)
    assert asked, "another template"
    values = {"query": ""} | {name: value for name, value in asked.groupdict().items() if value is not None} | {"num_v": 5}
    turn = {"role": "user", "content": template.format(**values)}
    theirs = chat.apply_chat_template([turn], False, True, None) + " " + prefix.format(**values).lstrip()
    assert sample.tokens == chat(theirs, add_special_tokens=False).input_ids
    assert len(sample.tokens) + sample.max_new_tok <= 8192


def pattern_of(template, fields):
    """A pattern for what a template may become; a field that comes again must be the same."""
    parts, seen = [], set()
    for part in re.split(r"(\{[a-z_]+\})", template):
        name = part.strip("{}")
        again = f"(?P={name})" if fields.get(name, "").startswith("(?P<") and name in seen else fields.get(name)
        parts.append(again if part.startswith("{") and name in fields else re.escape(part))
        seen.add(name)
    return "".join(parts)
