"""``python -m hipexp models``: every family that is known to fit, tried on a small checkpoint of its real classes. A few minutes.

Each is written to disk with random weights, loaded back as a user's model is, and compared with itself as transformers runs it.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.config.compose import compose
from hipexp.config.model import PACKAGE
from hipexp.config.schema import ConfigError, Model, Pipeline, Stage, spans
from hipexp.output import answer, aside, split_flags
from hipexp.report.tables import markdown_table
from hipexp.run.identity import version_of
from hipexp.run.ledger import make_folder, runs_root, write_text

if TYPE_CHECKING:
    from hipexp.hf import Loaded
    from hipexp.hf.families import Family

TOKENIZER = PACKAGE / "needle" / "model"
NEW_TOK = 6
CLOSE = 1e-4  # of the largest logit, in fp32
HEADER = ["family", "class", "`model=`", "layers with the pipeline", "difference", "same tokens", "in parts", "in a batch", "padded"]
WORDS = """\
Difference: the largest one between logits under `3stage` and those of the untouched model, in parts of the largest logit, over {tok}
tokens, where all of them fit its budget (fp32). Same tokens: greedy answers of hipexp's loop and of `model.generate`, there. Then, of a
pipeline that prunes: in parts, a prompt read 64 tokens at a time answers as one read at once; in a batch, three prompts of different
lengths as each alone; padded, rows with padding on the left under `model.generate` as each alone."""


def tokens_of(n: int, seed: int) -> list[int]:
    """Tokens by lot, none of them special."""
    import torch

    return torch.randint(10, 1000, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def pruning() -> Pipeline:
    """A pipeline that prunes from 137 tokens on."""
    return Pipeline(stages=[Stage(16, 128, 64, 4, 4), Stage(8, 64, 64, 1, 2)], sink_tok=8, window_tok=64)


def checkpoint(family: Family, folder: Path) -> Path:
    """Write a checkpoint of a family into ``folder``, with the embedded model's tokenizer."""
    from hipexp.hf.families import make

    make(family).save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def exact_tok(pipeline: Pipeline, n_layers: int) -> int:
    """How many tokens all layers see whole: the smallest budget."""
    return min(plan.sink_tok + plan.window_tok + plan.stages[-1].keep_tok for plan in pipeline.plan(n_layers))


def difference(loaded: Loaded, pipeline: Pipeline, n_tok: int) -> float:
    """The largest one between logits with a pipeline and without hipexp, in parts of the largest logit."""
    import torch

    from hipexp.hf import install

    ids = torch.tensor([tokens_of(n_tok, 1)])
    with torch.inference_mode():
        before = loaded.model(ids, use_cache=False).logits
        with install(loaded.model, pipeline, loaded.trained_tok):
            after = loaded.model(ids, use_cache=False).logits
    return float((after - before).abs().max() / before.abs().max())


def answers(loaded: Loaded, prompts: list[list[int]], pipeline: Pipeline, part_tok: int = 4096) -> list[list[int]]:
    """What hipexp's loop says."""
    from hipexp.hf import generate, install

    with install(loaded.model, pipeline, loaded.trained_tok) as installed:
        done = generate(loaded, prompts, max_new_tok=NEW_TOK, prefill_chunk_tok=part_tok, installed=installed)
    return [one.tokens for one in done]


def own_answers(loaded: Loaded, prompts: list[list[int]], pipeline: Pipeline | None) -> list[list[int]]:
    """What ``model.generate`` says of prompts padded on the left to one length, with a pipeline or without hipexp."""
    import torch

    from hipexp.hf import install

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with nullcontext() if pipeline is None else install(loaded.model, pipeline, loaded.trained_tok):
        done = loaded.model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOK, do_sample=False)
    return done[:, longest:].tolist()


def measure(family: Family) -> dict[str, Any]:
    """The cells of a family's row, by the names in ``HEADER``."""
    from hipexp import hf

    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        loaded = hf.load(Model(path=str(checkpoint(family, Path(folder))), dtype="float32"))
    whole, small = compose(["+pipeline=3stage"]).pipeline, pruning()
    assert whole is not None
    prompts, attached = [tokens_of(n, n) for n in (400, 233, 317)], [i for i in range(loaded.n_layers) if i not in loaded.own_layers]
    alone = [answers(loaded, [prompt], small)[0] for prompt in prompts]

    def told(same: bool) -> str:
        return "yes" if same else "no"

    cells = {
        "difference": f"{difference(loaded, whole, exact_tok(whole, loaded.n_layers)):.1e}",
        "same tokens": told(answers(loaded, prompts, whole) == [own_answers(loaded, [prompt], None)[0] for prompt in prompts]),
        "in parts": told(answers(loaded, prompts, small, 64) == alone),
        "in a batch": told(answers(loaded, prompts, small) == alone),
        "padded": told(own_answers(loaded, prompts, small) == [own_answers(loaded, [prompt], small)[0] for prompt in prompts]),
    }
    return {"class": f"`{family.config}`", "layers with the pipeline": f"{spans(attached)} (of {loaded.n_layers})", **cells}


def main(argv: list[str]) -> int:
    """Try every family and write the table; ``argv`` takes no words. Returns 1 if a model differs where it must not."""
    from hipexp.hf.families import FAMILIES

    flags, others = split_flags(argv)
    if others:
        raise ConfigError(f"models takes no argument {others[0]!r}; it tries every family")
    rows = []
    for number, (name, family) in enumerate(FAMILIES.items(), 1):
        with aside(flags):
            print(f"[{number}/{len(FAMILIES)}] {name}", flush=True)
        cells = {"family": name, "`model=`": ", ".join(f"`{preset}`" for preset in family.presets) or None, **measure(family)}
        rows.append([cells[column] for column in HEADER])
    pipeline = compose(["+pipeline=3stage"]).pipeline
    assert pipeline is not None
    words = WORDS.format(tok=exact_tok(pipeline, 4))
    parts = [f"# Families, on transformers {version_of('transformers')}", words, markdown_table(HEADER, rows, left=3)]
    path = runs_root() / "models" / "table.md"
    make_folder(path.parent)
    write_text(path, "\n\n".join(parts) + "\n")
    data = {"table": str(path), "families": [dict(zip(HEADER, row, strict=True)) for row in rows]}
    answer(flags, f"{path.read_text(encoding='utf-8')}\n{path}", data, str(path))
    return int(not all(float(row[HEADER.index("difference")]) <= CLOSE and set(row[-4:]) == {"yes"} for row in rows))
