"""``task=passkey``: the pass keys of ∞Bench on a grid of depths and lengths."""

from __future__ import annotations

from hipexp.suites import infbench
from hipexp.suites.sample import Encode, Item, ProtocolCard, Sample


def subtask_name(length_tok: int) -> str:
    """The name under which the samples of one length are scored."""
    return f"passkey@{length_tok}"


class PasskeyGrid:
    """``samples`` pass keys at each of ``depths`` (0 to 1) and of ``lengths``; sample ``i`` uses depth ``i // samples``.

    ``lengths`` are by the key that set them, see ``hipexp.suites.lengths_of``.
    """

    def __init__(self, lengths: dict[str, int], depths: list[float], samples: int, encode: Encode, seed: int, wording: str):
        self.lengths_tok, self.depths, self.samples = list(lengths.values()), list(depths), samples
        self.encode, self.seed, self.wording = encode, seed, infbench.check_wording(wording)
        for key, length_tok in lengths.items():
            infbench.check_length("passkey", length_tok, encode, wording, key)

    def items(self) -> list[Item]:
        return [Item(subtask_name(n), index, n) for n in self.lengths_tok for index in range(len(self.depths) * self.samples)]

    def sample(self, item: Item) -> Sample:
        depth = self.depths[item.index // self.samples]
        rng = infbench.seeded("passkey-grid", self.seed, depth, item.index % self.samples, item.length_tok)
        made = infbench.digits_sample("passkey", item.index, depth, item.length_tok, self.encode, rng, self.wording)
        return Sample(**{**vars(made), "subtask": item.subtask})

    def score(self, sample: Sample, prediction: str) -> float:
        return infbench.score("passkey", prediction, sample.references)

    def card(self) -> ProtocolCard:
        names = {subtask_name(n): n for n in self.lengths_tok}
        return ProtocolCard(
            suite="passkey",
            protocol="hipexp",
            edition=f"depths {', '.join(map(str, self.depths))}",
            template=dict.fromkeys(names, infbench.template_id("passkey", self.wording)),
            wording=self.wording,
            metric=dict.fromkeys(names, "first_number"),
            scorer=infbench.SCORER,
            length_tok=names,
            samples=dict.fromkeys(names, self.samples * len(self.depths)),
            new_tok=dict.fromkeys(names, infbench.new_token_limit("passkey", self.encode, self.wording)),
            data=f"generated, seeds {infbench.SEED_NAMESPACE}/passkey-grid/{self.seed}/<depth>/<sample>/<length>",
            note=infbench.NOTE,
        )
