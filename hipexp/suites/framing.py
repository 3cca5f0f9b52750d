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
    ``framed``: it is cut with the chat template around it, to a limit that holds the new tokens too, and what is left is not decoded.
    """

    odd_to_end: bool
    together: bool = True
    framed: bool = False

    def __str__(self) -> str:
        odd = "" if self.odd_to_end else ", rounded down"
        if self.framed:
            return f"first and last half of the limit less the new tokens{odd}, never decoded"
        return f"first and last half of the limit{odd}, decoded {'together' if self.together else 'one by one'}"

    def ends(self, ids: list[int], limit_tok: int) -> tuple[list[int], list[int]]:
        """What is left of more than ``limit_tok`` tokens."""
        head = limit_tok // 2
        tail = limit_tok - head if self.odd_to_end else head
        return ids[:head], ids[len(ids) - tail :]


@dataclass(frozen=True)
class Framed:
    """A prompt as a model gets it; ``removed_tok`` tokens were cut out. The text of one that was cut as tokens is what they decode to."""

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
    first, last = cut.ends(ids, limit_tok)
    ends = [first + last] if cut.together else [first, last]
    return "".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends), len(ids) - len(first) - len(last)


def frame(
    text: str, tokenizer: Any, *, limit_tok: int | None, cut: Cut, chat: bool, system: str | None = None, role: str = "user"
) -> Framed:
    """``text`` cut to ``limit_tok`` (None: whole), as one turn of ``role`` in the tokenizer's chat template if ``chat``.

    A beginning-of-text token that the template writes out is not put before it again. Without a template a system message stands before
    the text. Raises ``ConfigError`` if the template refuses such a turn.
    """
    removed = 0
    if limit_tok is not None and not cut.framed:
        text, removed = cut_text(text, tokenizer, limit_tok, cut)
    if chat and has_template(tokenizer):
        text = in_template(text, tokenizer, role, system)
        special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    else:
        text, special = f"{system}\n\n{text}" if system else text, True
    tokens = list(tokenizer(text, add_special_tokens=special).input_ids)
    if limit_tok is not None and cut.framed and len(tokens) > limit_tok:
        first, last = cut.ends(tokens, limit_tok)
        removed, tokens = len(tokens) - len(first) - len(last), first + last
        text = tokenizer.decode(tokens, skip_special_tokens=False)
    return Framed(text, tokens, removed)


def in_template(text: str, tokenizer: Any, role: str = "user", system: str | None = None) -> str:
    """A turn in the tokenizer's chat template, with the beginning of an answer. Raises ``ConfigError`` if the template refuses it."""
    from jinja2 import TemplateError

    turns = [*([{"role": "system", "content": system}] if system else []), {"role": role, "content": text}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **GENERATION))
    except TemplateError as error:
        roles = " and ".join(turn["role"] for turn in turns)
        raise ConfigError(
            f"the chat template of this tokenizer refuses turns of {roles} ({error}); use another task.protocol or model"
        ) from error


def template_of(tokenizer: Any) -> tuple[str, str, bool]:
    """The text that a chat template puts before and after a user turn, and whether special tokens still have to be added to it."""
    if not has_template(tokenizer):
        return "", "", True
    mark = "\x00text\x00"
    text = in_template(mark, tokenizer)
    before, found, after = text.partition(mark)
    if not found:
        raise ConfigError("the chat template of this tokenizer changes what a user says, so that RULER's rows cannot be put into it")
    return before, after, not (tokenizer.bos_token and before.startswith(tokenizer.bos_token))


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
