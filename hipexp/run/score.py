"""``python -m hipexp score <suite> predictions.jsonl``: official scores of predictions made anywhere, without running a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites.scoring import SUITES, score_rows

USAGE = f"python -m hipexp score <{'|'.join(SUITES)}> predictions.jsonl [edition=...] [drop_first_number=true] [--json]"


def main(words: list[str]) -> int:
    """Print the scores of a file as JSON. Raises ``ConfigError`` for wrong words, and for the first line that cannot be scored."""
    names = [word for word in words if word != "--json"]
    options = dict(word.split("=", 1) for word in names[2:] if "=" in word)
    unknown = [word for word in names[2:] if word.partition("=")[0] not in ("edition", "drop_first_number") or "=" not in word]
    if len(names) < 2 or unknown:
        raise ConfigError(f"score takes no {unknown[0]!r}: {USAGE}" if unknown else f"score needs a suite and a file: {USAGE}")
    drop = options.get("drop_first_number", "false")
    if drop not in ("true", "false"):
        raise ConfigError(f"drop_first_number={drop} must be true or false")
    scores = score_rows(names[0], read_predictions(Path(names[1])), options.get("edition"), drop == "true")
    print(json.dumps(scores, indent=2, ensure_ascii=False, allow_nan=False))
    return 0


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, each with its ``file`` and ``line``. Raises ``ConfigError`` for a line that is not one JSON object."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(read_line(line, f"{path}, line {number}") | {"file": str(path), "line": number})
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a JSONL file of predictions") from error
    return rows


def read_line(line: bytes, place: str) -> dict[str, Any]:
    """One line as an object. Raises ``ConfigError`` that names ``place`` and what is wrong."""
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: byte {error.start} is not UTF-8; save the file in that encoding") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not valid JSON ({error}); each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: must be a JSON object, not {type(row).__name__}")
    return row


def refuse_constant(name: str) -> Any:
    """Raise ``ValueError``: Python would read NaN and Infinity, which JSON does not know and no score may be made from."""
    raise ValueError(f"{name} is no number of JSON")
