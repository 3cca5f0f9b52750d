"""Where the ways to score a chunk that do not depend on the query look at it."""


def probe_step(representative: str, chunk_tok: int) -> int:
    """Tokens from one probe of ``exact`` or ``grid`` to the next (powers of two)."""
    if representative == "exact":
        return 1
    probes = 1 << (2 * (chunk_tok.bit_length() - 1)).bit_length() >> 1  # as many as a descent makes, rounded down
    return max(1, chunk_tok // max(8, probes))
