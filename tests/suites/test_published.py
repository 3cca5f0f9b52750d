"""Suites of published rows: prompts, cuts, chat templates, what goes to the scorer, cards. On small data in the official schemas."""

import json
from types import SimpleNamespace

import pytest

import official_data
from hipexp.config.schema import ConfigError, Task
from hipexp.suites import check_task, filled, open_suite, origins, rules_of, subtasks_of
from hipexp.suites.framing import Cut, cut_text, frame, template_of
from hipexp.suites.infbench_official import PROTOCOLS, SUBTASKS
from hipexp.suites.sample import DataMissing, digest
from hipexp.suites.scoring.infbench import LISTS

pytest.importorskip("lm_eval")
WHOLE = Cut(True, True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(official_data.write_all(tmp_path_factory.mktemp("data")))


class Characters:
    """A token for each character, and a start token."""

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(character) for character in text])

    def decode(self, ids, skip_special_tokens):
        return "".join("<s>" if i == 1 else chr(i) for i in ids if i != 1 or not skip_special_tokens)


class ChatTokenizer(Characters):
    """With a chat template that writes its own start token."""

    chat_template = "a template"
    bos_token = "<s>"

    def apply_chat_template(self, turns, tokenize, add_generation_prompt, date_string):
        assert not tokenize and add_generation_prompt
        return "<s>" + "".join(f"[{turn['role']}]{turn['content']}" for turn in turns) + "[assistant]"


@pytest.fixture
def plain():
    return Characters()


@pytest.fixture
def chatty():
    return ChatTokenizer()


def task(name, data, **more):
    protocol = {"infbench": "completion"}.get(name, "official")
    return Task(name=name, data=data, samples=2, **{"protocol": protocol} | more)


ALL = [("longbench", {}), ("longbench2", {}), *(("infbench", {"protocol": name}) for name in PROTOCOLS)]


@pytest.mark.parametrize(("name", "more"), ALL)
def test_every_subtask_gives_samples_that_can_be_scored(name, more, data, plain):
    suite = open_suite(task(name, data, **more), plain, 1000, 0)
    items = suite.items()
    assert [item.subtask for item in items] == [name for name in subtasks_of(task(name, data, **more)) for _ in range(2)]
    card = suite.card().to_dict()
    assert json.loads(json.dumps(card)) == card
    for item in items:
        sample = suite.sample(item)
        assert sample.tokens == plain(sample.prompt).input_ids and sample.removed_tok == 0 and sample.references
        assert suite.score(sample, "nothing of the kind") < 100
        assert suite.sample(item) == sample and card["new_tok"][item.subtask] == sample.max_new_tok
        json.dumps(sample.meta)
    assert all(card["samples"][name] == 2 and len(card["template"][name]) == 12 for name in card["template"])


def test_a_right_answer_scores_100(data, plain):
    for name, right in (("longbench", "qasper"), ("infbench", "kv_retrieval"), ("infbench", "code_run"), ("longbench", "lcc")):
        suite = open_suite(task(name, data, subtasks=[right]), plain, 1000, 0)
        for item in suite.items():
            sample = suite.sample(item)
            assert suite.score(sample, str(sample.references[0])) == 100
    suite = open_suite(task("longbench2", data), plain, 1000, 0)
    sample = suite.sample(suite.items()[0])
    assert suite.score(sample, f"The correct answer is ({sample.references[0]}).") == 100


def test_prompts_are_the_files_words_with_the_rows_fields(data, plain):
    suite = open_suite(task("infbench", data, subtasks=["math_find"]), plain, 1000, 0)
    row = suite._rows["math_find"][0]
    kind = row["input"].removeprefix("The ").partition(" number")[0]
    assert suite.sample(suite.items()[0]).prompt == f"What is the {kind} number in the following list?\n{row['context']}\n{row['input']}"
    suite = open_suite(task("infbench", data, subtasks=["kv_retrieval"], protocol="infllm"), plain, 1000, 0)
    row = suite._rows["kv_retrieval"][0]
    assert suite.sample(suite.items()[0]).prompt == f"{row['context']}\nWhat belongs to {row['input'].removeprefix('Key: ')}?"
    suite = open_suite(task("longbench2", data), plain, 1000, 0)
    assert "\nQuestion: Which one?\n(A) " in suite.sample(suite.items()[0]).prompt  # stripped


def test_six_tasks_of_longbench_have_no_chat_template(data, chatty):
    suite = open_suite(task("longbench", data), chatty, 1000, 0)
    without = {item.subtask for item in suite.items() if "[assistant]" not in suite.sample(item).prompt}
    assert without == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert suite.card().chat_template.startswith(f"{digest(chatty.chat_template)} (narrativeqa, qasper")
    assert "samsum" not in suite.card().chat_template and "end of the first line (samsum)" in suite.card().stops
    few = open_suite(task("longbench", data, subtasks=["trec"]), chatty, 1000, 0).card()
    assert few.chat_template is None and "chat template" not in few.note and few.stops == ["end of text"]


def test_samsum_ends_with_its_line(data, plain):
    suite = open_suite(task("longbench", data), plain, 1000, 0)
    assert {item.subtask for item in suite.items() if suite.sample(item).one_line} == {"samsum"}


def test_completion_has_no_chat_template_and_chat_has_a_system_message(data, chatty):
    for protocol, prompts in (
        ("completion", ""),
        ("chat", "<s>[system]You are a helpful assistant[user]"),
        ("infllm", "<s>[user]"),
        ("minference", "<s>[system]"),
    ):
        suite = open_suite(task("infbench", data, subtasks=["passkey"], protocol=protocol), chatty, 1000, 0)
        sample = suite.sample(suite.items()[0])
        assert sample.prompt.startswith(prompts or suite._rows["passkey"][0]["context"])


def test_the_start_token_stands_once(chatty, plain):
    made = frame("abc", chatty, limit_tok=None, cut=WHOLE, chat=True)
    assert made.tokens == plain("<s>[user]abc[assistant]", add_special_tokens=False).input_ids
    made = frame("abc", plain, limit_tok=None, cut=WHOLE, chat=True, system="Be kind.")
    assert made.prompt == "Be kind.\n\nabc" and made.tokens == plain(made.prompt).input_ids
    assert template_of(chatty) == ("<s>[user]", "[assistant]", False) and template_of(plain) == ("", "", True)


@pytest.mark.parametrize(("odd", "limit", "head", "tail"), [(False, 11, 5, 5), (True, 11, 5, 6), (True, 10, 5, 5)])
@pytest.mark.parametrize("together", [True, False])
def test_the_middle_goes(odd, together, limit, head, tail, plain):
    """The start token counts, and is not decoded."""
    words, cut = "abcdefghijklmnopqrstuvwxyz", Cut(odd, together)
    text, removed = cut_text(words, plain, limit, cut)
    assert text == words[: head - 1] + words[26 - tail :] and removed == 27 - head - tail
    assert cut_text(words, plain, 27, cut) == (words, 0)


def test_a_space_between_the_ends(plain):
    """Some decoders drop the space that a text begins with: LongBench loses it, the others do not."""

    class Stripping(Characters):
        def decode(self, ids, skip_special_tokens):
            return super().decode(ids, skip_special_tokens).removeprefix(" ")

    text = "abcdefgh ijk"
    assert cut_text(text, Stripping(), 8, Cut(True, together=True))[0] == "abc ijk"
    assert cut_text(text, Stripping(), 8, Cut(True, together=False))[0] == "abcijk"


@pytest.mark.parametrize(
    ("name", "more", "cut"),
    [
        ("longbench", {}, Cut(False, False)),
        ("longbench2", {}, Cut(True, True)),
        ("infbench", {"protocol": "completion"}, Cut(False, True)),
        ("infbench", {"protocol": "chat"}, Cut(True, True)),
        ("infbench", {"protocol": "minference"}, Cut(False, framed=True)),
    ],
)
def test_cuts_of_the_official_scripts(name, more, cut, data):
    assert rules_of(task(name, data, **more), None).cut() == cut


def test_cut_prompts_are_recorded(data, plain):
    suite = open_suite(task("longbench", data, subtasks=["qasper"], truncate_tok=100), plain, 1000, 0)
    sample = suite.sample(suite.items()[0])
    whole = open_suite(task("longbench", data, subtasks=["qasper"]), plain, 1000, 0).sample(suite.items()[0])
    assert len(sample.tokens) == 100 and sample.removed_tok == len(whole.tokens) - 100
    assert sample.prompt == whole.prompt[:49] + whole.prompt[-50:]  # the start token counts
    assert "100 tokens, before the chat template" in suite.card().truncation["rule"]


@pytest.mark.parametrize("odd", [0, 1])
def test_minference_cuts_with_the_template_around_and_the_new_tokens_taken_off(data, chatty, odd):
    """Half of what is left at each end, an odd token lost, as tokens: nothing is decoded and encoded again."""
    suite = open_suite(task("infbench", data, subtasks=["passkey"], protocol="minference", truncate_tok=100 + odd + 15), chatty, 1000, 0)
    (whole,) = (
        open_suite(task("infbench", data, subtasks=["passkey"], protocol="minference"), chatty, 1000, 0).sample(item)
        for item in suite.items()[:1]
    )
    sample = suite.sample(suite.items()[0])
    assert whole.prompt.startswith("<s>[system]") and whole.prompt.endswith("It is[assistant]") and "[user]" not in whole.prompt
    assert sample.tokens == whole.tokens[:50] + whole.tokens[-50:] and sample.removed_tok == len(whole.tokens) - 100
    assert sample.prompt.startswith("<s>[system]") and sample.prompt.endswith("It is[assistant]") and sample.max_new_tok == 15
    card = suite.card()
    assert card.length_tok == {"passkey": 115 + odd}
    assert card.truncation["rule"] == (
        f"first and last half of the limit less the new tokens, rounded down, never decoded, {115 + odd} tokens, with the chat template"
    )


def test_minference_has_ten_tasks_limits_and_a_scorer_of_its_own(data, plain):
    suite = open_suite(task("infbench", data, protocol="minference"), plain, 1000, 0)
    card = suite.card()
    assert tuple(card.new_tok) == LISTS["minference_10"]
    assert (card.new_tok["passkey"], card.new_tok["number_string"], card.new_tok["kv_retrieval"], card.new_tok["code_debug"]) == (
        15,
        20,
        80,
        5,
    )
    assert (card.protocol, card.edition) == ("minference", "minference")
    assert filled(task("infbench", data, protocol="minference"), 1000).edition == "minference"
    assert filled(task("infbench", data, protocol="infllm"), 1000).edition == "2024-06"
    sample = next(suite.sample(item) for item in suite.items() if item.subtask == "kv_retrieval")
    assert suite.score(sample, f"The{sample.references[0]}</s>") == 100
    with pytest.raises(
        ConfigError, match=r"task\.truncate_tok=1201 leaves no prompt of longbook_sum_eng beside its 1200 new tokens; use 1202 or more"
    ):
        open_suite(task("infbench", data, protocol="minference", truncate_tok=1201), plain, 1000, 0)


def test_a_template_that_takes_no_system_message_is_refused_when_it_is_opened(data, chatty):
    from jinja2 import TemplateError

    def refuse(turns, **_):
        if turns[0]["role"] == "system":
            raise TemplateError("no system messages")
        return "<s>" + turns[0]["content"]

    chatty.apply_chat_template = refuse
    for protocol in ("chat", "minference"):
        with pytest.raises(ConfigError, match=r"refuses turns of system.* use another task.protocol or model"):
            open_suite(task("infbench", data, subtasks=["passkey"], protocol=protocol), chatty, 1000, 0)
    open_suite(task("infbench", data, subtasks=["passkey"], protocol="infllm"), chatty, 1000, 0)


def test_what_data_are_decides_the_run(data, tmp_path, plain):
    before = origins(task("infbench", data, subtasks=["passkey"]))
    folder = official_data.write_all(tmp_path)
    assert origins(task("infbench", str(folder), subtasks=["passkey"])) == before
    path = folder / "infbench" / "passkey.jsonl"
    path.write_text(path.read_text().replace("river", "stream"))
    assert origins(task("infbench", str(folder), subtasks=["passkey"])) != before


@pytest.mark.parametrize("change", ["prompt", "limit", "row", "package"])
def test_what_decides_scores_decides_the_run(change, tmp_path, monkeypatch):
    folder = official_data.write_all(tmp_path) / "longbench"
    before = origins(task("longbench", str(tmp_path), subtasks=["qasper"]))
    if change == "prompt":
        (folder / "dataset2prompt.json").write_text((folder / "dataset2prompt.json").read_text().replace("Read", "See"))
    elif change == "limit":
        (folder / "dataset2maxlen.json").write_text((folder / "dataset2maxlen.json").read_text().replace("8", "9"))
    elif change == "row":
        path = folder / "data" / "qasper.jsonl"
        path.write_text(path.read_text().replace("the ", "a "))
    else:
        monkeypatch.setattr("hipexp.suites.lm_eval.importlib.metadata.version", lambda name: "0.4.13" if name == "lm_eval" else "9")
    assert origins(task("longbench", str(tmp_path), subtasks=["qasper"])) != before


@pytest.mark.parametrize("package", ["lm_eval", "jieba", "rouge"])
def test_packages_are_missed_before_anything_runs(package, data, monkeypatch, plain):
    import importlib.metadata

    real = importlib.metadata.version

    def version(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("hipexp.suites.lm_eval.importlib.metadata.version", version)
    with pytest.raises(ConfigError, match=rf"need {package}.*not installed; run: python -m pip install"):
        open_suite(task("longbench", data, subtasks=["qasper"]), plain, 1000, 0)
    open_suite(task("infbench", data, subtasks=["passkey", "code_debug"]), plain, 1000, 0)
    open_suite(task("longbench2", data), plain, 1000, 0)


@pytest.mark.parametrize(
    ("name", "subtask", "file", "change", "problem"),
    [
        ("longbench", "trec", "longbench/data/trec.jsonl", {"all_classes": None}, "all_classes=None must be the list of all class names"),
        (
            "longbench",
            "passage_retrieval_en",
            "longbench/data/passage_retrieval_en.jsonl",
            {"answers": ["2"]},
            "needs the number of a paragraph",
        ),
        ("longbench", "qasper", "longbench/data/qasper.jsonl", {"answers": ["", " "]}, "all its answers are empty"),
        ("infbench", "longbook_choice_eng", "infbench/longbook_choice_eng.jsonl", {"answer": ["x"]}, "row 1: "),
        ("infbench", "code_run", "infbench/code_run.jsonl", {"input": "?"}, "has no a call in its input"),
    ],
)
def test_rows_that_cannot_be_scored_are_named_before_anything_runs(name, subtask, file, change, problem, tmp_path, plain):
    path = official_data.write_all(tmp_path) / file
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    official_data.write_rows(path, [rows[0] | change, *rows[1:]])
    suite = open_suite(task(name, str(tmp_path), subtasks=[subtask]), plain, 1000, 0)
    with pytest.raises(ConfigError, match="has rows that cannot be scored \\(1\\)") as refused:
        suite.items()
    assert problem in str(refused.value) and subtask in str(refused.value)


def test_bad_rows_are_never_scored(tmp_path, plain):
    folder = official_data.write_all(tmp_path)
    path = folder / "longbench" / "data" / "qasper.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[1]["context"]
    rows[2]["answers"] = []
    official_data.write_rows(path, rows)
    suite = open_suite(task("longbench", str(folder), subtasks=["qasper"]), plain, 1000, 0)
    with pytest.raises(ConfigError, match=r"qasper.jsonl has bad rows \(2\).*line 2: context is missing; line 3: answers must be a list"):
        suite.items()


def test_prompts_that_ask_for_more_than_rows_have(tmp_path, plain):
    folder = official_data.write_all(tmp_path)
    (folder / "longbench" / "dataset2prompt.json").write_text(json.dumps({"qasper": "{context} {other}"}))
    suite = open_suite(task("longbench", str(folder), subtasks=["qasper"]), plain, 1000, 0)
    with pytest.raises(ConfigError, match="prompt of qasper asks for 'other'"):
        suite.sample(suite.items()[0])
    (folder / "longbench" / "dataset2prompt.json").write_text(json.dumps({"qasper": "{context} }"}))
    suite = open_suite(task("longbench", str(folder), subtasks=["qasper"]), plain, 1000, 0)
    with pytest.raises(ConfigError, match="prompt of qasper is no template"):
        suite.sample(suite.items()[0])


def test_missing_data_are_named_with_the_command(tmp_path, monkeypatch, plain):
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path))
    with pytest.raises(DataMissing, match=r"longbench needs data.zip .*run: python -m hipexp data pull longbench"):
        open_suite(task("longbench", None, subtasks=["qasper"]), plain, 1000, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="infbench", protocol="completion", subtasks=["nothing"]), "'nothing' is no task of ∞Bench"),
        (dict(name="infbench", protocol="chat", subtasks=["math_calc"]), "math_calc has no prompt under protocol chat"),
        (dict(name="infbench", protocol="chat", edition="2023"), "task.edition=2023 is no edition"),
        (dict(name="infbench", edition="2024-08"), "task.edition=2024-08 is for official prompts"),
        (dict(name="infbench", protocol="chat", edition="minference"), "task.edition=minference does not go with task.protocol=chat"),
        (dict(name="infbench", protocol="minference", edition="2024-06"), "task.edition=2024-06 does not go with task.protocol=minference"),
        (dict(name="infbench", protocol="chat", length_tok=5), "task.length_tok=5 is for prompts in our own words"),
        (dict(name="longbench", protocol="official", truncate_tok=1), "task.truncate_tok=1 must leave a beginning and an end"),
        (dict(name="longbench", protocol="official", subtasks=["narrativeqa_e"]), "'narrativeqa_e' is no task of LongBench"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ConfigError, match=message):
        check_task(Task(**fields))


def test_all_twelve():
    assert subtasks_of(Task(name="infbench", protocol="completion")) == SUBTASKS and len(SUBTASKS) == 12
    assert len(subtasks_of(Task(name="longbench", protocol="official"))) == 21
