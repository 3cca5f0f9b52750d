"""Points that several processes share, where one that fails does not stop the others."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from hipexp.run.identity import key_of
from hipexp.run.ledger import Interrupted, classify, is_done, is_held, read_json
from hipexp.run.point import Load, execute, folder_of
from hipexp.run.several import Named, load_once

WAIT_S = 0.2  # between looks at points that other processes are running


@dataclass(frozen=True)
class Shared:
    """A point that may be over by the work of another process; ``before``: its ``status.json`` when the work began."""

    run: Named
    folder: Path
    key: str
    before: dict[str, Any]

    @classmethod
    def of(cls, run: Named) -> Shared:
        """A point as it is now."""
        folder = folder_of(run.experiment)
        return cls(run, folder, key_of(run.experiment), read_json(folder / "status.json"))

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return is_done(self.folder, self.key)

    @property
    def failed(self) -> bool:
        """Whether it failed since the work began; one that was only interrupted is taken up again."""
        now = read_json(self.folder / "status.json")
        return now != self.before and now.get("state") == "failed" and now.get("class") != "interrupted"


def run_each(points: Sequence[Shared], after: Callable[[], object] = lambda: None, load: Load | None = None) -> dict[Path, str]:
    """Run what is not done yet, in order, and ``after`` each of them; returns why points failed here, by their folder.

    What another process is running comes last. A process that was started for this ends when the one that started it is gone.
    """
    load, left, why = load or load_once(), [point for point in points if not point.done], dict[Path, str]()
    total = len(left)
    while left:
        if (parent := parent_process()) is not None and not parent.is_alive():
            raise Interrupted("the process that started this one is gone; the same command continues")
        point = next((point for point in left if not is_held(point.folder)), None)
        if point is None:
            time.sleep(WAIT_S)
            continue
        left.remove(point)
        if point.done or point.failed:
            continue
        print(f"[{total - len(left)}/{total}] {point.run.name}", flush=True)
        try:
            execute(point.run.experiment, load)
        except Exception as error:  # whatever it is, the ledger has it, and the other points go on
            why[point.folder] = f"failed ({classify(error)}): {' '.join(str(error).split()) or type(error).__name__}"
            print(f"{why[point.folder]}; log: {point.folder / 'log.txt'}", file=sys.stderr, flush=True)
        after()
    return why
