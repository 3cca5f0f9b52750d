"""A model split over processes by transformers' plan (tensor parallelism): who they are, and what all of them have to agree on."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hipexp.config.processes import started
from hipexp.config.schema import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

COMPUTING, WAITING = timedelta(minutes=30), timedelta(days=30)  # longest wait for another process: in a forward pass, between runs


def join() -> ProcessGroup:
    """Meet the processes that torchrun started; returns a group for what is told on the CPU, which waits as long as it has to.

    All but the first are quiet from then on. Raises ConfigError where there are more processes than GPUs.
    """
    mine, gpus = started(), torch.cuda.device_count()
    if gpus and mine.local >= gpus:
        raise ConfigError(
            f"torchrun started more processes here than there are GPUs, of which each needs one; this machine has {gpus}, "
            f"use --nproc-per-node {gpus}"
        )
    if gpus:
        torch.cuda.set_device(mine.local)
    if not dist.is_initialized():
        device = {"device_id": torch.device("cuda", mine.local)} if gpus else {}
        dist.init_process_group("nccl" if gpus else "gloo", timeout=COMPUTING, **device)
    if mine.number:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    return dist.new_group(backend="gloo", timeout=WAITING)


def leave() -> None:
    """The processes have done what they were to do."""
    dist.destroy_process_group()


def processes_of(model: PreTrainedModel) -> ProcessGroup | None:
    """The processes over which a model is split; None: it is whole here."""
    config, mesh = getattr(model.config, "distributed_config", None), getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(config, "tp_size", None) or 1) == 1:
        return None
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()


def sharing_heads(model: PreTrainedModel) -> ProcessGroup | None:
    """The processes of which each has some of the heads of a layer; None: all heads are here, whether the model is split or not.

    Raises ConfigError if heads do not divide.
    """
    processes = processes_of(model)
    if processes is None or not splits_heads(model.tp_plan):
        return None
    check_heads(model.config, processes.size())
    return processes


def splits_heads(plan: dict[str, str] | None) -> bool:
    """Whether a plan of transformers gives every process some heads; under some, as that of Phi-3, each computes all of them."""
    return any("self_attn." in name and style == "colwise" for name, style in (plan or {}).items())


def check_plan(config: PreTrainedConfig, path: str) -> None:
    """Refuse to split a model for whose class transformers has no plan, or whose heads do not divide; raises ConfigError."""
    plan = config.get_text_config().base_model_tp_plan
    if not plan:
        raise ConfigError(
            f"model.tp_plan=auto needs a model for whose class transformers {transformers.__version__} has a plan, and for "
            f"{config.model_type!r} (model.path={path}) it has none; use model.device_map=auto instead"
        )
    if splits_heads(plan):
        check_heads(config, started().count)


def check_heads(config: PreTrainedConfig, count: int) -> None:
    """Refuse to give ``count`` processes different numbers of heads; raises ConfigError."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % count or kv_heads % count:
        most = math.gcd(heads, kv_heads)
        fits = [str(n) for n in range(2, most + 1) if most % n == 0]
        repair = f"use {' or '.join(fits)} (torchrun --nproc-per-node {fits[-1]})" if fits else "use model.device_map=auto instead"
        raise ConfigError(
            f"tp_plan=auto: {count} processes must each have as many of the {heads} heads and {kv_heads} key/value heads of model type "
            f"{config.model_type!r}, and {count} divides not both; {repair}"
        )


def note_of(model: PreTrainedModel) -> list[str]:
    """A line on how a model is split; none if it is not."""
    processes = processes_of(model)
    if processes is None:
        return []
    heads, n = model.config.get_text_config().num_attention_heads, processes.size()
    what = f"{heads // n} of {heads} heads" if sharing_heads(model) else f"all {heads} heads, the weights split"
    return [f"tensor parallel over {n} processes, each with {what}; memory and traffic are those of the first"]


def agreed(tokens: Tensor, processes: ProcessGroup | None) -> Tensor:
    """The tokens that the first process chose; they are written over ``tokens``."""
    if processes is not None:
        dist.broadcast(tokens, group=processes, group_src=0)
    return tokens


def anywhere(holds: bool, processes: ProcessGroup | None, device: torch.device) -> bool:
    """Whether something holds in one of the processes, the same answer in all of them."""
    if processes is None:
        return holds
    found = torch.tensor(int(holds), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=processes)
    return bool(found)


def lost(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def told(what: Any, group: ProcessGroup) -> Any:
    """What the first process hands over, to all of them."""
    box = [what]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]
