"""Where keys and values live."""

from hipexp.cache.resident import ResidentStore

__all__ = ["ResidentStore"]
