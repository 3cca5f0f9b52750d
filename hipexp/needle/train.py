"""Train ``needle`` from nothing: ``python -m hipexp.needle.train`` (``make needle``), on a GPU if there is one. Resumable.

A plain Llama (GQA, RoPE base 1,000,000) learns to answer retrieval prompts of growing length, in the three runs of ``phases``. Beside the
loss on the answers and a tenth of the language-model loss there is a *locality* loss: at the tokens that ask for a needle, attention logits
should single out the needle's neighbourhood, not one token of it, in one head of every key/value head and in all heads and a block of
queries together. Large language models have the first property (keys vary slowly along the text), and every method that judges a chunk by a
few of its keys relies on it; methods that keep one list for a block of queries and all heads rely on the second. Large models also look a
thing up in many heads and layers: here each of the two layers that do so has to do without the other in some steps.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hipexp.config.schema import ConfigError
from hipexp.needle.batches import FIRST_WEIGHT, Batch, batches, tokenizer
from hipexp.needle.locality import HEAD_DIM, LAYERS, LOCALITY, ROPE_THETA, attention
from hipexp.needle.phases import STEPS, TRAINED_LENGTH, Step, phase_of, step_of
from hipexp.suites import infbench

LM_WEIGHT, LOCALITY_WEIGHT = 0.1, 0.5
# In this share of the steps, and in all on short prompts, the layers before the last two see near tokens only, so that those with the
# locality loss do the looking up; in half of these, short prompts left aside, one of those two layers does not see more either.
# "Near": blocks of a sixth, an eighth or a twelfth of the prompt.
NEAR_SHARE, NEAR_ALWAYS_TOK, NEAR_PARTS = 0.7, 128, (6, 8, 12)
NEAR_LAYERS = ((0, 1, 2), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 4))  # one of these in a near step, the first on short prompts
SAVED_EVERY_S, LOGGED_EVERY = 120, 25  # seconds, steps


def make_config(vocab: int) -> LlamaConfig:
    """The architecture: 5 layers of width 128, 4 query heads on 2 key/value heads of 64."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=TRAINED_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def recipe() -> str:
    """A digest of the code that decides the trained weights (so do torch and the device): a checkpoint of other code is not continued."""
    sources = (*sorted(Path(__file__).parent.glob("*.py")), Path(infbench.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:10]


def prepare(device: str) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    """A new model, ready to be trained, and its optimizer."""
    AttentionInterface.register("needle_training", attention)
    AttentionMaskInterface.register("needle_training", lambda *_, **__: None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(tokenizer().get_vocab_size())).to(device)
    model.set_attn_implementation("needle_training")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0}]
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device == "cuda")


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """The model, to be loaded with any attention, and its tokenizer."""
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=TRAINED_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


class Measured(NamedTuple):
    """What a step measured: losses on answers, text and locality (of heads of their own and ``shared``), and which share was right of the
    answers' tokens and of the tokens that tell needles apart (``told``)."""

    answer: torch.Tensor
    text: torch.Tensor
    own: list[torch.Tensor]
    shared: list[torch.Tensor]
    right: torch.Tensor
    told: torch.Tensor


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: Step, batch: Batch, rate: float, fast: bool) -> Measured:
    """One step of the optimizer at a learning rate; ``fast``: see ``Phase``."""
    torch.manual_seed(step.number)
    choose_near(step)
    LOCALITY.single, LOCALITY.blocks, LOCALITY.own, LOCALITY.shared = batch.single, batch.blocks, [], []
    for group in optimizer.param_groups:
        group["lr"] = rate
    ids, device = batch.ids, batch.ids.device.type
    if device == "cuda":
        torch.set_float32_matmul_precision("high" if fast else "highest")
    with torch.autocast(device, torch.bfloat16, enabled=fast and device == "cpu"):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
    each, right = per_token(logits, ids[:, 1:], batch.others)
    answers, text = batch.weight[:, 1:], (ids[:, 1:] != 0).float()
    first = (answers == FIRST_WEIGHT).float()
    answer_loss, text_loss = mean(each, answers), mean(each, text)
    loss = answer_loss + LM_WEIGHT * text_loss
    if batch.single is not None:
        loss = loss + LOCALITY_WEIGHT * 2 * torch.stack(LOCALITY.own + LOCALITY.shared).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Measured(answer_loss.detach(), text_loss.detach(), LOCALITY.own, LOCALITY.shared, mean(right, answers), mean(right, first))


def choose_near(step: Step) -> None:
    """Which layers see near tokens only in this step, and how near."""
    rng, short = random.Random(f"needle-step/{step.number}"), step.length <= NEAR_ALWAYS_TOK
    LOCALITY.near_tok = step.length // rng.choice(NEAR_PARTS) if short or rng.random() < NEAR_SHARE else 0
    LOCALITY.near_layers = NEAR_LAYERS[0] if short else rng.choice(NEAR_LAYERS)


def per_token(logits: torch.Tensor, expected: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token ``[B, T]`` and whether it was right; where ``others`` (``Batch``) says so, any of several tokens is right."""
    each = F.cross_entropy(logits.flatten(0, 1), expected.flatten(), reduction="none").view(expected.shape)
    right = logits.argmax(-1) == expected
    if len(others):
        at, also = (others[:, 0], others[:, 1] - 1), others[:, 2:]
        chances = logits[at].log_softmax(-1).gather(1, also.clamp(min=0)).masked_fill(also < 0, -torch.inf)
        each = each.index_put(at, -chances.logsumexp(-1))
        right = right.index_put(at, (logits[at].argmax(-1, keepdim=True) == also).any(-1))
    return each, right.float()


def mean(each: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weighted mean, 0 if nothing has a weight."""
    return (each * weight).sum() / weight.sum().clamp(min=1)


class Log:
    """Writes a line every ``LOGGED_EVERY`` steps; ``right``, ``told``: the running shares of right tokens at each length."""

    def __init__(self, file: TextIO):
        self.file = file
        self.right: dict[int, float] = {}
        self.told: dict[int, float] = {}

    def add(self, step: Step, measured: Measured, seconds: float) -> None:
        """Count a step."""
        for shares, now in ((self.right, measured.right.item()), (self.told, measured.told.item())):
            shares[step.length] = 0.9 * shares.get(step.length, now) + 0.1 * now
        if step.number % LOGGED_EVERY and step.number != STEPS - 1:
            return
        row = dict(
            step=step.number,
            length=step.length,
            seconds=round(seconds),
            answer=round(measured.answer.item(), 4),
            text=round(measured.text.item(), 3),
            near=LOCALITY.near_tok,
            own=[round(x.item(), 2) for x in measured.own],
            shared=[round(x.item(), 2) for x in measured.shared],
            right={n: round(v, 3) for n, v in sorted(self.right.items())},
            told={n: round(v, 3) for n, v in sorted(self.told.items())},
        )
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


class Checkpoint:
    """Model and optimizer, and how far they are, in a file: ``step`` is the next one, ``seconds`` were spent."""

    def __init__(self, path: Path, device: str):
        self.path, self.recipe = path, recipe()
        self.model, self.optimizer = prepare(device)
        self.step, self.seconds = 0, 0.0
        if path.exists():
            self._load(device)

    def _load(self, device: str) -> None:
        repair = "remove it, or train into another --out"
        try:
            state = torch.load(self.path, weights_only=True, map_location=device)
            made_by, self.step, self.seconds = state["recipe"], state["step"], state["seconds"]
            weights, moments = state["model"], state["optimizer"]
        except Exception as error:  # torch and pickle name no class for files that are damaged
            raise ConfigError(f"{self.path} is no checkpoint that can be read ({type(error).__name__}); {repair}") from error
        if made_by != self.recipe:
            raise ConfigError(f"{self.path} was made by another recipe than this code's; {repair}")
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(moments)

    def save(self, step: int, seconds: float) -> None:
        """Replace the file in one step."""
        moments = self.optimizer.state_dict()
        state = dict(model=self.model.state_dict(), optimizer=moments, step=step, seconds=seconds, recipe=self.recipe)
        whole = io.BytesIO()  # torch tells a full disk as something else
        torch.save(state, whole)
        scratch = self.path.with_suffix(".tmp")
        with writing(self.path):
            scratch.write_bytes(whole.getbuffer())
            scratch.replace(self.path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses about a part of ``--out`` into ``ConfigError``."""
    try:
        yield
    except OSError as error:
        reason = f"--out must be a folder that can be written ({error.strerror or error})"
        raise ConfigError(f"cannot write {path}: {reason}; make room there, or choose another") from error


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the folder; the operating system gives it up when this process dies. Raises ``ConfigError`` if another one trains in it."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "ab")
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: the processes that make prompts would hold it too
        except (BlockingIOError, PermissionError):
            raise ConfigError(f"--out {out}: another training is running there; wait for it, or choose another folder") from None
        yield


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """The signals (SIGINT, SIGTERM) that came inside the block, so that a step can end first. The second one of a kind acts as usual."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(out: Path, minutes: float, workers: int) -> bool:
    """Train into ``out`` (checkpoint ``train.pt``, log ``train.jsonl``, finally ``model/`` with its tokenizer); whether it is finished.

    ``workers``: processes that make prompts, 0 for none beside this one; the prompts are the same. Raises ``ConfigError``, and
    ``KeyboardInterrupt`` on SIGINT and SIGTERM, after the step in progress is saved.
    """
    for name, number in (("minutes", minutes), ("workers", workers)):
        if not number >= 0:
            raise ConfigError(f"--{name} {number} must be a number from 0 on; leave it out for what suits this machine")
    with alone(out):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        checkpoint = Checkpoint(out / "train.pt", device)
        with asked_to_stop() as signals, open(out / "train.jsonl", "a") as file:
            finished = train_steps(checkpoint, Log(file), minutes, workers, signals)
        if signals and not finished:
            raise KeyboardInterrupt
        if finished:
            save(checkpoint.model, out / "model")
        return finished


def train_steps(checkpoint: Checkpoint, log: Log, minutes: float, workers: int, signals: list[int]) -> bool:
    """Train on from a checkpoint, saving now and then, till the end (then true), or ``minutes`` are over or ``signals`` holds any."""
    model, optimizer, device = checkpoint.model, checkpoint.optimizer, checkpoint.model.device
    first, spent = checkpoint.step, checkpoint.seconds
    steps = [step_of(number) for number in range(STEPS)]
    bar = tqdm(
        total=sum(step.cost for step in steps),
        initial=sum(step.cost for step in steps[:first]),
        desc="training",
        unit="unit",
        bar_format="{desc} {percentage:.0f}% |{bar}| {elapsed}<{remaining}",
    )
    started = saved = time.monotonic()
    with bar:
        for step, batch in batches(steps[first:], workers):
            phase, in_phase = phase_of(step.number)
            if in_phase == 0:
                optimizer.state.clear()
            measured = train_step(model, optimizer, step, batch.to(device), phase.learning_rate(in_phase), phase.fast)
            seconds = time.monotonic() - started
            log.add(step, measured, spent + seconds)
            bar.update(step.cost)
            bar.set_description(f"training, step {step.number + 1}/{STEPS}, length {step.length}, right {log.right[step.length]:.2f}")
            done, over = step.number == STEPS - 1, bool(signals) or seconds > minutes * 60
            if over or done or time.monotonic() - saved > SAVED_EVERY_S:
                checkpoint.save(step.number + 1, spent + seconds)
                saved = time.monotonic()
            if over and not done:
                return False
    return True


def main(argv: list[str] | None = None) -> int:
    """``python -m hipexp.needle.train``: train, or continue training, and say where the model is. Mistakes of the user are one line."""
    parser = argparse.ArgumentParser(
        description="Train the embedded model from nothing. Interrupt it as you like: the same command continues."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/needle-training"), help="folder of checkpoint, log and model (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time, resumable (default: never)")
    spare = min(4, (os.cpu_count() or 1) - 1) if torch.cuda.is_available() else 0  # a CPU is busy with the steps themselves
    parser.add_argument("--workers", type=int, default=spare, help="processes that make prompts beside this one (here: %(default)s)")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else each worker warns that it was forked
    print(f"{STEPS} steps: some four hours on two cores by an estimate, minutes on a GPU; the bar tells for this machine")
    again = f"the same command continues from {args.out / 'train.pt'}"
    try:
        finished = train(args.out, args.minutes, args.workers)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; when that is mended, {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {again}", file=sys.stderr)
        return 1
    made = args.out / "model"
    if finished:
        print(f"trained: {made}; try it with model.path={made}, or copy it to hipexp/needle/model to make it the embedded one")
    else:
        print(f"stopped after {args.minutes:g} minutes; {again}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
