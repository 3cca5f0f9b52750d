"""Train ``needle`` from nothing on a CPU: ``python -m hipexp.needle.train`` (``make needle``). Resumable.

A plain Llama (GQA, RoPE base 1,000,000) learns to answer retrieval prompts of growing length. Beside the loss on the answers and
a tenth of the language-model loss there is a *locality* loss: at the tokens that ask for a needle, the best head's
attention logits should single out the needle's neighbourhood, not one token of it. Large language models have this
property (keys vary slowly along the text), and every method that judges a chunk by a few of its keys relies on it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hipexp.needle.corpus import PromptMaker
from hipexp.needle.tokenizer import train_tokenizer

TRAINED_LENGTH = 6144
TOKENS_PER_STEP = 6144
STEPS = 3000
LENGTH_THAT_DOUBLES = 1500  # a step on sequences of this length takes twice as long as one on very short ones
# (share of the steps, sequence length)
LENGTHS = (
    (0.12, 96),
    (0.047, 128),
    (0.067, 192),
    (0.093, 384),
    (0.113, 768),
    (0.08, 1536),
    (0.133, 3072),
    (0.065, 4608),
    (0.282, TRAINED_LENGTH),
)
DECAY = 0.2  # share of the steps, at the end, over which the learning rate falls to nothing
SHORTER = 0.3  # share of steps drawn from an earlier length
LM_WEIGHT, LOCALITY_WEIGHT = 0.1, 0.3
LOCALITY_FROM_TOK = 384  # in shorter prompts there is no room between sinks and window
LOCALITY_FROM_LAYER = 2
# In this share of the steps, and in all on short prompts, the layers before LOCALITY_FROM_LAYER see near tokens only, so that the layers
# with the locality loss do the looking up. "Near": blocks of a sixth, an eighth or a twelfth of the prompt.
NEAR_SHARE, NEAR_ALWAYS_TOK, NEAR_PARTS, NEAR_SINK_TOK = 0.7, 128, (6, 8, 12), 4


def make_config(vocab: int) -> LlamaConfig:
    """The architecture: 5 layers of width 128, 4 query heads on 2 key/value heads of 32."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=TRAINED_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


class Locality:
    """Collects the locality loss of one forward pass; ``rows`` [B, R] are asking positions, ``target`` [B, R, T] sums to 1 or 0.

    ``near_tok``: block size in tokens of the first layers' attention in this step, 0 for all tokens.
    """

    def __init__(self):
        self.rows = self.target = self.allowed = None
        self.near_tok = 0
        self.losses: list[torch.Tensor] = []
        self.own: list[torch.Tensor] = []

    def add(self, q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, scale: float) -> None:
        B, H, _, D = q_BHTD.shape
        R = self.rows.shape[1]
        rows = self.rows[:, None, :, None].expand(B, H, R, D)
        logits = (q_BHTD.gather(2, rows) @ k_BHTD.transpose(-1, -2)) * scale
        own = self._cross_entropy(logits[:, -1])
        self.losses.append(own + 0.25 * self._cross_entropy(logits.logsumexp(1)))
        self.own.append(own.detach())

    def _cross_entropy(self, logits: torch.Tensor) -> torch.Tensor:
        chosen = F.log_softmax(logits.masked_fill(~self.allowed, -1e9), -1)
        return -(self.target * chosen).sum() / self.target.sum().clamp(min=1)


LOCALITY = Locality()


def _attention(module, query, key, value, attention_mask, *, scaling, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if LOCALITY.rows is not None and module.layer_idx >= LOCALITY_FROM_LAYER:
        LOCALITY.add(query, key, scaling)
    if LOCALITY.near_tok and module.layer_idx < LOCALITY_FROM_LAYER:
        return _attend_near(query, key, value, LOCALITY.near_tok, scaling).transpose(1, 2), None
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


def _attend_near(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, near_tok: int, scale: float) -> torch.Tensor:
    """Attention ``[B, H, T, D]`` in blocks of ``near_tok``: each sees itself causally, the block before it, and the first few tokens."""
    B, H, T, D = q.shape
    blocks = -(-T // near_tok)
    q, k, v = (F.pad(x, (0, 0, 0, blocks * near_tok - T)) for x in (q, k, v))

    def seen(x: torch.Tensor) -> torch.Tensor:
        own = x.unflatten(2, (blocks, near_tok))
        sink = x[:, :, None, :NEAR_SINK_TOK].expand(B, H, blocks, NEAR_SINK_TOK, D)
        return torch.cat([sink, own.roll(1, 2), own], 3).transpose(1, 2).flatten(0, 1)

    block = torch.arange(blocks)[:, None, None]
    key, query = torch.arange(NEAR_SINK_TOK + 2 * near_tok), torch.arange(near_tok)[:, None]
    before, own = key >= NEAR_SINK_TOK, key - NEAR_SINK_TOK - near_tok
    mask = torch.where(own >= 0, own <= query, torch.where(before, block >= 1, block >= 2))
    mask = mask.repeat(B, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(
        q.unflatten(2, (blocks, near_tok)).transpose(1, 2).flatten(0, 1), seen(k), seen(v), mask, scale=scale
    )
    return out.unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T]


def collate(prompts, asking_rows: int = 24):
    """Right-padded ids, targets' weights, and the locality target of some asking rows (or None if no needle is far enough)."""
    B, T = len(prompts), max(len(p[0]) for p in prompts)
    ids, weight = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T)
    rows = torch.zeros(B, asking_rows, dtype=torch.long)
    target = torch.zeros(B, asking_rows, T)
    allowed = torch.zeros(B, asking_rows, T, dtype=torch.bool)
    sink, window = min(256, T // 8), min(1024, T // 4)
    for b, (tokens, weights, links) in enumerate(prompts):
        ids[b, : len(tokens)] = torch.tensor(tokens)
        weight[b, : len(tokens)] = torch.tensor(weights)
        candidates = [(row, lo, hi, after) for a, z, lo, hi, after in links for row in range(a, z) if lo >= sink and hi <= row - window]
        random.shuffle(candidates)
        for r, (row, lo, hi, after) in enumerate(candidates[:asking_rows]):
            rows[b, r] = row
            allowed[b, r, sink : row - window] = True
            target[b, r, lo:hi] = 1.0
            end = min(hi + after, row - window)
            target[b, r, hi:end] = 1 - torch.arange(1, end - hi + 1) / max(after, 1)
            target[b, r] /= target[b, r].sum()
    return ids, weight, (rows, target, allowed) if T >= LOCALITY_FROM_TOK // 2 and target.any() else None


def step_length(step: int, steps: int, rng: random.Random) -> int:
    """Sequence length of a step: the curriculum's, or with probability ``SHORTER`` an earlier one."""
    done, reached = 0.0, 0
    for i, (share, _) in enumerate(LENGTHS):
        if step / steps >= done:
            reached = i
        done += share
    if reached and rng.random() < SHORTER:
        reached = rng.randrange(max(0, reached - 3), reached)
    return LENGTHS[reached][1]


def train(out: Path, steps: int, lr: float, minutes: float) -> bool:
    """Train into ``out`` (checkpoint ``train.pt``, log ``train.jsonl``, finally ``model/`` with its tokenizer); whether it is finished."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=TRAINED_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    AttentionInterface.register("needle_training", _attention)
    AttentionMaskInterface.register("needle_training", lambda *_, **__: None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(tokenizer.get_vocab_size()))
    model.set_attn_implementation("needle_training")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0}], lr=lr, betas=(0.9, 0.95)
    )
    first, spent, checkpoint = 0, 0.0, out / "train.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    log = open(out / "train.jsonl", "a")
    started = saved = time.monotonic()
    right: dict[int, float] = {}
    cost = [1 + step_length(step, steps, random.Random(f"needle-step/{step}")) / LENGTH_THAT_DOUBLES for step in range(steps)]
    bar = tqdm(
        total=round(sum(cost)),
        initial=round(sum(cost[:first])),
        desc="training",
        unit="unit",
        bar_format="{desc} {percentage:.0f}% |{bar}| {elapsed}<{remaining}",
    )
    for step in range(first, steps):
        rng = random.Random(f"needle-step/{step}")
        random.seed(step)
        length = step_length(step, steps, rng)
        maker = PromptMaker(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, seed=step)
        ids, weight, locality = collate([maker.prompt(length) for _ in range(max(1, TOKENS_PER_STEP // length))])
        now = lr * min(1.0, (step + 1) / 100, (1 - step / steps) / DECAY)
        for group in optimizer.param_groups:
            group["lr"] = now
        LOCALITY.rows, LOCALITY.target, LOCALITY.allowed = locality if locality else (None, None, None)
        LOCALITY.losses, LOCALITY.own = [], []
        near = length <= NEAR_ALWAYS_TOK or rng.random() < NEAR_SHARE
        LOCALITY.near_tok = length // rng.choice(NEAR_PARTS) if near else 0
        logits = model(ids, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
        answers, text = weight[:, 1:], (ids[:, 1:] != 0).float()
        answer_loss = (each * answers).sum() / answers.sum().clamp(min=1)
        text_loss = (each * text).sum() / text.sum()
        local_loss = torch.stack(LOCALITY.losses).mean() if LOCALITY.losses else torch.zeros(())
        loss = answer_loss + LM_WEIGHT * text_loss + LOCALITY_WEIGHT * local_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        correct = float(((logits.argmax(-1) == ids[:, 1:]) * answers).sum() / answers.sum().clamp(min=1))
        right[length] = 0.9 * right.get(length, correct) + 0.1 * correct
        if step % 25 == 0 or step == steps - 1:
            row = dict(
                step=step,
                length=length,
                seconds=round(spent + time.monotonic() - started),
                answer=round(answer_loss.item(), 4),
                text=round(text_loss.item(), 3),
            )
            row |= dict(
                near=LOCALITY.near_tok,
                locality=round(local_loss.item(), 3),
                own=[round(x.item(), 2) for x in LOCALITY.own],
                right={n: round(v, 3) for n, v in sorted(right.items())},
            )
            log.write(json.dumps(row) + "\n")
            log.flush()
        bar.update(cost[step])
        bar.set_description(f"training, step {step + 1}/{steps}, length {length}, right {right[length]:.2f}")
        over = time.monotonic() - started > minutes * 60
        if over or step == steps - 1 or time.monotonic() - saved > 120:
            state = dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, seconds=spent + time.monotonic() - started
            )
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            saved = time.monotonic()
        if over and step < steps - 1:
            return False
    model.set_attn_implementation("sdpa")
    model.save_pretrained(out / "model")
    fast.save_pretrained(out / "model")
    return True


def main() -> None:
    """``python -m hipexp.needle.train``: train, or continue training, and say where the model is."""
    parser = argparse.ArgumentParser(
        description="Train the embedded model from nothing. Interrupt it as you like: the same command continues."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/needle-training"), help="folder of checkpoint, log and model (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time, resumable (default: never)")
    args = parser.parse_args()
    print(f"{args.steps} steps; 3000 took 57 minutes on two cores with AVX-512; the bar tells for this machine")
    if train(args.out, args.steps, args.lr, args.minutes):
        made = args.out / "model"
        print(f"trained: {made}; try it with model.path={made}, or copy it to hipexp/needle/model to make it the embedded one")
    else:
        print(f"stopped after {args.minutes:g} minutes; the same command continues from {args.out / 'train.pt'}")


if __name__ == "__main__":
    main()
