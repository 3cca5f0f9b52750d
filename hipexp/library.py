"""hipexp on a model that somebody has already: install a pipeline into it, or let it answer prompts of any length."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hipexp import hf
from hipexp.config.schema import ConfigError, Offload, Pipeline
from hipexp.hf import Generation, Loaded, Sampling
from hipexp.hf.install import Installed
from hipexp.hf.sampling import GREEDY

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Plan = Pipeline | str | Sequence[str] | None
LOOK_BACK_TOK = 16  # besides as many tokens as a stop string has characters: a character may take several


@dataclass
class Answer(Generation):
    """What a prompt was answered: ``text`` up to the first stop string, ``tokens`` all that were made, and what they cost."""

    text: str = ""


@contextmanager
def install(
    model: PreTrainedModel, pipeline: Plan = "3stage", *, trained_tok: int | None = None, offload: str | None = None
) -> Iterator[Installed]:
    """Let a transformers ``model`` attend through a pipeline inside the context; after it the model is as before.

    ``pipeline``: the name of a preset, the path of a YAML file, a list of such words as the command line takes
    (``["+pipeline=3stage", "pipeline.heads=per_kv"]``), a ``Pipeline``, or None for dense attention. ``trained_tok``: the trained length,
    for position strategies that ask for it (None: that of the model's configuration). ``offload``: ``"host"`` or ``"disk"``, for
    :func:`generate`. Raises ConfigError for a model that cannot be attached, see ``docs/models.md``, and for mistakes in the pipeline.
    """
    plan, places = plan_of(pipeline, offload)
    with hf.install(model, plan, trained_tok, places) as installed:
        yield installed


def generate(
    model: PreTrainedModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pipeline: Plan = "3stage",
    offload: str | None = None,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    stop_token_ids: Collection[int] | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    prefill_chunk_tok: int = 8192,
) -> list[Answer]:
    """Answers to prompts of any length: read in parts, decoded together; each is what it would be alone.

    ``prompts``: texts, for which there must be a ``tokenizer``, or tokens. ``pipeline`` and ``offload`` as for :func:`install`. An answer
    ends before one of ``stop_token_ids`` (None: the end tokens of model and tokenizer), with one of the texts in ``stop``,
    which are cut off and need a tokenizer, or after ``max_new_tokens``. ``sampling``: of all prompts, or of each; greedy if nothing is
    said. ``prefill_chunk_tok``: tokens read at once, a multiple of 64. Raises ConfigError as :func:`install`, ValueError for an empty
    prompt, and FloatingPointError where the model's logits are not finite.
    """
    if isinstance(prompts, str | Mapping):
        raise ConfigError("prompts must be a list, of texts or of lists of tokens, also if there is only one: generate(model, [prompt])")
    if isinstance(stop, str) or not all(stop):
        raise ConfigError(f"stop={stop!r} must be a list of texts, none of them empty")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if tokenizer is None and (texts or stop):
        raise ConfigError("texts in prompts and stop need a tokenizer: generate(model, prompts, tokenizer=...)")
    if len(texts) not in (0, len(prompts)):
        raise ConfigError("prompts must all be texts or all be lists of tokens")
    tokens = [list(tokenizer(prompt).input_ids) for prompt in texts] if tokenizer and texts else [list(map(int, one)) for one in prompts]
    config = model.config.get_text_config()
    loaded = Loaded(model, tokenizer, config.max_position_embeddings, config.num_hidden_layers, str(model.dtype).removeprefix("torch."))
    look_back = max((len(text) for text in stop), default=0) + LOOK_BACK_TOK

    def ended(made: list[int]) -> bool:
        newest = decoded(tokenizer, made[-look_back:]) if stop else ""
        return any(text in newest for text in stop)

    with install(model, pipeline, offload=offload) as installed:
        done = hf.generate(
            loaded, tokens, max_new_tok=max_new_tokens, prefill_chunk_tok=prefill_chunk_tok, installed=installed, sampling=sampling,
            ended=ended, stop_ids=hf.end_tokens(model, tokenizer) if stop_token_ids is None else stop_token_ids,
        )  # fmt: skip
    return [Answer(**vars(one), text=_until(decoded(tokenizer, one.tokens), stop) if tokenizer else "") for one in done]


def plan_of(pipeline: Plan, offload: str | None = None) -> tuple[Pipeline | None, Offload]:
    """A pipeline and an offload as the command line would have them. Needs Hydra for what is only named."""
    if offload is None and (pipeline is None or isinstance(pipeline, Pipeline)):
        return pipeline, Offload()
    from hipexp.config.compose import compose

    words = [f"offload={offload}"] if offload else []
    if pipeline is None or isinstance(pipeline, Pipeline):
        return pipeline, compose(words).offload
    experiment = compose([*([f"+pipeline={pipeline}"] if isinstance(pipeline, str) else pipeline), *words])
    return experiment.pipeline, experiment.offload


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    """Tokens as text, without special ones."""
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _until(text: str, stop: Sequence[str]) -> str:
    """What is before the first of the stop strings."""
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]
