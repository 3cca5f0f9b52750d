"""No token is lost between the first candidates and the attention window."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hipexp.attention.blocks import QueryBlocks
from hipexp.attention.methods.hip import first_candidates

powers = st.integers(0, 5).map(lambda n: 2**n)


@given(chunk=powers, block=powers, finest=powers, more=st.integers(0, 40), sink=st.integers(0, 9), steps=st.integers(1, 32))
def test_candidates_reach_the_window_until_they_are_drawn_again(chunk, block, finest, more, sink, steps):
    """For the sizes that the configuration accepts; ``steps`` is the refresh interval of the first stage in decode."""
    window = chunk + more
    assume(finest <= block and block - finest <= min(chunk, window - 1) and steps <= chunk)
    queries = QueryBlocks(torch.empty(1, -(-300 // block), block, 1), 0, block, 0, 300)
    first = queries.first
    starts, counts = first_candidates(queries, sink, window - chunk, chunk)
    assert starts.shape[2] == int(counts.max())
    reached = sink + chunk * counts[0]
    for last in (first + block - finest, first + steps - 1):  # the last block of a larger one; the last step before a refresh
        oldest_in_window = last - window + 1
        assert bool(((reached >= oldest_in_window) | (oldest_in_window <= sink)).all())
