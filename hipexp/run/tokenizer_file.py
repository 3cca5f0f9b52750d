"""The tokenizer of a local model from its ``tokenizer.json`` alone, without importing transformers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

from hipexp.config.schema import ConfigError


class TokenizerFile:
    """Called as a tokenizer of transformers is: ``tokenizer(text, add_special_tokens=...).input_ids``."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # it knows no other
            raise ConfigError(f"{path} must be a tokenizer that can be read, but: {error}; fetch or save the model again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def read_tokenizer(path: Path) -> TokenizerFile:
    """The tokenizer in a file; read again only if the file changed. Raises ``ConfigError`` for one that is damaged."""
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read(path: Path, _changed: int) -> TokenizerFile:
    return TokenizerFile(path)
