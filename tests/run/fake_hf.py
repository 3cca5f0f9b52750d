"""A stand-in for ``hipexp.hf``: a model that reads the key off its prompt, and a tokenizer of words and characters."""

from __future__ import annotations

import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace


class WordTokenizer:
    """Runs of letters, pairs of digits or hex characters, single other characters; ids by order of appearance."""

    eos_token_id = 2

    def __init__(self):
        self.ids: dict[str, int] = {"<s>": 1, "</s>": 2}
        self.words = {1: "", 2: ""}

    def __call__(self, text, add_special_tokens=True):
        found = re.findall(r"[0-9]{1,2}|[g-zG-Z]+|.", text, flags=re.DOTALL)
        ids = [self._id(word) for word in found]
        return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)

    def _id(self, word):
        if word not in self.ids:
            self.ids[word] = len(self.ids) + 1
            self.words[self.ids[word]] = word
        return self.ids[word]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.words[i] for i in ids)


@dataclass
class Generation:
    tokens: list[int]
    prefill_ms: float = 2.0
    decode_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 1 << 20
    cache_bytes: int = 0
    traffic: dict = field(default_factory=dict)
    exact: bool = True
    stopped: bool = True


TOKENIZER = WordTokenizer()
SETTINGS = SimpleNamespace(seconds=0.0, fail=None, calls=0)


def load(model):
    inner = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2]))
    return SimpleNamespace(model=inner, tokenizer=TOKENIZER, trained_tok=512, n_layers=5, dtype="float32")


@contextmanager
def install(model, pipeline, trained_tok=None):
    yield


def answer_to(prompt):
    """What a perfect model writes; zero if the answer is not in the prompt."""
    asked = re.search(r'"([0-9a-f-]{36})": "$', prompt)
    pattern = rf'"{asked[1]}": "([^"]+)"' if asked else "(?:key|number|code) is ([0-9]+)"
    found = re.search(pattern, prompt)
    return (found[1] if found else "0") + '"' if asked else f" {found[1] if found else 0}."


def generate(loaded, prompts, *, max_new_tok, prefill_chunk_tok, stop_ids=(), not_first=(), progress=None):
    out = []
    for prompt in prompts:
        SETTINGS.calls += 1
        if SETTINGS.fail is not None:
            raise SETTINGS.fail
        time.sleep(SETTINGS.seconds)
        if progress:
            progress(len(prompt))
        tokens = TOKENIZER(answer_to(TOKENIZER.decode(prompt)), add_special_tokens=False).input_ids
        if not stop_ids:
            tokens = (tokens * max_new_tok)[:max_new_tok]
        out.append(Generation(tokens[:max_new_tok], decode_ms=[1.0 + (i % 4 == 0) for i in range(len(tokens[:max_new_tok]) - 1)]))
    return out


def as_module():
    """This file as the module ``hipexp.hf``."""
    module = ModuleType("hipexp.hf")
    module.__dict__.update(
        load=load, load_tokenizer=lambda model: TOKENIZER, install=install, generate=generate, Generation=Generation, Loaded=object
    )
    return module


def main(folder, seconds):
    """Run one point in this process, as a child of the tests; ``seconds`` per sample. Torch is not asked, for speed."""
    import hipexp

    sys.modules["hipexp.hf"] = hipexp.hf = as_module()
    SETTINGS.seconds = float(seconds)
    from hipexp.config.schema import Experiment, Model, Task
    from hipexp.run import environment
    from hipexp.run.point import run_point

    environment.describe_environment = dict
    task = Task(name="infbench", subtasks=["passkey", "kv_retrieval"], samples=4, length_tok=600)
    run_point(Experiment(model=Model(path=folder, name="fake"), task=task))


if __name__ == "__main__":
    main(*sys.argv[1:])
