"""Whether keys and values of an offloaded run have room: refused before weights load, and told in words where a disk fails later."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from hipexp.config.model import ModelFacts
from hipexp.config.offload import Room, check_fits, room_for, sizes
from hipexp.config.schema import Experiment, Model
from hipexp.run.identity import WEIGHTS, config_path
from hipexp.run.ledger import RunFailed
from hipexp.suites import lengths_of
from hipexp.suites.sample import Suite

LOST = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a disk that is full, limits that are reached, a file that was cut


def check_room(experiment: Experiment, facts: ModelFacts, suite: Suite | None, loading_bytes: int = 0, room: Room | None = None) -> None:
    """Refuse a sample whose keys and values would not fit where the offload puts them. Raises ``ConfigError``.

    ``loading_bytes``: of weights that are still to come; ``room``: what there is, found out by default. Without a GPU the device's tier and
    the weights are in the same memory.
    """
    if not experiment.offload.on or experiment.pipeline is None:
        return
    task, plans = experiment.task, experiment.pipeline.plan(facts.layers)
    lengths = [item.length_tok for item in suite.items()] if suite else lengths_of(task, facts.trained_tok).values()
    if room is None:
        from torch import cuda

        device_bytes = task.batch * sizes(experiment.offload, plans, facts).device_bytes
        room = room_for(experiment.offload, 0 if cuda.is_available() else loading_bytes + device_bytes)
    check_fits(experiment.offload, plans, facts, max(lengths), task.batch, room)


def weights_bytes(model: Model) -> int:
    """Bytes of the files with a model's weights that are here."""
    return sum(path.stat().st_size for path in config_path(model).parent.glob("*") if path.suffix in WEIGHTS)


@contextmanager
def on_disk_tier() -> Iterator[None]:
    """Turn what a disk tier is refused inside the block into ``RunFailed``: it says itself what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in LOST:
            raise
        raise RunFailed(f"{error.strerror}; finished samples are kept") from error
