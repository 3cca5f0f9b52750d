"""Which RoPE strategy and how much of a shared budget each layer of a pipeline gets, from what was measured of it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hipexp.config.convert import to_plain
from hipexp.config.schema import LayerGroup, LayerPlan, Pipeline, PruneRope, RopeOverride, StageOverride, spans

# Those by true positions are all `native` within the trained length, so that nothing here could tell what they are beyond it.
STRATEGIES = (PruneRope.chunk_indexed, PruneRope.relative, PruneRope.infllm, PruneRope.none)
BUDGETS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 2)  # of the most that a layer of the base keeps in the end
EARLY = 3  # layers that the paper sets apart: `chunk_indexed`, twice the budget
SURE = 2  # standard errors by which another strategy has to be better than the base's
Choice = tuple[PruneRope | None, int]  # strategy (None: as the base has it) and tokens kept by the last stage


def planned(base: Pipeline, choices: Sequence[Choice | None], name: str = "") -> Pipeline:
    """``base`` with a choice for every layer (None: it stays), as groups behind its own; of those that then change nothing are left out."""
    last, layers = str(len(base.stages) - 1), dict[Choice, list[int]]()
    for layer, choice in enumerate(choices):
        if choice is not None:
            layers.setdefault(choice, []).append(layer)
    groups = {
        f"{rope.value if rope else 'final'}_{keep}": LayerGroup(spans(chosen), RopeOverride(rope), {last: StageOverride(keep_tok=keep)})
        for (rope, keep), chosen in layers.items()
    }
    own = {group: made for group, made in base.layers.items() if group not in groups}
    made = dataclasses.replace(base, name=name or base.name, layers=own | groups)
    for group in own:
        less = dataclasses.replace(made, layers={other: one for other, one in made.layers.items() if other != group})
        made = less if rules(less, len(choices)) == rules(made, len(choices)) else made
    return made


def rules(pipeline: Pipeline, n_layers: int) -> list[Any]:
    """What a pipeline does in each layer, whatever its groups are called."""
    return [dataclasses.replace(plan, groups=[]) for plan in pipeline.plan(n_layers)]


def strategies_of(base: Pipeline, n_layers: int) -> list[PruneRope | None]:
    """The strategy that all stages of a layer have in the base; None where they differ, or where it is none of ``STRATEGIES``."""
    ropes = [{stage.rope for stage in plan.stages} for plan in base.plan(n_layers)]
    return [next(iter(found)) if len(found) == 1 and found <= set(STRATEGIES) else None for found in ropes]


def budgets_of(plans: Sequence[LayerPlan], step_tok: int) -> list[int]:
    """What the last stage is tried to keep: parts of the most in the base's ``plans``, and what these keep, in whole ``step_tok``."""
    own = {plan.stages[-1].keep_tok for plan in plans}
    limit = min((plan.stages[-2].keep_tok for plan in plans if len(plan.stages) > 1), default=2 * max(own))
    tried = {max(1, int(max(own) * part) // step_tok) * step_tok for part in BUDGETS}
    return sorted(own | {keep for keep in tried if keep <= limit})


def fits(pipeline: Pipeline, n_layers: int) -> bool:
    """Whether no last stage is to keep more than the one before it."""
    return all(plan.stages[-1].keep_tok <= plan.stages[-2].keep_tok for plan in pipeline.plan(n_layers) if len(plan.stages) > 1)


def shared_out(total_tok: int, weights: Sequence[int], step_tok: int) -> list[int]:
    """Keeps in proportion to ``weights``, in whole ``step_tok``, whose sum is ``total_tok``; what is left over goes to the first layers."""
    units = total_tok // step_tok
    keeps = [units * weight // sum(weights) for weight in weights]
    left = units - sum(keeps)
    return [(keep + (layer < left)) * step_tok for layer, keep in enumerate(keeps)]


def allocate(curves: Sequence[Mapping[int, float]], total_tok: int) -> list[int]:
    """Keeps of every layer with the least sum of missing mass, together ``total_tok``; ``curves``: the missing mass of a layer by its keep.

    Every layer begins with the least that was measured, and each further token goes where it gains the most, along the lower convex hull
    of the curves (so that a flat part before a steep one hides nothing), linear between what was measured.
    """
    keeps, gains = [min(curve) for curve in curves], []
    for layer, curve in enumerate(curves):
        hull: list[tuple[int, float]] = []
        for keep, missing in sorted(curve.items()):
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (keep, missing)):
                hull.pop()
            hull.append((keep, missing))
        gains += [(_slope(a, b), layer, b[0] - a[0]) for a, b in pairwise(hull)]
    left = total_tok - sum(keeps)
    for _, layer, size in sorted(gains):
        keeps[layer] += min(size, left)
        left -= min(size, left)
    return keeps


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def strategy_of(curves: Mapping[PruneRope | None, Sequence[float]], own: PruneRope | None) -> PruneRope | None:
    """The strategy of the best mean recall; ``curves``: recall by text. The base's ``own`` stays unless another is surely better,
    which one text alone cannot tell."""
    best = max(curves, key=lambda one: statistics.fmean(curves[one]))
    gains = [a - b for a, b in zip(curves[best], curves[own], strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
    return best if statistics.fmean(gains) > SURE * error else own


def yaml_of(pipeline: Pipeline, lines: Sequence[str]) -> str:
    """A pipeline as a file that ``+pipeline=<path>`` takes, under comment ``lines``; what it leaves as it is by default is left out."""
    import yaml

    plain = {"method": pipeline.method} | _said(to_plain(pipeline), to_plain(Pipeline(pipeline.name)))
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=140)


def _said(value: Any, default: Any = None) -> Any:
    """What of plain data is said: neither nothing nor, in the outermost dictionary, the default."""
    if isinstance(value, list):
        return [_said(one) for one in value]
    if not isinstance(value, dict):
        return value
    said = {key: _said(one) for key, one in value.items() if default is None or one != default[key]}
    return {key: one for key, one in said.items() if one is not None and one != {}}
