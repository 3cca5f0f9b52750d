"""A stand-in for ``hipexp.hf``: a model that reads the key off its prompt, and a tokenizer of words and characters."""

from __future__ import annotations

import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

from hipexp.config.schema import Offload


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
    return SimpleNamespace(model=inner, tokenizer=TOKENIZER, trained_tok=512, n_layers=5, dtype="float32", own_layers=[], notes=[])


@contextmanager
def install(model, pipeline, trained_tok=None, *, offload=None):
    """What was asked for, as ``generate`` gets it."""
    yield SimpleNamespace(pipeline=pipeline, offload=offload or Offload())


def answer_to(prompt):
    """What a perfect model writes; zero if the answer is not in the prompt."""
    asked = re.search(r'"([0-9a-f-]{36})": "$', prompt)
    pattern = rf'"{asked[1]}": "([^"]+)"' if asked else "(?:key|number|code) is ([0-9]+)"
    found = re.search(pattern, prompt)
    return (found[1] if found else "0") + '"' if asked else f" {found[1] if found else 0}."


def traffic_of(steps):
    """What two layers count: a stage and attention hit one time in four, in decode once a step."""
    counts = {
        "misses": 3,
        "h2d_bytes": 3 << 20,
        "d2h_bytes": 0,
        "disk_read_bytes": 0,
        "disk_write_bytes": 0,
        "stall_ms": 1.5,
        "uncached": 0,
    }
    write = dict.fromkeys(counts, 0) | {"hits": 0, "d2h_bytes": 1 << 20}
    rows = []
    for layer in (0, 1):
        for phase, times in (("prefill", 1), ("decode", steps)):
            rows += [{"layer": layer, "phase": phase, "by": by, **_times({"hits": 1, **counts}, times)} for by in ("attend", "0")]
            rows.append({"layer": layer, "phase": phase, "by": "write", **_times(write, times)})
    return {"rows": rows, "host_bytes": 2 << 20, "disk_bytes": 0}


def _times(counts, factor):
    return {name: value * factor for name, value in counts.items()}


def generate(loaded, prompts, *, max_new_tok, prefill_chunk_tok, stop_ids=(), not_first=(), progress=None, installed=None, graphs=True):
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
        made = Generation(tokens[:max_new_tok], decode_ms=[1.0 + (i % 4 == 0) for i in range(len(tokens[:max_new_tok]) - 1)])
        made.traffic = traffic_of(len(made.decode_ms)) if installed is not None and installed.offload.on else {}
        out.append(made)
    return out


def as_module():
    """This file as the module ``hipexp.hf``."""
    module = ModuleType("hipexp.hf")
    module.__dict__.update(
        load=load, load_tokenizer=lambda model: TOKENIZER, install=install, generate=generate, Generation=Generation, Loaded=object,
        end_tokens=lambda model, tokenizer: {2},
    )  # fmt: skip
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
