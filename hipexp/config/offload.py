"""How large the tiers of an offload are, what a context needs of them, and what this machine has: refused before anything loads."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hipexp.config.model import ModelFacts
from hipexp.config.schema import FORMATS, INT4_GROUP, PAGE_TOK, ConfigError, LayerPlan, Offload, page_bytes

POLICIES = ("lru", "clock", "lfu")
SPARED_DISK_BYTES = 1 << 30  # for the files of the run itself and for what others write meanwhile
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
KB = 1024


@dataclass(frozen=True)
class Sizes:
    """Sizes of the tiers for one sequence in each layer.

    ``device_tok``, ``host_tok`` (None: everything) and ``disk_tok`` (0: no such tier, None: what the disk has) in tokens.
    ``page_tok``: tokens of a page, of all layers the largest. ``token_bytes``: of a token on the device, in the model's own format,
    ``page_bytes``: of a page off the device, in the offload's; both of keys and values of all heads.
    """

    layers: int
    device_tok: int
    host_tok: int | None
    disk_tok: int | None
    page_tok: int
    token_bytes: int
    page_bytes: int

    def bytes_of(self, tokens: int) -> int:
        """Bytes of so many tokens off the device, in whole pages, of all layers of one sequence."""
        return -(-tokens // self.page_tok) * self.page_bytes * self.layers

    @property
    def device_bytes(self) -> int:
        """Bytes of the device's tier, of all layers of one sequence."""
        return self.device_tok * self.token_bytes * self.layers


@dataclass(frozen=True)
class Room:
    """Bytes that may be used: of host memory, and on the disk of the disk tier. None where the system does not say."""

    host_bytes: int | None
    disk_bytes: int | None


def disk_folder(offload: Offload) -> Path | None:
    """The folder of the disk tier; None without one."""
    return None if offload.disk_dir is None else Path(offload.disk_dir).expanduser()


def kept_tok(plan: LayerPlan) -> int:
    """The most tokens that the last stage of a layer keeps, in prefill or decode."""
    return max((stages[-1].keep_tok for stages in (plan.stages, plan.decode) if stages), default=0)


def page_tok_of(plans: list[LayerPlan]) -> int:
    """Tokens of a page for layers with these plans: a chunk of any last stage fits."""
    return max([PAGE_TOK, *(stages[-1].chunk_tok for plan in plans for stages in (plan.stages, plan.decode) if stages)])


def check_chunks(offload: Offload, page_tok: int, prefill_chunk_tok: int) -> None:
    """Refuse parts of a prompt that cut a page of a lossy format; raises ConfigError.

    A page is rounded when it is whole, and what queries of the next part see of it must not depend on where the prompt was cut.
    """
    if offload.on and offload.format != "auto" and prefill_chunk_tok % page_tok:
        raise ConfigError(
            f"model.prefill_chunk_tok={prefill_chunk_tok} must be whole pages of {page_tok} tokens with offload.format={offload.format}, "
            f"which rounds a page at a time; try {max(1, prefill_chunk_tok // page_tok) * page_tok}"
        )


def sizes(offload: Offload, plans: list[LayerPlan], facts: ModelFacts) -> Sizes:
    """The sizes of the tiers for layers with these plans. Raises ConfigError where the model does not say how large its heads are."""
    if not facts.kv_heads or not facts.head_dim:
        raise ConfigError(
            f"offload={offload.name} has to know how large keys and values are, and the model's config.json does not say it; "
            "it must give num_attention_heads, and num_key_value_heads and head_dim where they are not as usual"
        )
    page_tok = page_tok_of(plans)
    token = 2 * facts.kv_heads * facts.head_dim * facts.itemsize
    page = 2 * facts.kv_heads * page_bytes(offload.format, page_tok, facts.head_dim, facts.itemsize)

    def in_pages(tokens: int | None, size: int | None) -> int | None:
        return tokens if size is None else size // (len(plans) * page) * page_tok

    device_tok = offload.device_tok or (offload.device_bytes or 0) // (len(plans) * token)
    host_tok = in_pages(offload.host_tok, offload.host_bytes)
    disk_tok = 0 if offload.disk_dir is None else in_pages(offload.disk_tok, offload.disk_bytes)
    return Sizes(len(plans), device_tok, host_tok, disk_tok, page_tok, token, page)


def check_sizes(offload: Offload, plans: list[LayerPlan], facts: ModelFacts) -> None:
    """Refuse a device that could not hold what a query attends to, tiers below a page, heads that a format cannot pack.

    Raises ConfigError.
    """
    told = sizes(offload, plans, facts)
    if offload.format == "int4" and facts.head_dim % 4:
        raise ConfigError(
            f"offload.format=int4 packs {INT4_GROUP} numbers of a head: its dimension must be a multiple of 4, and this model's is "
            f"{facts.head_dim}; use int8"
        )
    greedy = max(plans, key=lambda plan: plan.sink_tok + plan.window_tok + kept_tok(plan))
    kept = kept_tok(greedy)
    needed = greedy.sink_tok + greedy.window_tok + told.page_tok + max(1, kept)  # a pool has a slot at least
    if told.device_tok < needed:
        key, shown = _named(offload, "device"), f"at least {needed}"
        if offload.device_tok is None:
            shown += f" tokens in each of {told.layers} layers, which are {needed * told.token_bytes * told.layers} bytes"
        what = f"sinks, a window of {greedy.window_tok}, the {kept} tokens that layer {greedy.layer} keeps and a page"
        what = what if kept else f"sinks, a window of {greedy.window_tok} tokens (layer {greedy.layer}), a page and a token"
        raise ConfigError(f"{key} must hold {what}: {shown}; raise it, or let the pipeline keep less")
    for tier, tokens in (("host", told.host_tok), ("disk", told.disk_tok)):
        if tokens is not None and tokens < told.page_tok and (tier == "host" or offload.disk_dir is not None):
            least = f"{told.page_tok} tokens" if getattr(offload, f"{tier}_bytes") is None else f"{told.bytes_of(1)} bytes"
            raise ConfigError(f"{_named(offload, tier)} must hold a page of every layer, {least}; raise it")


def needs(told: Sizes, context_tok: int, rows: int) -> tuple[int, int]:
    """Bytes that ``rows`` contexts of ``context_tok`` tokens take in host memory and, what does not fit there, on disk."""
    host_tok = context_tok if told.host_tok is None else min(told.host_tok, context_tok)
    return rows * told.bytes_of(host_tok), rows * told.bytes_of(context_tok - host_tok)


def check_fits(offload: Offload, plans: list[LayerPlan], facts: ModelFacts, context_tok: int, rows: int, room: Room) -> None:
    """Refuse contexts, ``rows`` at once of ``context_tok`` tokens each (new ones counted), that fit in no tier; raises ConfigError.

    Prefill layer by layer (``prefill_bytes``) takes nothing more off the device.
    """
    told = sizes(offload, plans, facts)
    _check_limits(offload, told, context_tok)
    names, has = ("host memory", f"disk in offload.disk_dir={offload.disk_dir}"), (room.host_bytes, room.disk_bytes)
    for tier, (name, needed, free) in enumerate(zip(names, needs(told, context_tok, rows), has, strict=True)):
        if not needed or free is None or needed <= free:
            continue
        others = {other: sizes(dataclasses.replace(offload, format=other), plans, facts) for other in FORMATS}
        smaller = [f"offload.format={other}" for other, size in others.items() if needs(size, context_tok, rows)[tier] <= free]
        repairs = [*smaller[:1], *_larger_tiers(offload, tier), _shorter(told, tier, rows, free)]
        raise ConfigError(
            f"offload={offload.name}: {_contexts(context_tok, rows)} must fit, and {told.layers} layers would take {show_bytes(needed)} of "
            f"{name} (offload.format={offload.format}), where {show_bytes(max(free, 0))} can be had; try {' or '.join(repairs)}"
        )


def _larger_tiers(offload: Offload, tier: int) -> list[str]:
    if tier:
        return ["a folder on a larger disk"]
    return ["a disk tier (offload=disk)"] if offload.disk_dir is None else [f"a smaller {_key(offload, 'host')}"]


def _shorter(told: Sizes, tier: int, rows: int, free: int) -> str:
    """The longest context of which what falls to a tier (0: host memory, 1: disk) takes no more than is free there."""
    fits = max(free, 0) // (rows * told.bytes_of(1)) * told.page_tok + (told.host_tok or 0 if tier else 0)
    shorter = f"a context of at most {fits} tokens" if fits else "a smaller model"
    return shorter if rows == 1 else f"{shorter} or fewer at once (task.batch)"


def _check_limits(offload: Offload, told: Sizes, context_tok: int) -> None:
    if told.host_tok is None or told.disk_tok is None or context_tok <= told.host_tok + told.disk_tok:
        return
    held = f"{_named(offload, 'host')} has room for {told.host_tok} tokens"
    if offload.disk_dir is None:
        rule, repair = (
            f"{held} and there is no disk tier",
            f"raise it, add one with offload.disk_dir=<folder>, or use {_key(offload, 'host')}=null",
        )
    else:
        rule, repair = (
            f"{held} and {_named(offload, 'disk')} for {told.disk_tok}",
            f"raise one of them, or use {_key(offload, 'disk')}=null",
        )
    raise ConfigError(f"offload={offload.name}: {_contexts(context_tok, 1)} must fit, but {rule}; {repair}")


def room_for(offload: Offload, taken_bytes: int = 0) -> Room:
    """What this machine can spare for the tiers, ``taken_bytes`` of host memory being promised to something else.

    A tenth of the available memory is left: the system's figure is an estimate that counts files it may drop, which it reads again
    if it does, and a step needs memory of its own. Of the disk a tenth is left too, or a GiB if that is less.
    """
    available, folder = available_bytes(), disk_folder(offload)
    host = None if available is None else available - available // 10 - taken_bytes
    free = None if folder is None else shutil.disk_usage(folder).free
    return Room(host, None if free is None else free - min(SPARED_DISK_BYTES, free // 10))


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Host memory that can still be had: ``MemAvailable`` of Linux, or less where a control group (a container) allows less.

    None where the system does not say.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        available = int(lines["MemAvailable"].split()[0]) * KB
    except (OSError, ValueError, KeyError, IndexError):
        return None
    try:
        most, used = (int((cgroup / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        told = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
        return min(available, most - used + int(told.get("inactive_file", 0)))  # files not in use are dropped first
    except (OSError, ValueError):  # no group, or one without a limit (`max`)
        return available


def check_folder(offload: Offload) -> None:
    """Refuse a folder of the disk tier that is none, or that cannot be written to; raises ConfigError."""
    folder = disk_folder(offload)
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        what = "can be written to" if folder.is_dir() else "exists"
        raise ConfigError(f"offload.disk_dir={offload.disk_dir} must be a folder that {what}; make it one, or name another")


def show_bytes(size: float) -> str:
    """A number of bytes in the unit one would say it in."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < KB:
            return f"{size:.0f} {unit}"
        size /= KB
    return f"{size:.1f} GiB"


def _key(offload: Offload, tier: str) -> str:
    """The key that sets a tier's size."""
    return f"offload.{tier}_{'tok' if getattr(offload, f'{tier}_bytes') is None else 'bytes'}"


def _named(offload: Offload, tier: str) -> str:
    """That key with its value."""
    key = _key(offload, tier)
    return f"{key}={getattr(offload, key.removeprefix('offload.'))}"


def _contexts(context_tok: int, rows: int) -> str:
    return f"a context of {context_tok} tokens" if rows == 1 else f"{rows} contexts (task.batch) of {context_tok} tokens"
