"""RULER at one length: the 13 official tasks, or some of them, on rows that are made for the tokenizer of the model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hipexp.suites.lm_eval import check_installed
from hipexp.suites.ruler import resources as files
from hipexp.suites.ruler.generate import CountTok, Row, check_length, make_rows, words_of
from hipexp.suites.ruler.tasks import EDITION, SEED, TASKS, check_subtasks, resources_of
from hipexp.suites.sample import Encode, Item, ProtocolCard, Sample, digest

ON_STAND_INS, ON_OWN_DATA = "stand-in", "own data"  # protocols of scores that are no official ones


class Ruler:
    """``samples`` rows of each task, at most ``length_tok`` tokens long; see ``hipexp.suites.sample.Suite``.

    ``tokenizer_count`` counts tokens without special ones, as RULER does; what ``encode`` adds, such as a start token, comes on top of
    ``length_tok``. ``template`` is the chat template: the text before the task text, and between it and the answer prefix, which the model
    has to continue. Made for ``seed`` 42, that of the official rows. ``resources`` is a folder, see ``hipexp.suites.ruler.resources``.
    The rows of one task are made together when the first of them is asked for, and kept until another task is: so go task by task.
    Raises ``ConfigError`` for an unknown task, a damaged file, more samples than questions and a length that holds no sample,
    ``DataMissing`` for a file not there.

    Made of a stand-in (``hipexp.suites.ruler.stand_ins``) its protocol is ``stand-in``, else, of a file that is not known to be the
    published one, ``own data``: card, tables and samples say so.
    """

    def __init__(
        self,
        subtasks: tuple[str, ...],
        samples: int,
        length_tok: int,
        encode: Encode,
        tokenizer_count: CountTok,
        seed: int,
        resources: Path,
        template: tuple[str, str] = ("", ""),
    ):
        self.subtasks, self.samples, self.length_tok = check_subtasks(subtasks), samples, length_tok
        self.encode, self.count_tok, self.seed = encode, tokenizer_count, seed
        self.resources, self.template = resources, template
        self._rows: tuple[str, list[Row]] = ("", [])
        check_installed()
        for name in resources_of(self.subtasks):
            files.check(resources, name, samples)
        for name in self.subtasks:
            check_length(name, length_tok, seed, tokenizer_count, resources, template)

    def items(self) -> list[Item]:
        return [Item(name, index, self.length_tok) for name in self.subtasks for index in range(self.samples)]

    def sample(self, item: Item) -> Sample:
        row = self._rows_of(item.subtask)[item.index]
        before, after = self.template
        prompt = before + row["input"] + after + row["answer_prefix"]
        new_tok = TASKS[item.subtask].new_tok
        meta: dict[str, Any] = {}
        if "token_position_answer" in row:
            meta["depth"] = round(row["token_position_answer"] / (row["length"] - new_tok), 4)
        if stand_ins := self._stand_ins([item.subtask]):
            meta["stand_ins"] = stand_ins
        if own_data := self._own_data([item.subtask]):
            meta["own_data"] = own_data
        return Sample(item.subtask, item.index, prompt, self.encode(prompt), row["outputs"], new_tok, item.length_tok, meta=meta)

    def score(self, sample: Sample, prediction: str) -> float:
        from hipexp.suites.scoring.ruler import score_ruler

        return score_ruler(sample.subtask, prediction, sample.references)

    def card(self) -> ProtocolCard:
        from hipexp.suites.scoring.ruler import METRICS, SCORER

        each = self.subtasks
        return ProtocolCard(
            suite="ruler",
            protocol=ON_STAND_INS if self._stand_ins(each) else ON_OWN_DATA if self._own_data(each) else "official",
            edition=EDITION,
            template={name: digest("".join(words_of(TASKS[name]))) for name in each},
            wording="official",
            metric={name: METRICS[name] for name in each},
            scorer=SCORER,
            length_tok=dict.fromkeys(each, self.length_tok),
            samples=dict.fromkeys(each, self.samples),
            new_tok={name: TASKS[name].new_tok for name in each},
            data=self._data(),
            chat_template=digest("\0".join(self.template)) if any(self.template) else None,
            note=self._note(),
        )

    def _rows_of(self, subtask: str) -> list[Row]:
        if self._rows[0] != subtask:
            self._rows = ("", [])  # free the others first
            made = make_rows(subtask, self.length_tok, self.samples, self.seed, self.count_tok, self.resources, template=self.template)
            self._rows = (subtask, made)
        return self._rows[1]

    def _stand_ins(self, subtasks: Iterable[str]) -> list[str]:
        return files.stand_ins(self.resources, resources_of(subtasks))

    def _own_data(self, subtasks: Iterable[str]) -> list[str]:
        return files.unknown(self.resources, resources_of(subtasks))

    def _data(self) -> str:
        read = resources_of(self.subtasks)
        parts = [f"generated, seed {self.seed}", f"wonderwords {files.words_version()}"]
        if "essays" in read:
            parts.append(f"sentences: {files.sentences(self.resources).name}")
        made = self._stand_ins(self.subtasks)
        for file, sha256 in files.digests(self.resources, read).items():
            parts.append(f"{file} sha256 {sha256}" + (f" ({files.STAND_IN})" if file in made else ""))
        return "; ".join(parts)

    def _note(self) -> str:
        told = []
        if made := self._stand_ins(self.subtasks):
            names = ", ".join(name for name in self.subtasks if self._stand_ins([name]))
            told.append(f"no official RULER score ({names}): {', '.join(made)}, each a {files.STAND_IN}")
        if own := self._own_data(self.subtasks):
            names = ", ".join(name for name in self.subtasks if self._own_data([name]))
            told.append(f"no official RULER score ({names}): {', '.join(own)}, not known to be the published data")
        if self.seed != SEED:
            told.append(f"rows of seed {self.seed}: the official ones are of seed {SEED} (seed={SEED})")
        if "cwe" in self.subtasks and not files.has(self.resources, "more_words"):
            file = files.SOURCES["more_words"].file
            told.append(f"cwe without {file}: beyond 8166 words (about 128K tokens, for no tokenizer below 48K) it is refused")
        return "; ".join(told)
