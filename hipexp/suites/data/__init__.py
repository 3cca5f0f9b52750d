"""Published data and official prompts of the suites: what there is, how it is fetched, found and read. No loading script is ever run."""

from hipexp.suites.data.rows import ListOf, read_json, read_literals, read_mapping, read_rows, read_text

__all__ = ["ListOf", "read_json", "read_literals", "read_mapping", "read_rows", "read_text"]
