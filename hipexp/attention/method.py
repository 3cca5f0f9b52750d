"""What a method is: how the queries of one layer choose what they attend to. Each is a file of :mod:`hipexp.attention.methods`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from hipexp_kernels.paged import KV
from torch import Tensor

from hipexp.attention.blocks import QueryBlocks
from hipexp.attention.reads import Listener
from hipexp.attention.refresh import Memory
from hipexp.attention.rope import RopeTables
from hipexp.attention.selection import Selection
from hipexp.config.schema import ConfigError, LayerPlan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EVERYTHING = 1 << 62  # no sequence is as long
QUERY_BLOCK_TOK = 64


def check_whole_blocks(keep_tok: int, block_tok: int, name: str = "block_tok") -> None:
    """Raise ConfigError for a budget that is no whole number of blocks; ``name``: what the method calls their size."""
    if block_tok and keep_tok % block_tok:
        raise ConfigError(
            f"pipeline.params.keep_tok={keep_tok} must be a multiple of {name}={block_tok}; try {max(1, keep_tok // block_tok) * block_tok}"
        )


class Contract(str, Enum):
    """What a user may rely on under any method, unless the method says why its paper's rule does not hold it."""

    causal = "causal"  # later tokens change no earlier output
    chunked = "chunked"  # however a prompt is cut into parts, outputs are the same
    padded = "padded"  # left padding, and other rows of a batch, change nothing
    grouped = "grouped"  # any number of query heads share a key/value head
    deterministic = "deterministic"  # the same twice
    growing = "growing"  # a decode step is what prefill of the same token is, where both see the same keys
    exact = "exact"  # where the budget holds all keys, outputs are those of dense attention
    restored = "restored"  # a model is as before once the pipeline is taken out


@dataclass(frozen=True)
class Call:
    """One call of a layer: ``queries`` in blocks, raw ``keys`` ``[K, T, D]`` up to the last of them, and what the sequence remembers.

    ``decoding``: a decode step, one block of one query. ``memory``: what decode steps before it selected; in prefill None, or where lists
    of every stage are left for who wants them. ``state``: what :meth:`Method.new_state` made for this sequence and layer, or for this call
    alone. ``shared``: a dictionary that all layers of the sequence share. ``softcap``: bound of the model's logits, for methods that sum
    attention; it changes no order of one head's keys. ``processes``: those that have the other heads of the layer, for methods whose heads
    choose together (see :mod:`hipexp.attention.across`); None: all heads are here.
    """

    queries: QueryBlocks
    keys: KV
    tables: RopeTables
    scale: float
    decoding: bool = False
    memory: Memory | None = None
    state: Any = None
    shared: dict[Any, Any] = field(default_factory=dict)
    listener: Listener | None = None
    softcap: float | None = None
    processes: ProcessGroup | None = None


@dataclass
class Method(ABC):
    """A rule of attention with the parameters of its paper as fields, each with a default; ``plan`` is what it has in common with others.

    Subclasses are dataclasses. ``exceptions``: contracts that the paper's rule does not hold, each with its reason. ``offloads``: whether
    it reads keys and values only where it says so, so that they can lie elsewhere. ``captures``: whether its decode steps can be captured
    in a CUDA graph. ``linear``: whether reading a prompt takes little more than time in proportion to it. ``budgets``: parameters that say
    how much is kept. ``remembers``: it needs what it noted of all tokens before, and cannot make that again from their keys.
    ``splits``: whether a process may have some of a layer's heads only; each then chooses for itself, or all through ``Call.processes``.
    """

    plan: LayerPlan

    exceptions: ClassVar[Mapping[Contract, str]] = {}
    offloads: ClassVar[bool] = False
    captures: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    budgets: ClassVar[tuple[str, ...]] = ()
    remembers: ClassVar[bool] = False
    splits: ClassVar[bool] = False

    def check(self) -> None:
        """Raise ConfigError for parameters that break a rule of the method; each by itself has its type already. Most have no such rule."""
        return None

    @abstractmethod
    def decode_rows(self, n_tok: int, heads: int, kv_heads: int) -> tuple[float, float]:
        """How many rows of the cache a mean decode step behind ``n_tok`` tokens asks for: keys and values attended to, and what is read to
        choose them (keys, or summaries of the same size), of all heads."""

    def new_state(self) -> Any:
        """What is kept about a new sequence in this layer, with a property ``bytes``; None if nothing is."""
        return None


class DenseMethod(Method):
    """A method with an attention of its own: it is given all keys and says which of them count, and at what positions."""

    @abstractmethod
    def exact_tok(self, tables: RopeTables | None) -> int:
        """Queries before this position get what dense attention gives them; ``tables`` None: the layer has no RoPE."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, begin: int, tables: RopeTables | None, scale: float, softcap: float | None) -> Tensor:
        """Return ``[H, Q, D]``: raw queries ``[H, Q, D]`` at positions ``begin`` … over raw keys and values ``[K, T, D]``."""

    def decode_rows(self, n_tok: int, heads: int, kv_heads: int) -> tuple[float, float]:
        return 2 * kv_heads * n_tok, 0


class SelectingMethod(Method):
    """A method that selects blocks of keys for blocks of queries, which attend to them, the sinks and the window.

    ``per_head``: a list for every query head, not for every key/value head. ``reuses``: a decode step may have the list of the step
    before, and says so to its memory when it has another.
    """

    per_head: ClassVar[bool] = False
    reuses: ClassVar[bool] = False

    @property
    def query_block_tok(self) -> int:
        """Queries of a prompt that select together: the parameter ``query_tok``, where there is one."""
        return getattr(self, "query_tok", QUERY_BLOCK_TOK)

    @property
    def attended_block_tok(self) -> int:
        """Queries of a prompt that share a list in the end; divides ``query_block_tok``."""
        return self.query_block_tok

    @property
    def aligned(self) -> bool:
        """Whether a later part of a prompt has to begin where a query block does."""
        return self.keep(False) > 0 and self.exact_tok(False) < EVERYTHING

    @property
    def takes_from(self) -> int | None:
        """The layer whose selection this one attends to; None: its own."""
        return None

    def block(self, decoding: bool) -> int:
        """Tokens of a selected block: the parameter ``block_tok``, 1 without one."""
        return getattr(self, "block_tok", 1)

    @abstractmethod
    def keep(self, decoding: bool) -> int:
        """The most tokens that are selected; ``EVERYTHING`` where attention is dense, or where there is no limit."""

    def exact_tok(self, decoding: bool) -> int:
        """A block that ends before this position attends to all its keys, at true positions: sinks, window and selection hold them."""
        return self.plan.sink_tok + self.plan.window_tok + self.keep(decoding)

    def decode_rows(self, n_tok: int, heads: int, kv_heads: int) -> tuple[float, float]:
        attended = min(n_tok, self.plan.sink_tok + self.plan.window_tok + self.keep(True))
        lists = heads if self.per_head else kv_heads
        return (2 * lists * attended, self.scanned_rows(n_tok, heads, kv_heads)) if attended < n_tok else (2 * kv_heads * n_tok, 0)

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        """Rows that a mean decode step reads to choose: every key once, if a method does not say otherwise."""
        return kv_heads * n_tok

    def n_candidates(self, position: int) -> int:
        """How many first candidates a decode step at ``position`` has, for methods that read the number on the device."""
        return 0

    def observe(self, call: Call) -> None:
        """Note what later calls need of this one; called before :meth:`select`, also where nothing is selected."""

    @abstractmethod
    def select(self, call: Call) -> Selection:
        """Select blocks for every block of ``call.queries``."""
