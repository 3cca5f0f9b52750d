"""The embedded model ``needle``: its weights lie in ``model/``, this package holds how they were made."""
