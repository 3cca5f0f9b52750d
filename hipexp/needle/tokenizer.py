"""Train the tokenizer of ``needle``: byte-level BPE in which digits and hex characters come in pairs at most."""

from __future__ import annotations

import json
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hipexp.needle import corpus, words
from hipexp.suites.infbench import KV, NUMBER_STRING, PASSKEY, random_uuid

SPECIAL = ["<pad>", "<s>", "</s>"]
HEX = set("0123456789abcdefABCDEF")
# Inside a word made of hex characters only (a UUID's groups), cut into pairs from the left; other digits likewise.
HEX_PAIR = "(?:" + "|".join(rf"(?<=\b[0-9a-f]{{{n}}})" if n else r"\b" for n in range(0, 12, 2)) + r")[0-9a-f]{2}(?=(?:[0-9a-f]{2})*\b)"
WORDS = r"[0-9]{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s"


def training_text(rng: random.Random):
    """Lines in the style of the training prompts, and all hex pairs."""
    for _ in range(3000):
        yield words.sentence(rng)
        yield corpus.digits_wording(rng, ten=rng.random() < 0.5)[1].needle
    for wording in (PASSKEY, NUMBER_STRING, KV):
        yield from [wording.intro, wording.noise, wording.question, wording.prefix] * 50
    for line in (
        *words.STORIES,
        *corpus.INTROS,
        *corpus.NEEDLES,
        *corpus.QUESTIONS,
        *corpus.PREFIXES,
        *corpus.KV_INTROS,
        *corpus.KV_QUESTIONS,
    ):
        yield from [line] * 20
    for _ in range(6000):
        yield KV.needle.format(key=random_uuid(rng), value=random_uuid(rng))


def train_tokenizer(entries: int = 1024, seed: int = 0) -> Tokenizer:
    """Return the tokenizer; merges that would join more than two hex characters are left out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{HEX_PAIR}|{WORDS}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4 * entries, min_frequency=5, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(training_text(random.Random(f"needle-tokenizer/{seed}")), trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    vocab = [*SPECIAL, *alphabet]
    known, merges = set(alphabet), []
    for left, right in map(tuple, learned):
        if len(vocab) == entries:
            break
        joined = left + right
        if left in known and right in known and sum(c in HEX for c in joined) <= 2 and joined not in known:
            known.add(joined)
            vocab.append(joined)
            merges.append((left, right))
    tokenizer.model = models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=merges)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return tokenizer
