"""hipexp: configuration-driven experiments around InfiniteHiP long-context attention."""

__version__ = "0.1.0"
