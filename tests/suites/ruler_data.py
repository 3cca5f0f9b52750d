"""Small files in the formats that RULER's samples are made of, drawn from a seed: none of them is, or resembles, the official data."""

from __future__ import annotations

import itertools
import json
import random

SUBJECTS = "gardener captain teacher weaver doctor miller singer sailor painter clerk baker farmer".split()
VERBS = "watches repairs remembers measures follows paints carries covers visits counts describes sells".split()
OBJECTS = "bridge lantern orchard ladder engine harbor mirror village basket library tunnel meadow".split()
PLACES = "near the shore|behind the mill|after the rain|in the old town|at 4.30 p.m. sharp|on St. Mary St. in the north".split("|")
NAMES = "Ada Bruno Clara Dmitri Elif Farid Greta Hiro Ines Jonas Kofi Lena".split()
ENDS = [".", ".", ".", "!", "?", "...", '."', ".)", "?!"]


def sentence(rng):
    """A sentence; some have abbreviations, numbers, quotes and other ends that a sentence splitter may stumble over."""
    who = rng.choice([f"The {rng.choice(SUBJECTS)}", f"Dr. {rng.choice(NAMES)}", f"{rng.choice(NAMES)} B. Holm", f"({rng.choice(NAMES)}"])
    what = f"{rng.choice(VERBS)} the {rng.choice(OBJECTS)} {rng.choice(PLACES)}"
    return f"{who} {what}{rng.choice(['', ', e.g. twice', ', about 3.5 times', ' etc. and so on'])}{rng.choice(ENDS)}"


def essays(rng, sentences=1500):
    """``{"text": ...}``, in paragraphs."""
    made = [sentence(rng) for _ in range(sentences)]
    paragraphs = [" ".join(made[at : at + 5]) for at in range(0, sentences, 5)]
    return {"text": "\n\n".join(paragraphs)}


def fact(rng, number):
    """A sentence that occurs once, the question for it and the answer."""
    name, thing, value = rng.choice(NAMES), rng.choice(OBJECTS), f"{rng.randint(1000, 9999)} {rng.choice(OBJECTS)}s"
    return f"In year {number} {name} bought {value} for the {thing}.", f"What did {name} buy in year {number}?", value


def squad(rng, articles=12, each=5, questions=40):
    """Articles of paragraphs; ``questions`` of the questions have answers, every third paragraph also has one without."""
    numbers, data = itertools.count(), []
    for article in range(articles):
        paragraphs = []
        for _ in range(each):
            number = next(numbers)
            said, asked, value = fact(rng, number)
            context = " ".join([*(sentence(rng) for _ in range(3)), said, sentence(rng)])
            qas = [{"question": asked, "id": str(number), "is_impossible": False, "answers": [{"text": value, "answer_start": 0}]}]
            if number >= questions:
                qas = []
            if number % 3 == 0:
                qas.append({"question": "Why?", "id": f"{number}-", "is_impossible": True, "answers": [], "plausible_answers": []})
            paragraphs.append({"context": context, "qas": qas})
        data.append({"title": f"Article {article}", "paragraphs": paragraphs})
    return {"version": "v2.0", "data": data}


def hotpotqa(rng, questions=40, each=10):
    """Questions with ten titled paragraphs each, drawn from 60, of which one has the answer."""
    paragraphs = []
    for number in range(60):
        said, asked, value = fact(rng, number)
        paragraphs.append((asked, value, [f"Page {number}", [sentence(rng) + " ", said, " " + sentence(rng)]]))
    rows = []
    for number in range(questions):
        asked, value, page = paragraphs[number]
        others = rng.sample([p for _, _, p in paragraphs if p is not page], each - 1)
        context = rng.sample([page, *others], each)
        rows.append({"_id": str(number), "question": asked, "answer": value, "context": context, "supporting_facts": [[page[0], 1]]})
    return rows


def english_words(rng, words=60000):
    """An object of numbers and made-up words."""
    made = {"".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(4, 9))): None for _ in range(words)}
    return {str(number): word for number, word in enumerate(made)}


def write_punkt(folder, text):
    """The four files of ``punkt_tab/english``, learnt from a text; returns what was learnt."""
    from nltk.tabdata import TabEncoder
    from nltk.tokenize.punkt import PunktTrainer

    learnt, encoder = PunktTrainer(text).get_params(), TabEncoder()
    inside = folder / "punkt_tab/english"
    inside.mkdir(parents=True)
    (inside / "collocations.tab").write_text(encoder.tups2tab(learnt.collocations))
    (inside / "sent_starters.txt").write_text(encoder.set2txt(learnt.sent_starters))
    (inside / "abbrev_types.txt").write_text(encoder.set2txt(learnt.abbrev_types))
    (inside / "ortho_context.tab").write_text(encoder.ivdict2tab(learnt.ortho_context))
    return learnt


def write_resources(folder, seed=7, more_words=True, punkt=False):
    """All files in ``folder``, which is made; returns it."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    made = {"PaulGrahamEssays.json": essays(rng), "squad.json": squad(rng), "hotpotqa.json": hotpotqa(rng)}
    if more_words:
        made["english_words.json"] = english_words(rng)
    for name, data in made.items():
        (folder / name).write_text(json.dumps(data), encoding="utf-8")
    if punkt:
        write_punkt(folder, made["PaulGrahamEssays.json"]["text"])
    return folder
