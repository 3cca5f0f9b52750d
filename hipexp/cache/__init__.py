"""Where keys and values live."""

from hipexp.cache.resident import ResidentStore
from hipexp.cache.summaries import KeySummaries

__all__ = ["KeySummaries", "ResidentStore"]
