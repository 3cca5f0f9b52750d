"""``python -m hipexp tune``: a search for pipelines that no other beats."""
