"""Cut the middle out of prompts that are longer than a model may see."""

from __future__ import annotations

import dataclasses

from hipexp.suites.sample import Item, ProtocolCard, Sample, Suite


def cut_middle(tokens: list[int], keep_tok: int) -> list[int]:
    """The first and the last half of ``keep_tok`` tokens; the first half gets the odd one. Short prompts stay whole."""
    if len(tokens) <= keep_tok:
        return tokens
    tail = keep_tok // 2
    return tokens[: keep_tok - tail] + tokens[len(tokens) - tail :]


class Truncated:
    """A suite whose prompts and answers together take at most ``limit_tok`` tokens, by ∞Bench's rule: cut in the middle."""

    def __init__(self, suite: Suite, limit_tok: int):
        self.suite, self.limit_tok = suite, limit_tok

    def items(self) -> list[Item]:
        return self.suite.items()

    def sample(self, item: Item) -> Sample:
        sample = self.suite.sample(item)
        tokens = cut_middle(sample.tokens, self.limit_tok - sample.max_new_tok)
        return dataclasses.replace(sample, tokens=tokens, removed_tok=len(sample.tokens) - len(tokens))

    def score(self, sample: Sample, prediction: str) -> float:
        return self.suite.score(sample, prediction)

    def card(self) -> ProtocolCard:
        rule = f"middle: first and last half of {self.limit_tok} tokens less the new ones"
        return dataclasses.replace(self.suite.card(), truncation={"rule": rule, "removed_tok": {}})
