"""From the text of a prompt to the tokens that a model is given: cut in the middle, wrapped in the chat template, nothing lost unsaid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hipexp.config.schema import ConfigError

CUTS = {"none": "whole prompts", "halves": "first and last half of the limit, rounded down", "middle": "first and last half of the limit"}


@dataclass(frozen=True)
class Framed:
    """A prompt as a model gets it; ``removed_tok`` tokens of its text were cut out."""

    prompt: str
    tokens: list[int]
    removed_tok: int


def cut_text(text: str, tokenizer: Any, limit_tok: int, rule: str) -> tuple[str, int]:
    """The text without its middle, if it has more than ``limit_tok`` tokens (special ones counted), and how many tokens went.

    Both ends are decoded without special tokens. ``halves``: both have ``limit_tok // 2`` tokens (LongBench); ``middle``: the last one
    gets the odd token (∞Bench).
    """
    ids = list(tokenizer(text).input_ids)
    if len(ids) <= limit_tok:
        return text, 0
    head = limit_tok // 2
    tail = head if rule == "halves" else limit_tok - head
    ends = ids[:head], ids[len(ids) - tail :]
    return "".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends), len(ids) - head - tail


def frame(text: str, tokenizer: Any, *, limit_tok: int | None, rule: str, chat: bool, system: str | None = None) -> Framed:
    """``text`` cut to ``limit_tok`` (None: whole), as one user turn of the tokenizer's chat template if ``chat``.

    A beginning-of-text token that the template writes out is not put before it again. Without a template a system message stands before
    the text.
    """
    removed = 0
    if limit_tok is not None:
        text, removed = cut_text(text, tokenizer, limit_tok, rule)
    if chat and has_template(tokenizer):
        turns = [{"role": "system", "content": system}] if system else []
        text = tokenizer.apply_chat_template([*turns, {"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    else:
        text, special = f"{system}\n\n{text}" if system else text, True
    return Framed(text, list(tokenizer(text, add_special_tokens=special).input_ids), removed)


def template_of(tokenizer: Any) -> tuple[str, str, bool]:
    """The text that a chat template puts before and after a user turn, and whether special tokens still have to be added to it."""
    if not has_template(tokenizer):
        return "", "", True
    mark = "\x00text\x00"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True)
    before, found, after = text.partition(mark)
    if not found:
        raise ConfigError("the chat template of this tokenizer changes what a user says, so that RULER's rows cannot be put into it")
    return before, after, not (tokenizer.bos_token and before.startswith(tokenizer.bos_token))


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
