import dataclasses
import errno
import sys

import pytest

from hipexp.config.compose import compose
from hipexp.config.offload import Room
from hipexp.config.schema import ConfigError, Offload
from hipexp.run import point, room
from hipexp.run.ledger import RunFailed
from hipexp.run.point import check_point, execute
from hipexp.run.room import on_disk_tier, weights_bytes
from hipexp.run.several import load_once


def test_a_context_without_room_is_refused_before_weights_load(fake, offloaded, monkeypatch):
    monkeypatch.setattr(point, "load_model", lambda model: pytest.fail("loaded"))
    limited = Offload("host", device_tok=16384, host_tok=512)
    with pytest.raises(ConfigError, match=r"a context of 600 tokens must fit, but offload\.host_tok=512 has room for 512 tokens"):
        execute(offloaded(limited))
    limited = Offload("host", device_tok=2048, host_tok=512)
    with pytest.raises(ConfigError, match=r"a context of 1024 tokens must fit"):
        execute(offloaded(limited, name="latency", lengths_tok=[600, 1024], decode_steps=4))
    with pytest.raises(ConfigError, match=r"offload\.device_tok=1000 must hold"):
        execute(offloaded(Offload("host", device_tok=1000)))
    assert fake.calls == 0


def test_limits_are_refused_before_the_first_point_of_a_sweep(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    words = ["+pipeline=3stage", "task=passkey", "task.lengths_tok=[8192,16384]", "offload=host"]
    check_point(compose(words))
    with pytest.raises(ConfigError, match=r"a context of 16384 tokens must fit, but offload\.host_tok=16000 has room for 16000 tokens"):
        check_point(compose([*words, "offload.host_tok=16000"]))


def test_a_model_that_is_loaded_already_is_told_too(fake, offloaded):
    with pytest.raises(ConfigError, match=r"offload\.host_tok=512 has room"):
        execute(offloaded(Offload("host", device_tok=16384, host_tok=512)), load=load_once())


def test_room_is_what_the_device_and_the_weights_leave(fake, offloaded, model_folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (model_folder / "model.safetensors").write_bytes(b"0" * 1000)
    one = offloaded(Offload("host", device_tok=2048), length_tok=6400, subtasks=["passkey"], samples=1, batch=1)
    token = 5 * 2 * 2 * 64 * 4
    assert weights_bytes(one.model) == 1000
    taken = []
    monkeypatch.setattr(room, "room_for", lambda offload, bytes_: taken.append(bytes_) or Room(6400 * token, None))
    execute(one)
    assert taken == [1000 + 2048 * token]
    monkeypatch.setattr(room, "room_for", lambda offload, bytes_: Room(6400 * token - 1, None))
    with pytest.raises(ConfigError, match=r"a context of 6400 tokens must fit"):
        execute(dataclasses.replace(one, seed=1))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(room, "room_for", lambda offload, bytes_: taken.append(bytes_) or Room(6400 * token, None))
    execute(dataclasses.replace(one, seed=2))
    assert taken[1:] == [0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_what_a_disk_tier_is_refused_needs_no_traceback(number):
    with pytest.raises(RunFailed, match=r"^the disk tier is full; name another; finished samples are kept$"), on_disk_tier():
        raise OSError(number, "the disk tier is full; name another")
    with pytest.raises(FileNotFoundError), on_disk_tier():
        raise OSError(errno.ENOENT, "not of a disk tier")
