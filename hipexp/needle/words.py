"""Words and sentences of the training text: everything is drawn from the lists below, so training needs no download."""

from __future__ import annotations

import random
import string

from hipexp.suites.infbench import PASSKEY

ADJECTIVES = (
    "quiet old bright narrow green heavy early distant warm cold gentle broken silver wooden hollow steady busy empty "
    "northern southern simple curious patient honest rapid slow careful yellow purple plain"
).split()
NOUNS = (
    "river valley window garden bridge harbor teacher farmer sailor painter kitchen market station forest mountain "
    "letter basket lantern engine village castle ladder mirror blanket bottle hammer island tunnel orchard meadow "
    "library workshop gardener captain doctor singer tower mill road wall roof door table boat wagon train horse "
    "rabbit falcon spider salmon willow maple cedar stone copper paper cotton sugar honey butter pepper"
).split()
VERBS = (
    "crosses follows paints carries watches repairs remembers forgets visits measures hides covers reaches leaves "
    "finds builds sells keeps moves counts cleans opens closes warms brings turns passes holds needs likes"
).split()
PLACES = (
    "near the shore|behind the mill|under the bridge|after the rain|before the winter|in the morning|at the market|"
    "along the road|above the valley|between two hills|beside the lake|without a sound|in the old town|for a long time"
).split("|")
STORIES = (
    "Rain falls on the hills. The river takes it down to the sea.",
    "Birds fly over the lake. Fish swim in it. Nobody is in a hurry here.",
    "One step, then another step. The road goes on and so do we.",
    "The sun is up. The moon is down. Stars come out later. Wind moves the leaves.",
    "There is nothing to see in this line. Please go on with the next one.",
    "Bread is made of flour, water and salt. The oven does the rest.",
    "The clock says tick, the clock says tock. Time goes by.",
    "Snow on the roof, fire in the stove. Tea is ready soon.",
)
COMMON = (
    "the the the of of and and to to a a in in is it that that was for on are as with they at be this have from or one had by but not what "
    "all were we when your can said there use an each which she do how their if will up other about out many then them these so some her "
    "would make like him into time has look two more write go see number no way could people my than first been call who its now find long "
    "down day did get come made may part I you he his because every good most thing think work world year what's don't it's I'm"
).split()
ONSETS = "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr qu sc sh sk sl sm sn sp st str sw th tr tw wh".split()
VOWELS = "a a e e i i o o u y ai ea ee ie oa oo ou ow au".split()
CODAS = ["", "", "", *"b ck d g k l ll m n n ng nd nt p r r rd rt s ss st t t th x ct mp ve se ce le".split()]
SUFFIXES = "ing ed er est ness tion ly able ful less ous ish y s es ment al ity ism ent ant ive ary age ship".split()
EVAL_SHARE = 0.4  # of the training prompts use the wording of the evaluation


def sentence(rng: random.Random) -> str:
    """One random English sentence."""
    article = rng.choice(("The", "A", "Every", "This", "One"))
    other = rng.choice(("the", "a", "its", "another"))
    text = f"{article} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} {other} {rng.choice(NOUNS)}"
    return f"{text} {rng.choice(PLACES)}." if rng.random() < 0.5 else f"{text}."


def noise_lines(rng: random.Random) -> list[str]:
    """The lines that a noise text repeats: one as in the published recipe, or a few, or many different ones."""
    kind = rng.random()
    if kind < EVAL_SHARE:
        return [PASSKEY.noise]
    if kind < 0.55:
        return [rng.choice(STORIES)]
    if kind < 0.75:
        return [" ".join(sentence(rng) for _ in range(rng.randint(1, 4)))]
    return [" ".join(sentence(rng) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(2, 12))]


def syllable(rng: random.Random) -> str:
    """A short word that nobody knows."""
    return rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)


def made_up_word(rng: random.Random) -> str:
    """A word that nobody knows, made of syllables, with or without an ending."""
    syllables = (syllable(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))
    return "".join(syllables) + (rng.choice(SUFFIXES) if rng.random() < 0.35 else "")


def word(rng: random.Random) -> str:
    """A made-up word, or random letters, or one of the lists."""
    kind = rng.random()
    if kind < 0.15:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
    return made_up_word(rng) if kind < 0.75 else rng.choice(rng.choice((NOUNS, VERBS, ADJECTIVES)))


def some_words(rng: random.Random) -> str:
    """Up to six words without a sense."""
    return " ".join(rng.choice(COMMON) if rng.random() < 0.5 else word(rng) for _ in range(rng.randint(1, 6)))


def prose_sentence(rng: random.Random) -> str:
    """A sentence that has the look of prose: common words, others, commas, now and then numbers, brackets and quotes."""
    if rng.random() < 0.15:
        return sentence(rng)
    common = rng.uniform(0.2, 0.7)
    words = [rng.choice(COMMON) if rng.random() < common else word(rng) for _ in range(rng.choice((3, 6, 9, 12, 16, 20, 26)))]
    for at in range(len(words) - 1):
        kind = rng.random()
        if kind < 0.06:
            words[at] += rng.choice((",", ",", ",", ";", ":", " -"))
        elif kind < 0.08:
            words[at] = rng.choice(('"{}"', "({})", "'{}'")).format(words[at])
        elif kind < 0.1:
            words[at] = str(rng.randint(0, 10 ** rng.randint(1, 4)))
        elif kind < 0.13:
            words[at] = words[at].capitalize()
    text = " ".join(words)
    return text[0].upper() + text[1:] + rng.choice((".", ".", ".", ".", "?", "!", "...", ".)", '."'))


def varied_noise_lines(rng: random.Random) -> list[str]:
    """``noise_lines``, or lines of short sentences of words that nobody knows."""
    if rng.random() < 0.4:
        return noise_lines(rng)
    count = rng.choice((1, 1, 1, 2, 4))
    return [" ".join(f"{some_words(rng).capitalize()}." for _ in range(rng.randint(1, 6))) for _ in range(count)]
