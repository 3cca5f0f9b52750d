"""From the text of a prompt to the tokens that a model is given: cut in the middle, wrapped in the chat template, nothing lost unsaid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hipexp.config.schema import ConfigError

GENERATION = {"add_generation_prompt": True, "date_string": "26 Jul 2024"}  # some templates write a date: the same one on every day


@dataclass(frozen=True)
class Cut:
    """How the middle of a prompt is cut out. ``odd_to_end``: an odd token of the limit belongs to the end, else it is lost.

    ``together``: both ends are decoded as one text, else each by itself, which with some tokenizers loses a space between them.
    """

    odd_to_end: bool
    together: bool

    def __str__(self) -> str:
        odd = "" if self.odd_to_end else ", rounded down"
        return f"first and last half of the limit{odd}, decoded {'together' if self.together else 'one by one'}"


@dataclass(frozen=True)
class Framed:
    """A prompt as a model gets it; ``removed_tok`` tokens of its text were cut out."""

    prompt: str
    tokens: list[int]
    removed_tok: int


def cut_text(text: str, tokenizer: Any, limit_tok: int, cut: Cut) -> tuple[str, int]:
    """The text without its middle, if it has more than ``limit_tok`` tokens (special ones counted), and how many tokens went.

    What is left is decoded without special tokens.
    """
    ids = list(tokenizer(text).input_ids)
    if len(ids) <= limit_tok:
        return text, 0
    head = limit_tok // 2
    tail = limit_tok - head if cut.odd_to_end else head
    first, last = ids[:head], ids[len(ids) - tail :]
    ends = [first + last] if cut.together else [first, last]
    return "".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends), len(ids) - head - tail


def frame(text: str, tokenizer: Any, *, limit_tok: int | None, cut: Cut, chat: bool, system: str | None = None) -> Framed:
    """``text`` cut to ``limit_tok`` (None: whole), as one user turn of the tokenizer's chat template if ``chat``.

    A beginning-of-text token that the template writes out is not put before it again. Without a template a system message stands before
    the text.
    """
    removed = 0
    if limit_tok is not None:
        text, removed = cut_text(text, tokenizer, limit_tok, cut)
    if chat and has_template(tokenizer):
        turns = [{"role": "system", "content": system}] if system else []
        text = tokenizer.apply_chat_template([*turns, {"role": "user", "content": text}], tokenize=False, **GENERATION)
        special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    else:
        text, special = f"{system}\n\n{text}" if system else text, True
    return Framed(text, list(tokenizer(text, add_special_tokens=special).input_ids), removed)


def template_of(tokenizer: Any) -> tuple[str, str, bool]:
    """The text that a chat template puts before and after a user turn, and whether special tokens still have to be added to it."""
    if not has_template(tokenizer):
        return "", "", True
    mark = "\x00text\x00"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, **GENERATION)
    before, found, after = text.partition(mark)
    if not found:
        raise ConfigError("the chat template of this tokenizer changes what a user says, so that RULER's rows cannot be put into it")
    return before, after, not (tokenizer.bos_token and before.startswith(tokenizer.bos_token))


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
