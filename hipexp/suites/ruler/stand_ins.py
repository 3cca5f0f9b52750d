"""Stand-ins for the files that RULER's samples are made of: prose, questions and words that are drawn from a seed.

Nobody's text: all of it comes from the lists in this module. Schemas and file names are the official ones, so that all 13 tasks run
without a network, but a score on them is no official one. Every file holds the mark ``STAND_IN``, by which cards and tables know it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites.data.resolve import data_root, write_whole
from hipexp.suites.ruler.resources import PUNKT, SOURCES, STAND_IN, is_stand_in

SEED = 42
PARAGRAPHS = 5  # of an article
PAGES = 10  # that come with a question of HotpotQA
UPPER_FIRST_LOWER_WITHIN = 34  # of ortho_context: seen in capitals where sentences begin, and in small letters inside of them

# Words and phrases by the name of their slot; a name in capitals begins a sentence.
SLOTS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split("|"))
    for name, words in {
        "role": "gardener|captain|teacher|weaver|doctor|miller|singer|sailor|painter|clerk|baker|farmer|carpenter|printer|shepherd|tailor",
        "thing": (
            "bridge|lantern|orchard|ladder|engine|harbor|mirror|village|basket|library|tunnel|meadow|kettle|staircase|compass|fence|piano|"
            "chimney|wagon|notebook|window|barrel|carpet|clock|well|gate|boat|cellar|garden|oven"
        ),
        "quality": (
            "quiet|narrow|heavy|early|distant|gentle|broken|wooden|hollow|steady|patient|modest|careful|plain|crooked|polished|rusty|"
            "borrowed|forgotten|ordinary|stubborn|generous|damp|slender|crowded|familiar"
        ),
        "idea": (
            "patience|habit|order|memory|trade|courage|attention|luck|practice|doubt|thrift|silence|curiosity|weather|taste|time|comfort|"
            "skill|trust|hunger"
        ),
        "did": (
            "repaired|painted|carried|measured|followed|remembered|covered|visited|counted|described|sold|cleaned|moved|borrowed|watched|"
            "admired|drew|lost|found|guarded"
        ),
        "do": "repair|paint|carry|measure|build|clean|move|sell|describe|guard|finish|replace|trust|find|keep",
        "place": (
            "near the shore|behind the mill|under the old bridge|at the edge of the market|along the northern road|above the valley|"
            "between two hills|beside the lake|in the back room|on St. Mary Street|across the square|below the tower|inside the tall house|"
            "by the open door|at the end of the lane|in {town}"
        ),
        "when": (
            "after the rain|before the long winter|in the first week of spring|on a cold morning|when the market was over|"
            "some {number} years ago|"
            "at about {clock} p.m.|toward the evening|while the others slept|on the day of the fair|once the snow had gone|in the meantime"
        ),
        "often": "every morning|twice a week|once a year|now and then|in the dark|with care|without a plan|for no money|all summer|by hand",
        "unit": "steps|miles|pounds|baskets|pages|hours|buckets|coins|loaves|ropes|candles|sacks",
        "given": (
            "Ada|Bruno|Clara|Dmitri|Elif|Farid|Greta|Hiro|Ines|Jonas|Kofi|Lena|Marek|Nadia|Oskar|Paula|Quentin|Rosa|Samir|Tilda|Umberto|"
            "Vera|Wendel|Xenia|Yusuf|Zora|Anselm|Birgit|Cosmo|Dalia"
        ),
        "family": (
            "Holm|Arden|Bellweather|Castor|Dunmore|Ekholt|Farrow|Gantry|Hollis|Ivers|Jessup|Kettering|Lorne|Maddox|Norling|Okell|Penrow|"
            "Quarles|Rudd|Sorrel|Tarn|Usher|Varley|Whitlow|Yarrow|Zeller|Ashby|Brandt|Corrin|Delmar|Esker|Fenwick|Garrow|Haskett|Ingram|"
            "Jarrow|Kestrel|Lund|Merrin|Nyland"
        ),
        "name": "{given} {family}|{given} {initial}. {family}|Dr. {family}|{given}|{given}",
        "remark": (
            "which surprised nobody|though few people noticed|as it had always been|and that was enough|but only for a while|"
            "which cost {number} {unit}|e.g. {place}|or so the {role} said|about {decimal} times as fast|as far as anyone can tell"
        ),
        "opinion": (
            "{idea} is a matter of {idea}|a {quality} {thing} is worth more than a {quality} one|nobody should {do} what a {role} can {do}|"
            "the best {thing} is the one that you {do} yourself|{idea} without {idea} leads nowhere|every {thing} was {quality} once|"
            "there is more {idea} in a {thing} than in a whole {thing}|people who {do} {often} have little need of {idea}"
        ),
        "question": (
            "Who {did} the {thing}|Why is the {thing} so {quality}|Where did you put the {thing}|How many {unit} are left|"
            "What has {idea} to do with it|When will the {role} {do} it|Is it true that {opinion}"
        ),
    }.items()
}
SENTENCES = (
    "The {role} {did} the {thing} {place}.",
    "The {role} {did} the {quality} {thing}, {remark}.",
    "{Name} {did} the {thing} {when}, {remark}.",
    "{When}, the {quality} {thing} {place} was {did} by {name}.",
    "Nobody in {town} knew why the {thing} stood {place}, but the {role} did.",
    "It takes {number} {unit} to {do} a {thing} and {number} more to {do} it {often}.",
    '"{Question}?" asked the {role}, and {name} had no answer.',
    '{Name} laughed: "{Opinion}!"',
    "Most people think that {opinion}; {name} thinks otherwise.",
    "If you {do} the {thing} {often}, the {thing} will be {quality} for {number} years.",
    "Dr. {family} measured it {when} and found {decimal} {unit}, no more.",
    "There were {quality} mirrors, {quality} lamps, {quality} chairs, etc. and nobody counted them.",
    "What I learned from the {role} is that {opinion}.",
    "({Name} never saw the {thing}, {remark}.)",
    "{When} they {did} it again, and this time it held.",
    "A {quality} {thing} and a {quality} {thing} do not make a {quality} {thing}.",
    "In {town} people say that {opinion}, {remark}.",
    "How do you {do} a {thing} that no {role} has ever {did}?",
    "I used to believe that {opinion}.",
    "The first {thing} cost {number} {unit}; the second, {decimal} times as {quality}, cost nothing at all.",
    "One reason is {idea}, another is {idea}, and the third is seldom mentioned...",
    "Perhaps {opinion}.",
    "No {role} would {do} it {often}, and yet {name} {did} it {when}.",
    "To {do} a {thing} is easy; to {do} it {place} is not.",
)
# Of towns that nobody has been to.
STARTS = "Hal|Bren|Cor|Dal|Esk|Fal|Gren|Hov|Ist|Jar|Kel|Lor|Mar|Nor|Ost|Pel|Quil|Ros|Sten|Tor|Ulm|Ves|Wen|Yar".split("|")
MIDDLES = "a|e|i|o|am|el|en|er|in|or|un|ar".split("|")
ENDS = "by|dale|den|ford|ham|hurst|mere|mouth|ny|stead|ton|wick".split("|")
CONSONANTS, VOWELS = "bdfghklmnprstvw", "aeiou"
# What a sentence splitter learns from such prose; words of ``ortho_context`` and ``sent_starters`` begin sentences and stand in them.
ABBREVIATIONS = ("dr", "e.g", "etc", "p.m", "st")
STARTERS = ("a", "how", "i", "if", "in", "it", "most", "no", "nobody", "one", "perhaps", "the", "there", "to", "what", "when")


@dataclass(frozen=True)
class Size:
    """How much is made: characters of prose, documents and answerable questions of each QA task, words of the second list."""

    prose_chars: int = 1_000_000
    documents: int = 800
    questions: int = 400
    words: int = 60_000


@dataclass(frozen=True)
class Fact:
    """A sentence that says something once, a question for it, and the answer as it stands in the sentence."""

    said: str
    asked: str
    answer: str


class Draws(dict[str, str]):
    """Draws what ``str.format_map`` asks for: a phrase of a slot, which may have slots of its own, a number or a town."""

    def __init__(self, rng: random.Random):
        super().__init__()
        self._rng = rng
        self._others: dict[str, Callable[[], str]] = {
            "number": lambda: str(rng.randint(2, 90)),
            "decimal": lambda: f"{rng.randint(1, 19)}.{rng.randint(1, 9)}",
            "clock": lambda: f"{rng.randint(1, 11)}.{rng.choice('0123')}0",
            "initial": lambda: rng.choice("ABCDEFGHJKLMNOPRSTVW"),
            "town": lambda: town(rng),
        }

    def __missing__(self, slot: str) -> str:
        if slot[0].isupper():
            phrase = self[slot.lower()]
            return phrase[0].upper() + phrase[1:]
        return self._others[slot]() if slot in self._others else self._rng.choice(SLOTS[slot]).format_map(self)


def write_stand_ins(folder: Path, seed: int = SEED, size: Size = Size()) -> list[Path]:
    """Write all files into ``folder``, which is made, and return their paths; the same seed and size write the same bytes.

    Raises ``ConfigError`` for a folder where published data lie, for one whose part ``ruler`` would be read in its place, for a file there
    that is no stand-in, and for what cannot be read or written.
    """
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(data_root())):
        raise ConfigError(f"{folder} is where published data lie, which stand-ins must not replace; choose another folder")
    made = {folder / name: content for name, content in contents(seed, size)}
    try:
        if (folder / "ruler").is_dir():
            raise ConfigError(f"{folder} holds a folder ruler, which would be read in its place; choose that one or another folder")
        for path in made:
            if path.exists() and not is_stand_in(path):
                raise ConfigError(f"{path} is there and no stand-in; choose a folder without it")
        for path, content in made.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content.encode())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read or written ({error.strerror or error}); choose another folder") from error
    return list(made)


def contents(seed: int, size: Size) -> Iterator[tuple[str, str]]:
    """Names and contents of all files."""
    makers: dict[str, Callable[[random.Random, Size], Any]] = {
        "essays": lambda rng, size: {"text": essays(rng, size.prose_chars)},
        "squad": squad,
        "hotpotqa": hotpotqa,
        "more_words": english_words,
    }
    for name, maker in makers.items():
        yield SOURCES[name].file, json.dumps(maker(random.Random(f"hipexp-stand-in/{seed}/{name}"), size))
    for name, lines in punkt_tables().items():
        yield f"{PUNKT}/{name}", "\n".join(lines) + "\n"


def sentence(rng: random.Random) -> str:
    """A sentence; some have abbreviations, numbers, quotes and other ends that a sentence splitter may stumble over."""
    drawn = rng.choice(SENTENCES).format_map(Draws(rng))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", drawn).replace("p.m..", "p.m.")


def town(rng: random.Random) -> str:
    """The name of a town."""
    return "".join(map(rng.choice, (STARTS, MIDDLES, ENDS)))


def essays(rng: random.Random, least_chars: int) -> str:
    """Prose in paragraphs, of ``least_chars`` characters or some more; the first says what it is."""
    paragraphs = [f"What follows is no essay but a {STAND_IN}."]
    chars = len(paragraphs[0])
    while chars < least_chars:
        paragraphs.append(" ".join(sentence(rng) for _ in range(rng.randint(3, 8))))
        chars += len(paragraphs[-1]) + 2
    return "\n\n".join(paragraphs)


def facts(rng: random.Random) -> Iterator[Fact]:
    """Facts, each of a person of another name; as many as there are names."""
    for given, family in shuffled(rng, itertools.product(SLOTS["given"], SLOTS["family"])):
        name, other, year = f"{given} {family}", f"{rng.choice(SLOTS['given'])} {rng.choice(SLOTS['family'])}", rng.randint(1500, 1899)
        where, thing, role = town(rng), rng.choice(SLOTS["thing"]), rng.choice(SLOTS["role"])
        amount = f"{rng.randint(1000, 9999)} {rng.choice(SLOTS['unit'])}"
        yield rng.choice(
            [
                Fact(f"In the year {year} {name} bought the {thing} for {amount}.", f"For what did {name} buy the {thing}?", amount),
                Fact(f"{name}, a {role}, came to {where} in {year}.", f"To which town did {name} come?", where),
                Fact(f"The {role} {other} taught {name} in {where}.", f"Who taught {name}?", other),
                Fact(f"In {where} the {thing} of {name} burned down in {year}.", f"When did the {thing} of {name} burn down?", str(year)),
            ]
        )


def squad(rng: random.Random, size: Size) -> dict[str, Any]:
    """Articles of paragraphs, which are the documents; answerable questions for some of them, and for every third one without answer."""
    told, paragraphs = facts(rng), []
    for number in range(size.documents):
        fact, before, after = next(told), " ".join(sentence(rng) for _ in range(3)), sentence(rng)
        start = len(before) + 1 + fact.said.index(fact.answer)
        qas: list[dict[str, Any]] = []
        if number * size.questions % size.documents < size.questions:
            answers = [{"text": fact.answer, "answer_start": start}]
            qas.append({"question": fact.asked, "id": f"{number}", "answers": answers, "is_impossible": False})
        if number % 3 == 0:
            asked = f"Why did the {rng.choice(SLOTS['role'])} of {town(rng)} say nothing?"
            qas.append({"question": asked, "id": f"{number}-", "answers": [], "plausible_answers": [], "is_impossible": True})
        paragraphs.append({"context": f"{before} {fact.said} {after}", "qas": qas})
    articles = [paragraphs[at : at + PARAGRAPHS] for at in range(0, len(paragraphs), PARAGRAPHS)]
    data = [{"title": f"Article {number}", "paragraphs": each} for number, each in enumerate(articles, 1)]
    return {"version": f"v2.0, {STAND_IN}", "data": data}


def hotpotqa(rng: random.Random, size: Size) -> list[dict[str, Any]]:
    """Questions that take two of their ten titled pages: whose a thing is, and where that person lives, or what their trade is."""
    pairs, asked = [], []
    people = shuffled(rng, (f"{given} {family}" for given, family in itertools.product(SLOTS["given"], SLOTS["family"])))
    towns = shuffled(rng, map("".join, itertools.product(STARTS, MIDDLES, ENDS)))
    for person, where, home in zip(people[: size.documents // 2], towns[::2], towns[1::2], strict=False):
        thing, role = rng.choice(SLOTS["thing"]), rng.choice(SLOTS["role"])
        title, owner = f"The {thing} of {where}", f"the owner of the {thing} of {where}"
        pages = [
            [title, [sentence(rng), f" {title} belongs to {person}.", f" {sentence(rng)}"]],
            [person, [f"{person} lives in {home}.", f" The trade of {person} is that of a {role}.", f" {sentence(rng)}"]],
        ]
        pairs.append(pages)
        asked.append((pages, f"In which town does {owner} live?", home, 0))
        asked.append((pages, f"What is the trade of {owner}?", role, 1))
    everything = [page for pages in pairs for page in pages]
    rows = []
    for number, (pages, question, answer, line) in enumerate((asked[::2] + asked[1::2])[: size.questions]):
        others = rng.sample([page for page in everything if page not in pages], PAGES - 2)
        supporting = [[pages[0][0], 1], [pages[1][0], line]]
        row = {"_id": f"{STAND_IN}, {number}", "question": question, "answer": answer, "type": "bridge", "level": "hard"}
        rows.append(row | {"supporting_facts": supporting, "context": shuffled(rng, [*pages, *others])})
    return rows


def english_words(rng: random.Random, size: Size) -> dict[str, str]:
    """Made-up words that one can say, by number; the mark is a key, since the words are all that is read."""
    made: dict[str, None] = {}
    while len(made) < size.words:
        syllables = (rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 4)))
        made["".join(syllables) + rng.choice(["", *"dklmnrst"])] = None
    return {STAND_IN if number == 0 else str(number): word for number, word in enumerate(made)}


def punkt_tables() -> dict[str, list[str]]:
    """The four files of nltk's ``punkt_tab/english``, as lines, for the prose above; the mark is a word that no text has."""
    return {
        "abbrev_types.txt": [STAND_IN, *ABBREVIATIONS],
        "collocations.tab": [f"{STAND_IN}\tmary", "st\tmary"],
        "ortho_context.tab": [f"{STAND_IN}\t0", *(f"{word}\t{UPPER_FIRST_LOWER_WITHIN}" for word in STARTERS)],
        "sent_starters.txt": [STAND_IN, *STARTERS],
    }


def shuffled(rng: random.Random, items: Iterable[Any]) -> list[Any]:
    """The items in another order."""
    taken = list(items)
    rng.shuffle(taken)
    return taken
