"""Train ``needle`` from nothing: ``python -m hipexp.needle.train`` (``make needle``), on a GPU if there is one. Resumable.

A plain Llama (GQA, RoPE base 1,000,000) learns to answer retrieval prompts of growing length. Beside the loss on the answers and
a tenth of the language-model loss there is a *locality* loss: at the tokens that ask for a needle, attention logits should single out
the needle's neighbourhood, not one token of it, in one head of every key/value head and in all heads and a block of queries together.
Large language models have the first property (keys vary slowly along the text), and every method that judges a chunk by a few of its
keys relies on it; methods that keep one list for a block of queries and all heads rely on the second. Large models also look a thing up
in many heads and layers: here each of the two layers that do so has to do without the other in some steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hipexp.needle import corpus
from hipexp.needle import tokenizer as tokenizer_module
from hipexp.needle.corpus import PromptMaker
from hipexp.needle.tokenizer import train_tokenizer
from hipexp.suites import infbench

TRAINED_LENGTH = 6144
LAYERS, HEAD_DIM, ROPE_THETA = 5, 64, 1e6
TOKENS_PER_STEP = 6144
LENGTH_THAT_DOUBLES = 1500  # a step on sequences of this length takes twice as long as one on very short ones
# (steps, sequence length)
LENGTHS = ((280, 96), (140, 128), (160, 192), (240, 384), (300, 768), (280, 1536), (400, 3072), (1500, TRAINED_LENGTH))
STEPS = sum(steps for steps, _ in LENGTHS)
PEAK, WARM_UP_STEPS = 4e-3, 100  # learning rate
DECAY = 0.25  # share of the steps, at the end, over which the learning rate falls to nothing
FIRST_WEIGHT = 3.0  # of the first token of an answer: it tells the needles apart
SHORTER = 0.3  # share of steps drawn from an earlier length
LM_WEIGHT, LOCALITY_WEIGHT = 0.1, 0.5
LOCALITY_FROM_TOK = 192  # in shorter prompts there is no room between sinks and window
LOCALITY_FROM_LAYER = LAYERS - 2  # the last two do the looking up
ASKING_ROWS, ASKING_BLOCKS, BLOCK_TOK, BLOCK_ROWS = 24, 4, 64, 16  # per prompt; a block is a 24th of a short prompt
# In this share of the steps, and in all on short prompts, the layers before LOCALITY_FROM_LAYER see near tokens only, so that those
# with the locality loss do the looking up; in half of these, short prompts left aside, one of those two layers does not see more either.
# "Near": blocks of a sixth, an eighth or a twelfth of the prompt.
NEAR_SHARE, NEAR_ALWAYS_TOK, NEAR_PARTS, NEAR_SINK_TOK = 0.7, 128, (6, 8, 12), 4
NEAR_LAYERS = ((0, 1, 2), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 4))  # one of these in a near step, the first on short prompts
OWN_HEADS = (1, 3)  # query heads with a locality loss of their own: one of each key/value head
BF16_FROM_TOK = 1536  # attention over longer sequences multiplies in bfloat16: twice as fast on processors that know it


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


@dataclass
class Asking:
    """Queries that ask for needles: ``rows`` [B, N, S] positions (S of them share a target), ``target`` [B, N, T] sums to 1 or 0 and
    says where the needles lie, ``allowed`` [B, N, T] the tokens among which they must stand out."""

    rows: torch.Tensor
    target: torch.Tensor
    allowed: torch.Tensor

    def to(self, device: str) -> Asking:
        """The same on another device."""
        return Asking(self.rows.to(device), self.target.to(device), self.allowed.to(device))


class Locality:
    """Collects the locality loss of one forward pass.

    ``near_tok``: block size in tokens of the attention of ``near_layers`` in this step, 0 for all tokens.
    """

    def __init__(self):
        self.single: Asking | None = None
        self.blocks: Asking | None = None
        self.near_tok = 0
        self.near_layers: tuple[int, ...] = ()
        self.own: list[torch.Tensor] = []
        self.shared: list[torch.Tensor] = []

    def add(self, q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, scale: float) -> None:
        """Compares without regard to distance: each query looks at all keys as if they lay at one random distance, as pruning does.

        Each token of the needle's neighbourhood competes with the tokens elsewhere, so that attention may still single one out.
        """
        T, device = k_BHTD.shape[2], k_BHTD.device
        k_BHTD = turn(k_BHTD, -torch.arange(T, device=device))
        own = [(slice(head, head + 1), self.single, self.own) for head in OWN_HEADS]
        for heads, asking, losses in (*own, (slice(None), self.blocks, self.shared)):
            q, rows = q_BHTD[:, heads], asking.rows.flatten(1)
            q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
            distance = torch.randint(T // 8, T * 2 // 3, asking.rows.shape[:2]).to(device)
            distance = distance[..., None].expand_as(asking.rows).flatten(1)
            logits = (turn(q, (distance - rows)[:, None]) @ k_BHTD[:, heads].transpose(-1, -2)) * scale
            pooled = logits.unflatten(2, asking.rows.shape[1:]).logsumexp((1, 3))
            pooled = pooled.masked_fill(~asking.allowed, -1e9)
            elsewhere = pooled.masked_fill(asking.target > 0, -1e9).logsumexp(-1, keepdim=True)
            chosen = F.logsigmoid(pooled - elsewhere)
            losses.append(-(asking.target * chosen).sum() / asking.target.sum().clamp(min=1))


def turn(x_D: torch.Tensor, by_tok: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: turn vectors ``[..., D]`` on by ``by_tok`` ``[...]`` positions."""
    angle = by_tok[..., None] * ROPE_THETA ** (-torch.arange(HEAD_DIM // 2, device=by_tok.device) / (HEAD_DIM // 2))
    (a, b), cos, sin = x_D.chunk(2, -1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


LOCALITY = Locality()


def _attention(module, query, key, value, attention_mask, *, scaling, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if LOCALITY.single is not None and module.layer_idx >= LOCALITY_FROM_LAYER:
        LOCALITY.add(query, key, scaling)
    if key.shape[2] >= BF16_FROM_TOK:
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    if LOCALITY.near_tok and module.layer_idx in LOCALITY.near_layers:
        out = _attend_near(query, key, value, LOCALITY.near_tok, scaling)
    else:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).float(), None


def _attend_near(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, near_tok: int, scale: float) -> torch.Tensor:
    """Attention ``[B, H, T, D]`` in blocks of ``near_tok``: each sees itself causally, the block before it, and the first few tokens."""
    B, H, T, D = q.shape
    blocks = -(-T // near_tok)
    q, k, v = (F.pad(x, (0, 0, 0, blocks * near_tok - T)) for x in (q, k, v))

    def seen(x: torch.Tensor) -> torch.Tensor:
        own = x.unflatten(2, (blocks, near_tok))
        sink = x[:, :, None, :NEAR_SINK_TOK].expand(B, H, blocks, NEAR_SINK_TOK, D)
        return torch.cat([sink, own.roll(1, 2), own], 3).transpose(1, 2).flatten(0, 1)

    block = torch.arange(blocks, device=q.device)[:, None, None]
    key, query = torch.arange(NEAR_SINK_TOK + 2 * near_tok, device=q.device), torch.arange(near_tok, device=q.device)[:, None]
    before, own = key >= NEAR_SINK_TOK, key - NEAR_SINK_TOK - near_tok
    mask = torch.where(own >= 0, own <= query, torch.where(before, block >= 1, block >= 2))
    mask = mask.repeat(B, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(
        q.unflatten(2, (blocks, near_tok)).transpose(1, 2).flatten(0, 1), seen(k), seen(v), mask, scale=scale
    )
    return out.unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T]


def collate(prompts):
    """Right-padded ids and loss weights ``[B, T]``, and the asking queries, one by one and in blocks (None if no needle is far enough)."""
    B, T = len(prompts), max(len(p[0]) for p in prompts)
    ids, weight = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T)
    size, sink, window = min(BLOCK_TOK, T // 24), min(256, T // 8), min(1024, T // 4)
    single, blocks = (
        Asking(torch.zeros(B, n, s, dtype=torch.long), torch.zeros(B, n, T), torch.zeros(B, n, T, dtype=torch.bool))
        for n, s in ((ASKING_ROWS, 1), (ASKING_BLOCKS, min(size, BLOCK_ROWS)))
    )
    for b, (tokens, weights, links) in enumerate(prompts):
        ids[b, : len(tokens)] = torch.tensor(tokens)
        weight[b, : len(tokens)] = torch.tensor(weights)
        links = [link for link in links if link.needle_from >= sink]
        asking_rows = ((link, row) for link in links for row in range(link.asking_from, link.asking_to))
        rows = [row for link, row in asking_rows if link.needle_to <= row // size * size - window]
        random.shuffle(rows)
        firsts = list(dict.fromkeys(row // size * size for row in rows))
        for asking, starts, span in ((single, rows, 1), (blocks, firsts, size)):
            for n, start in enumerate(starts[: asking.rows.shape[1]]):
                asking.rows[b, n] = torch.linspace(start, min(start + span, len(tokens)) - 1, asking.rows.shape[2]).long()
                asking.allowed[b, n, sink : start - window] = True
                for asking_from, asking_to, lo, hi, after in links:
                    if asking_from < start + span and asking_to > start and hi <= start - window:
                        end = min(hi + after, start - window)
                        told = torch.cat([torch.ones(hi - lo), 1 - torch.arange(1, end - hi + 1) / max(after, 1)])
                        asking.target[b, n, lo:end] = asking.target[b, n, lo:end].maximum(told)
                asking.target[b, n] /= asking.target[b, n].sum()
    return ids, weight, (single, blocks) if T >= LOCALITY_FROM_TOK and single.target.any() else None


def step_length(step: int, rng: random.Random) -> int:
    """Sequence length of a step: the curriculum's, or with probability ``SHORTER`` an earlier one."""
    reached = 0
    while step >= LENGTHS[reached][0]:
        step -= LENGTHS[reached][0]
        reached += 1
    if reached and rng.random() < SHORTER:
        reached = rng.randrange(max(0, reached - 3), reached)
    return LENGTHS[reached][1]


def recipe() -> str:
    """A digest of everything that decides the trained weights: a checkpoint of another recipe is not continued."""
    sources = (Path(__file__), *(Path(module.__file__) for module in (corpus, tokenizer_module, infbench)))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:10]


def train(out: Path, minutes: float) -> bool:
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(tokenizer.get_vocab_size())).to(device)
    model.set_attn_implementation("needle_training")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0}], lr=PEAK, betas=(0.9, 0.95)
    )
    made_by = recipe()
    first, spent, checkpoint = 0, 0.0, out / "train.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False, map_location=device)
        if state.get("recipe") != made_by:
            raise SystemExit(f"error: {checkpoint} was made by another recipe than this code's; remove it, or train into another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    log = open(out / "train.jsonl", "a")
    started = saved = time.monotonic()
    right: dict[int, float] = {}
    cost = [LENGTH_THAT_DOUBLES + step_length(step, random.Random(f"needle-step/{step}")) for step in range(STEPS)]
    bar = tqdm(
        total=sum(cost),
        initial=sum(cost[:first]),
        desc="training",
        unit="unit",
        bar_format="{desc} {percentage:.0f}% |{bar}| {elapsed}<{remaining}",
    )
    for step in range(first, STEPS):
        rng = random.Random(f"needle-step/{step}")
        random.seed(step)
        torch.manual_seed(step)
        length = step_length(step, rng)
        maker = PromptMaker(lambda text: tokenizer.encode(text, add_special_tokens=False), step, FIRST_WEIGHT)
        ids, weight, locality = collate([maker.prompt(length) for _ in range(max(1, TOKENS_PER_STEP // length))])
        ids, weight = ids.to(device), weight.to(device)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (step + 1) / WARM_UP_STEPS, (1 - step / STEPS) / DECAY)
        LOCALITY.single, LOCALITY.blocks = (asking.to(device) for asking in locality) if locality else (None, None)
        LOCALITY.own, LOCALITY.shared = [], []
        near = length <= NEAR_ALWAYS_TOK or rng.random() < NEAR_SHARE
        LOCALITY.near_tok = length // rng.choice(NEAR_PARTS) if near else 0
        LOCALITY.near_layers = NEAR_LAYERS[0] if length <= NEAR_ALWAYS_TOK else rng.choice(NEAR_LAYERS)
        logits = model(ids, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids.shape[0], -1)
        answers, text = weight[:, 1:], (ids[:, 1:] != 0).float()
        answer_loss = (each * answers).sum() / answers.sum().clamp(min=1)
        text_loss = (each * text).sum() / text.sum()
        local_loss = torch.stack(LOCALITY.own + LOCALITY.shared).mean() * 2 if locality else torch.zeros((), device=device)
        loss = answer_loss + LM_WEIGHT * text_loss + LOCALITY_WEIGHT * local_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        correct = float(((logits.argmax(-1) == ids[:, 1:]) * answers).sum() / answers.sum().clamp(min=1))
        right[length] = 0.9 * right.get(length, correct) + 0.1 * correct
        if step % 25 == 0 or step == STEPS - 1:
            row = dict(
                step=step,
                length=length,
                seconds=round(spent + time.monotonic() - started),
                answer=round(answer_loss.item(), 4),
                text=round(text_loss.item(), 3),
            )
            row |= dict(
                near=LOCALITY.near_tok,
                own=[round(x.item(), 2) for x in LOCALITY.own],
                shared=[round(x.item(), 2) for x in LOCALITY.shared],
                right={n: round(v, 3) for n, v in sorted(right.items())},
            )
            log.write(json.dumps(row) + "\n")
            log.flush()
        bar.update(cost[step])
        bar.set_description(f"training, step {step + 1}/{STEPS}, length {length}, right {right[length]:.2f}")
        over = time.monotonic() - started > minutes * 60
        if over or step == STEPS - 1 or time.monotonic() - saved > 120:
            state = dict(
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                seconds=spent + time.monotonic() - started,
                recipe=made_by,
            )
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            saved = time.monotonic()
        if over and step < STEPS - 1:
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
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time, resumable (default: never)")
    args = parser.parse_args()
    print(f"{STEPS} steps: over an hour on two cores, minutes on a GPU; the bar tells for this machine")
    if train(args.out, args.minutes):
        made = args.out / "model"
        print(f"trained: {made}; try it with model.path={made}, or copy it to hipexp/needle/model to make it the embedded one")
    else:
        print(f"stopped after {args.minutes:g} minutes; the same command continues from {args.out / 'train.pt'}")


if __name__ == "__main__":
    main()
