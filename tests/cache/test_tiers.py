"""Pages in host memory and on disk: what is read is what was written, and what goes wrong is said."""

import errno
import gc
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.cache import tiers as module
from hipexp.cache.tiers import Disk, Moved, Tiers, as_kept
from hipexp.config.schema import ConfigError, page_bytes
from triton_device import needs_gpu

FORMATS = ("auto", "bf16", "fp8", "int8", "int4")
PAGE = 2 * 2 * page_bytes("auto", 64, 8, 4)  # of what ``made`` makes


def made(disk, host_pages=0, format="auto", **options):
    sizes = {"kv_heads": 2, "head_dim": 8, "page_tok": 64, "unit_tok": 8, "dtype": torch.float32} | options
    return Tiers(**sizes, format=format, host_pages=host_pages, disk=disk)


def pages(n, seed=0, kv_heads=2, head_dim=8, page_tok=64, dtype=torch.float32):
    """Keys and values ``[K, n * page_tok, D]``."""
    made = torch.randn(2, kv_heads, n * page_tok, head_dim, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).unbind(0)


def everything(store, which=0):
    """All that was written ``[K, T, D]``, read unit by unit."""
    K, page_tok, D = store._shape
    units, _ = store.read(which, torch.arange(store.pages * page_tok // store._unit_tok))
    return units.transpose(0, 1).reshape(K, -1, D)


def open_files():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def resident(what="VmRSS"):
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(what))


@contextmanager
def largest_file(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return Disk(tmp_path_factory.mktemp("disk"))


@settings(max_examples=80)
@given(data=st.data())
def test_what_is_read_is_the_round_trip_of_what_was_written(disk, data):
    draw = data.draw
    unit_tok = draw(st.sampled_from([8, 32, 64]))
    sizes = {
        "kv_heads": draw(st.integers(1, 4)),
        "head_dim": draw(st.sampled_from([8, 64, 80])),
        "page_tok": unit_tok * draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    }
    writes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    host_pages = draw(st.one_of(st.none(), st.integers(0, sum(writes))))
    format = draw(st.sampled_from(FORMATS))
    store = made(disk, host_pages, format, unit_tok=unit_tok, expect_pages=draw(st.integers(0, 20)), **sizes)
    parts = [pages(n, seed, **sizes) for seed, n in enumerate(writes)]
    of_a_page = page_bytes(format, sizes["page_tok"], sizes["head_dim"], sizes["dtype"].itemsize)
    moved = [store.write(*part) for part in parts]
    assert sum(m.link_bytes for m in moved) == sum(writes) * 2 * sizes["kv_heads"] * of_a_page
    assert sum(m.disk_bytes for m in moved) == store.disk_bytes
    assert store.pages == sum(writes)

    per_page = sizes["page_tok"] // unit_tok
    units = torch.tensor(draw(st.lists(st.integers(0, store.pages * per_page - 1), max_size=30)), dtype=torch.long)
    head = torch.tensor(draw(st.lists(st.integers(0, sizes["kv_heads"] - 1), min_size=len(units), max_size=len(units))), dtype=torch.long)
    for which in (0, 1):
        seen = torch.cat([store.round_trip(part[which]) for part in parts], 1).unflatten(1, (-1, unit_tok)).transpose(0, 1)
        assert seen.dtype == sizes["dtype"]
        shared, all_moved = store.read(which, units)
        assert torch.equal(shared, seen[units]) and shared.dtype == sizes["dtype"]
        alone, one_moved = store.read(which, units, head)
        assert torch.equal(alone, seen[units, head][:, None])
        on_disk = int((units // per_page >= host_pages).sum()) if host_pages is not None else 0
        run_bytes = unit_tok * store.format.row_bytes
        assert one_moved == Moved(len(units) * run_bytes, on_disk * run_bytes)
        assert all_moved == tuple(sizes["kv_heads"] * n for n in one_moved)
        token = units * unit_tok + unit_tok // 3
        rows, rows_moved = store.read_rows(which, token, head)
        assert torch.equal(rows, seen[units, head, unit_tok // 3])
        assert rows_moved == tuple(n // unit_tok for n in one_moved)
    store.close()


@pytest.mark.parametrize("format", ["auto", "bf16"])
def test_lossless_formats_are_bit_equal_and_the_round_trip_costs_nothing(disk, format):
    store, (k, v) = made(disk, 1, format, dtype=torch.bfloat16), pages(3, dtype=torch.bfloat16)
    k[0, 0, 0] = float("nan")
    store.write(k, v)
    assert store.round_trip(k) is k
    assert torch.equal(everything(store).view(torch.int16), k.view(torch.int16))
    assert torch.equal(everything(store, 1).view(torch.int16), v.view(torch.int16))


def test_many_pages_are_packed_in_parts_and_the_file_is_mapped_anew(disk, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 3 * PAGE)
    store, parts = made(disk, 5, "fp8"), [pages(n, n) for n in (8, 1, 11)]
    for part in parts:
        store.write(*part)
        assert torch.equal(everything(store)[:, -part[0].shape[1] :], store.round_trip(part[0]))
    assert torch.equal(everything(store), torch.cat([store.round_trip(k) for k, _ in parts], 1))


def test_memory_is_taken_once_if_the_number_of_pages_is_told(disk):
    told, untold = made(None, None, expect_pages=40), made(None, None)
    rooms = set()
    for n in range(40):
        told.write(*pages(1))
        untold.write(*pages(1))
        rooms.add(untold.host_bytes)
        assert told.host_bytes == 40 * PAGE and n * PAGE < untold.host_bytes <= max(1.5 * n, n + 1) * PAGE
    assert len(rooms) < 12
    limited = made(disk, 10, expect_pages=40)
    limited.write(*pages(12))
    assert (limited.host_bytes, limited.disk_bytes) == (10 * PAGE, 2 * PAGE)


def test_both_modes_of_autograd_write_and_read(disk):
    store, parts = made(disk, 5, expect_pages=6), [pages(2, seed) for seed in range(3)]
    with torch.inference_mode():
        store.write(*parts[0])
        assert torch.equal(everything(store), parts[0][0])
    store.write(parts[1][0].requires_grad_(), parts[1][1])
    assert not everything(store).requires_grad
    with torch.inference_mode():
        store.write(*parts[2])
    assert torch.equal(everything(store), torch.cat([k for k, _ in parts], 1))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("host_pages", [None, 7])
@pytest.mark.parametrize("format", FORMATS)
def test_a_gpu_reads_what_was_written(disk, format, host_pages):
    """While memory grows under reads that may still be on their way, and once a part is on disk."""
    store, parts = made(disk, host_pages, format, device="cuda", head_dim=64), [pages(n, n, head_dim=64) for n in (1, 3, 9)]
    parts = [(k.cuda(), v.cuda()) for k, v in parts]
    kept = []
    for part in parts:
        store.write(*part)
        kept += [(everything(store, which), which) for which in (0, 1)]
    for found, which in kept:
        whole = torch.cat([store.round_trip(part[which]) for part in parts], 1)
        assert found.is_cuda and torch.equal(found, whole[:, : found.shape[1]])
    token, head = torch.tensor([0, 831, 77, 77], device="cuda"), torch.tensor([1, 0, 1, 0], device="cuda")
    rows, moved = store.read_rows(1, token, head)
    assert torch.equal(rows, whole[head, token]) and moved.link_bytes == 4 * store.format.row_bytes
    store.close()


@pytest.mark.parametrize("cut", [0, PAGE, 3 * PAGE - 1])
def test_a_file_that_was_cut_is_an_error(disk, cut):
    store = made(disk, 1)
    store.write(*pages(4))
    os.ftruncate(store._file.fileno(), cut)
    with pytest.raises(OSError, match=f"was cut to {cut} of {3 * PAGE} bytes"):
        store.read(0, torch.tensor([31]))
    with pytest.raises(OSError, match="was cut to"):
        store.write(*pages(1))
    os.ftruncate(store._file.fileno(), 0)
    store.close()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_and_what_was_written_stays(disk, monkeypatch):
    store, (k, v) = made(disk, 1), pages(4)
    store.write(k, v)
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"No space left on device; \d+ are free\); set offload.disk_dir") as caught,
    ):
        patch.setattr(os, "posix_fallocate", full)
        store.write(*pages(5))
    assert caught.value.errno == errno.ENOSPC and f"{disk.folder} could not take {5 * PAGE} bytes" in str(caught.value)
    assert store.pages == 4 and torch.equal(everything(store), k)
    store.write(k, v)
    assert torch.equal(everything(store, 1), torch.cat((v, v), 1))


def test_a_file_may_reach_a_real_limit_exactly(disk):
    store, (k, v) = made(disk, 1), pages(3)
    with largest_file(4 * PAGE):
        store.write(k, v)
        store.write(*pages(2))  # the room in advance does not fit, what is needed does
        with pytest.raises(OSError, match=f"could not take {PAGE} bytes more") as caught:
            store.write(*pages(1))
    assert caught.value.errno == errno.EFBIG
    assert torch.equal(everything(store)[:, : 3 * 64], k) and store.pages == 5


def test_a_disk_that_fails_while_it_is_written_to_leaves_the_pages_before(disk, monkeypatch):
    store, (k, v) = made(disk, 0, "fp8"), pages(2)
    store.write(k, v)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="could not take"):
        patch.setattr(os, "pwrite", full)
        store.write(*pages(2, 1))
    assert store.pages == 2 and store.disk_bytes == 2 * PAGE // 4
    store.write(v, k)
    assert torch.equal(everything(store), torch.cat((store.round_trip(k), store.round_trip(v)), 1))


def test_short_writes_are_continued(disk, monkeypatch):
    store, (k, v), whole = made(disk), pages(2), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, rows, at: whole(fd, rows[:1000], at))
    store.write(k, v)
    assert torch.equal(everything(store), k) and torch.equal(everything(store, 1), v)


def test_the_limit_is_over_all_files_and_space_comes_back(tmp_path):
    disk = Disk(tmp_path, 5 * PAGE)
    first, second = made(disk), made(disk, 1)
    first.write(*pages(3))
    second.write(*pages(3))
    assert disk.bytes == 5 * PAGE
    with pytest.raises(
        OSError,
        match=f"holds {5 * PAGE} bytes and may hold {5 * PAGE}: {PAGE} more do not fit; raise offload.disk_bytes or offload.disk_tok",
    ):
        second.write(*pages(1))
    assert second.pages == 3 and torch.equal(everything(second), pages(3)[0])
    first.close()
    second.write(*pages(3))
    del first, second
    gc.collect()
    assert disk.bytes == 0


def test_no_tier_left(disk):
    store = made(None, 2)
    store.write(*pages(1))
    with pytest.raises(
        MemoryError, match=r"may hold 2 pages of 64 tokens of a layer, and there is no disk tier for 1 more; make offload.host_tok"
    ):
        store.write(*pages(2))
    assert store.pages == 1


def test_host_memory_that_cannot_be_had(monkeypatch):
    store, (k, v) = made(None, None), pages(2)
    store.write(k, v)

    def refuse(shape, *_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with (
        monkeypatch.context() as patch,
        pytest.raises(MemoryError, match=f"could not get {5 * PAGE} bytes .* make offload.host_tok smaller"),
    ):
        patch.setattr(torch, "empty", refuse)
        store.write(*pages(3))
    assert store.pages == 2 and torch.equal(everything(store), k)


def test_numbers_that_a_format_refuses_leave_the_pages_before(disk, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", PAGE)
    store, (k, v), (worse, _) = made(disk, 1, "int8"), pages(2), pages(3)
    store.write(k, v)
    worse[1, -1, -1] = float("inf")
    with pytest.raises(FloatingPointError, match="cannot hold"):
        store.write(worse, worse)
    assert store.pages == 2 and torch.equal(everything(store), store.round_trip(k))
    store.write(v, k)
    assert torch.equal(everything(store, 1), torch.cat((store.round_trip(v), store.round_trip(k)), 1))


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(ConfigError, match=f"offload.disk_dir={folder} must be a folder"):
            Disk(folder)


def test_nothing_stays_in_the_folder_and_closing_frees_everything(tmp_path):
    files, disk = open_files(), Disk(tmp_path)
    store = made(disk, 2, "fp8")
    store.write(*pages(6))
    store.read(0, torch.tensor([0, 47]))
    assert open_files() > files and not list(tmp_path.iterdir())
    for _ in range(2):
        store.close()
        assert (store.host_bytes, store.disk_bytes, disk.bytes, open_files()) == (0, 0, 0, files)
    for use in (lambda: store.read(0, torch.tensor([0])), lambda: store.write(*pages(1)), lambda: store.round_trip(pages(1)[0])):
        with pytest.raises(ValueError, match="these tiers were closed"):
            use()


def test_wrong_arguments(disk):
    with pytest.raises(ValueError, match="unit_tok=24 must divide page_tok=64"):
        made(disk, unit_tok=24)
    store, (k, v) = made(disk, expect_pages=4), pages(2)
    store.write(k, v)
    for wrong in (k[:, :-1], k[:1], k.half(), k[..., :4], k[0]):
        with pytest.raises(ValueError, match="whole pages of 64 tokens"):
            store.write(wrong, wrong)
    with pytest.raises(ValueError, match="whole pages of 64 tokens"):
        store.write(k, v[:, :64])
    for which, unit in ((0, 16), (0, -1), (2, 0)):
        with pytest.raises(ValueError, match="no others were written"):
            store.read(which, torch.tensor([unit]))
    for head in ([2], [-1], [0, 0]):
        with pytest.raises(ValueError, match="must name one of 2 heads"):
            store.read(0, torch.tensor([0]), torch.tensor(head))


def test_mapped_pages_do_not_pile_up(disk, monkeypatch):
    monkeypatch.setattr(module, "TOUCHED_BYTES", 4 << 20)
    k, v = (x.contiguous() for x in pages(128, head_dim=64))  # 8 MB
    store = made(disk, head_dim=64)
    for _ in range(4):
        store.write(k, v)
    before = resident("RssFile")
    for first in range(0, store.pages * 8, 16):
        store.read(0, torch.arange(first, first + 16))
    assert resident("RssFile") - before < 8 << 20 < store.disk_bytes


def test_memory_and_files_go_back_over_many_stores(disk):
    def use():
        store, (k, v) = made(disk, 8, head_dim=64), pages(32, head_dim=64)
        store.write(k, v)
        everything(store)
        store.close()

    use()
    before, files = resident(), open_files()
    for _ in range(60):  # 150 MB of pages
        use()
    assert resident() - before < 16 << 20 and open_files() == files


@pytest.mark.parametrize("format", ["auto", "fp8", "int4"])
def test_what_readers_see_is_rounded_but_for_sinks_and_the_last_page(format):
    k = torch.randn(2, 150, 8, generator=torch.Generator().manual_seed(3))
    kept = as_kept(k, format, 64, sink_tok=24)
    assert torch.equal(kept[:, :24], k[:, :24]) and torch.equal(kept[:, 128:], k[:, 128:])
    store = made(None, None, format, kv_heads=2, head_dim=8, page_tok=64, unit_tok=8, dtype=torch.float32)
    assert torch.equal(kept[:, 24:128], store.round_trip(k[:, :128])[:, 24:])
    assert torch.equal(kept, k) == (format == "auto")
