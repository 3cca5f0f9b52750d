"""Sections about where numbers come from: the protocol cards, and the runs that are in no number."""

from __future__ import annotations

from typing import Any

from hipexp.report.accuracy import card_id
from hipexp.report.gather import Entry, Gathered, groups_of
from hipexp.report.naming import command_of
from hipexp.report.parts import Cell, Link, Section, Table

FIELDS = ("suite", "protocol", "edition", "wording", "scorer", "data", "decoding", "stops", "chat_template", "note")


def excluded(gathered: Gathered) -> Section:
    """Runs that failed, are not finished, or are damaged, each with the command that goes on."""
    runs = [run for run in gathered.runs if run.problem]
    header = ["attention", "state", "finished samples", "why", "command that continues it", "task", "model", "last change", "run"]
    rows: list[list[Cell]] = []
    for run in runs:
        command = (command_of(run.config) if run.config else None) or "the command that started it"
        folder = Link(run.folder.name, str(run.folder.resolve()))
        last = str(run.status.get("updated", ""))
        rows.append([run.label, _state(run), run.n_samples, run.problem, command, run.task, run.model, last, folder])
    table = Table("excluded", "Runs that are in no number", header, rows, [run.tags for run in runs], folded=False)
    counts = {state: len(mine) for state, mine in groups_of(runs, _state).items()}
    told = ", ".join(f"{n} {state}" for state, n in counts.items()) if counts else "none: every run is finished and whole"
    words = f"Failed, unfinished and damaged runs; no mean, difference or picture has samples of them. Here: {told}."
    return Section("excluded", "Failed and unfinished runs", words, tables=[table] if rows else [])


def _state(run: Entry) -> str:
    return "not counted" if run.state == "done" else run.outcome


def protocols(gathered: Gathered) -> Section:
    """Every protocol card of a finished run, under the name that the leaderboard calls it by."""
    header = ["card", "runs", *FIELDS, "cut", "tokens cut off", "subtasks", "model revision", "dtype", "transformers"]
    rows: list[list[Cell]] = []
    tags = []
    for name, runs in groups_of(gathered.counted, card_id).items():
        card = runs[0].card
        model = card.get("model") or {}
        truncation = card.get("truncation") or {}
        told = [_words(card.get(field)) for field in FIELDS]
        cut = sum((truncation.get("removed_tok") or {}).values())
        names = _words(list(card.get("metric") or {}))
        about = [_words(model.get("revision")), _words(model.get("dtype")), _words(model.get("transformers"))]
        rows.append([name, len(runs), *told, _words(truncation.get("rule")), cut, names, *about])
        tags.append(runs[0].tags)
    table = Table("protocols", "Protocol cards", header, rows, tags)
    words = (
        "How scores were made. Differences to dense are taken only where model, prompts, data, cut, decoding, scorer and seed of a "
        "subtask agree. Scores of different protocols stand in different rows and are not to be compared."
    )
    return Section("protocols", "Protocols", words, tables=[table] if rows else [])


def _words(value: Any) -> str | None:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or None
    return None if value in (None, "") else str(value)
