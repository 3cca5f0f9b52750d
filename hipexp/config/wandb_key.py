"""Whether wandb could log in from this machine, found out without importing it."""

from __future__ import annotations

import os
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
SERVER = "https://api.wandb.ai"


def has_wandb_key() -> bool:
    """Whether wandb has an API key on this machine: in the environment, or in a netrc file for the server that its settings name."""
    if any(map(os.environ.get, KEYS)):
        return True
    server = urlsplit(_server()).netloc
    for path in (Path(os.environ.get("NETRC") or "~/.netrc").expanduser(), Path("~/_netrc").expanduser()):
        try:
            if netrc(path).authenticators(server):
                return True
        except (OSError, NetrcParseError):
            continue
    return False


def _server() -> str:
    """Where wandb sends runs: its environment variable, else what `wandb login --host` wrote down, else its own server."""
    if os.environ.get("WANDB_BASE_URL"):
        return os.environ["WANDB_BASE_URL"]
    settings = ConfigParser(interpolation=None)
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    try:
        settings.read(folder / "settings", encoding="utf-8")
    except (ConfigParserError, UnicodeDecodeError):
        return SERVER
    return settings.get("default", "base_url", fallback=SERVER)
