"""Few stand-ins for the files that RULER's samples are made of."""

import shutil

from hipexp.suites.ruler.stand_ins import Size, write_stand_ins

SMALL = Size(prose_chars=90_000, documents=60, questions=40)


def write_resources(folder, seed=7, more_words=True, punkt=False):
    """All files in ``folder``, which is made, or without the second word list and the sentence ends; returns it."""
    write_stand_ins(folder, seed, SMALL)
    if not more_words:
        (folder / "english_words.json").unlink()
    if not punkt:
        shutil.rmtree(folder / "punkt_tab")
    return folder
