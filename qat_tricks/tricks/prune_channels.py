"""Remove channels for real: layers become narrower, and run faster on any runtime.

Which channels stand or fall together is read off the graph (``graph.channel_labels``). Those with
the lowest score go (``graph.channel_scores``), from the groups where they are missed least
(``graph.channel_plan``), until the network meets a budget of MACs, of parameters, or of latency as
ONNX Runtime measures it. The weights that stay are fitted anew to what each layer computed before,
by least squares on its inputs, as in He et al. 2017, "Channel Pruning for Accelerating Very Deep
Neural Networks" (arXiv 1707.06168), equation 1.

Where this differs: channels are first masked, which changes the network's function, and then
removed, which must not: the equivalence gate compares the two. And the weights follow the output of
the layer as it was, on its inputs as they were, so that one pass over the images serves all layers.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.channel_check import sound_channels
from qat_tricks.graph.channel_errors import (
    lowest_first,
    measured_errors,
    summed_errors,
)
from qat_tricks.graph.channel_groups import ChannelGroup, Channels, find_channels
from qat_tricks.graph.channel_plan import (
    ChannelCosts,
    Cost,
    Errors,
    Kept,
    Steps,
    largest_share,
    plan_alike,
    plan_by_errors,
)
from qat_tricks.graph.channel_removal import mask_channels, read_masks, remove_channels
from qat_tricks.graph.channel_scores import CRITERIA, score_channels
from qat_tricks.graph.hessians import input_hessians
from qat_tricks.graph.inputs import Inputs, as_tensors, check_batches, first_images, first_of_all
from qat_tricks.graph.nodes import modules_before_logits
from qat_tricks.graph.patterns import check_patterns, matches
from qat_tricks.graph.processes import from_rank_zero
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.submodules import layer_at
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import Bar
from qat_tricks.trainer.trick import Trick, check_num_images
from qat_tricks.tricks.calibrate import Calibrate
from qat_tricks.tricks.fold_batchnorm import FoldBatchnorm
from qat_tricks.tricks.quantize import Quantize

BUDGETS = ("macs", "parameters", "latency")
SCOPES = ("layer", "global", "sensitivity")
TRIAL_IMAGES = 64  # on which groups are measured, and files are calibrated for their latency
TRIALS = 5  # networks that are timed to meet a latency
NEAR = 0.03  # of the latency asked for: no need to come nearer
SECONDS = 4.0  # for the timing of one network


@dataclass(frozen=True, kw_only=True)
class ChannelSettings:
    """How channels are chosen; the fields are described in ``conf/trick/prune_channels.yaml``."""

    budget: str = "macs"
    share: float = 0.5
    latency_ms: float | None = None
    criterion: str = "taylor"
    scope: str = "global"
    multiple: int = 16
    least: float = 0.1
    refit: bool = True
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    batch_size: int = 1
    threads: int = 2

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r} is not allowed: {did_you_mean(str(value), allowed)}"
            for name, value, allowed in (
                ("budget", self.budget, BUDGETS),
                ("criterion", self.criterion, CRITERIA),
                ("scope", self.scope, SCOPES),
            )
            if value not in allowed
        ]
        if not 0 < self.share <= 1:
            problems.append(f"share={self.share} is not allowed: give a share above 0 and up to 1")
        if not 0 <= self.least < 1:
            problems.append(f"least={self.least} is not allowed: give a share from 0 to below 1")
        # Larger ones end in a traceback of ONNX Runtime or NumPy.
        for name, most in (("multiple", 4096), ("batch_size", 4096), ("threads", 1024)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                problems.append(f"{name}={value!r} is not allowed: give 1 to {most}")
        if self.latency_ms is not None:
            if not 0 < self.latency_ms < math.inf:
                problems.append(f"latency_ms={self.latency_ms} is not allowed: give more than 0")
            if self.budget != "latency":
                problems.append(f"latency_ms is for budget=latency, and budget is {self.budget}")
        if problems:
            raise QatTricksError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which channels go."""

    channels: Channels
    removed: frozenset[int]  # labels of units
    hessians: Mapping[str, Tensor]  # of the inputs of the layers that are fitted anew
    # For the spec: figures before and after, and the channels of each group.
    entry: Mapping[str, Any]


def prune_channels(
    traced: fx.GraphModule, batches: Sequence[Inputs], **settings: Any
) -> dict[str, Any]:
    """Removes channels of ``traced``, in place.

    Args:
        traced: a traced float network, with its BatchNorms not folded.
        batches: the network's inputs, a batch each.
        settings: fields of ``ChannelSettings``.

    Returns:
        What was removed, as the spec has it under ``channels``.

    Raises:
        QatTricksError: a setting that is not allowed, a network that is folded or quantized, no
            batches, no channels that can be removed, or a budget that cannot be met.
    """
    plan = plan_channels(traced, batches, ChannelSettings(**settings))
    mask_channels(traced, plan.channels, plan.removed, plan.hessians)
    remove_planned(traced, plan)
    return dict(spec_of(traced)["channels"])


@torch.no_grad()
def plan_channels(
    traced: fx.GraphModule, batches: Sequence[Inputs], settings: ChannelSettings
) -> Plan:
    """Chooses the channels that go; ``traced`` stays as it is. See ``prune_channels``."""
    check_batches(batches, "to choose channels on")
    _check_float(traced)
    chooser = _Chooser(traced, batches, settings)
    costs, earlier = chooser.costs, spec_of(traced).get("channels", {})
    timed: dict[str, Any] = {}
    if settings.budget == "latency":
        kept, milliseconds = chooser.meet_latency(batches)
        timed["latency_ms"] = milliseconds
    else:
        cost: Cost = getattr(costs, settings.budget)
        # Of the user's network, also where an earlier stage has removed channels.
        whole = earlier.get(settings.budget, [cost(costs.all)])[0]
        kept = chooser.keep(cost, settings.share * whole)
    entry = {
        **{
            name: [earlier.get(name, [cost(costs.all)])[0], cost(kept)]
            for name, cost in (("macs", costs.macs), ("parameters", costs.parameters))
        },
        **timed,
        "groups": [
            {
                "name": group.name,
                "channels": [len(group.units) * group.channels, count * group.channels],
            }
            for group, count in zip(chooser.channels.groups, kept.tolist(), strict=True)
        ],
        "fixed": dict(chooser.channels.fixed),
    }
    removed, entry = from_rank_zero((chooser.removed(kept), entry))
    return Plan(
        channels=chooser.channels,
        removed=removed,
        hessians=chooser.hessians() if settings.refit else {},
        entry=entry,
    )


class _Chooser:
    """Chooses channels for a budget.

    Args:
        traced: the network with all of them.
        batches: of its inputs.
        settings: by which to choose.
    """

    def __init__(
        self, traced: fx.GraphModule, batches: Sequence[Inputs], settings: ChannelSettings
    ) -> None:
        self.traced, self.settings = traced, settings
        channels = sound_channels(traced, find_channels(traced, batches[0]), batches[0])
        groups = _chosen(traced, channels, settings.include, settings.exclude)
        self.channels = replace(channels, groups=groups)
        self.costs = ChannelCosts(traced, self.channels, batches[0])
        self.hessians = cache(partial(_hessians, traced, self.channels, batches))
        scores = score_channels(traced, self.channels, settings.criterion, batches, self.hessians)
        self._order = [lowest_first(group, scores) for group in groups]
        self._errors: Errors | None = None  # None: all groups are treated alike
        if settings.scope == "global":
            self._errors = summed_errors(groups, scores)
        elif settings.scope == "sensitivity":
            few = first_of_all(batches, TRIAL_IMAGES)
            fitted = self.hessians() if settings.refit else {}
            self._errors = measured_errors(traced, self.channels, scores, few, fitted)

    def keep(self, cost: Cost, budget: float) -> Kept:
        """How many units of each group stay, so that they cost no more than ``budget``."""
        steps = Steps(multiple=self.settings.multiple, least=self.settings.least)
        if self._errors is None:
            return plan_alike(self.channels.groups, steps, cost, budget)
        return plan_by_errors(self.channels.groups, self._errors, steps, cost, budget)

    def removed(self, kept: Kept) -> frozenset[int]:
        """The units that go: of each group those with the lowest scores."""
        return frozenset(
            unit
            for units, count in zip(self._order, kept.tolist(), strict=True)
            for unit in units[: len(units) - count]
        )

    def meet_latency(self, batches: Sequence[Inputs]) -> tuple[Kept, list[float]]:
        """What stays, and the milliseconds of the int8 files with all channels and with those."""
        with tempfile.TemporaryDirectory() as folder:
            stopwatch = _Stopwatch(self.traced, self.channels, batches, self.settings, folder)
            # Where the time goes is measured; what a narrower layer takes is thought, and tried.
            cost = self.costs.times(stopwatch.layer_times())
            whole = cost(self.costs.all)
            kept = _meet_latency(
                stopwatch, lambda share: self.keep(cost, share * whole), self.removed
            )
            stopwatch.excess(self.removed(kept))
        return kept, [stopwatch.times["dense"], stopwatch.times["pruned"]]


def _hessians(
    traced: fx.GraphModule, channels: Channels, batches: Sequence[Inputs]
) -> Mapping[str, Tensor]:
    """Of the inputs of all layers that may lose some."""
    read = read_masks(traced, channels, channels.units)
    return input_hessians(traced, {name: layer_at(traced, name) for name in read}, batches)


def remove_planned(traced: fx.GraphModule, plan: Plan) -> None:
    """Removes the channels of a plan, which are masked already, and enters them in the spec.

    Args:
        traced: changed in place.
        plan: of it.
    """
    shapes = remove_channels(traced, plan.channels, plan.removed)
    earlier = spec_of(traced).get("channels", {})
    spec_of(traced)["channels"] = {
        **plan.entry,
        "groups": _merged(earlier.get("groups", []), plan.entry["groups"]),
        "shapes": {**earlier.get("shapes", {}), **shapes},
    }


def _merged(earlier: Sequence[Any], now: Sequence[Any]) -> list[dict[str, Any]]:
    """The channels of each group, from the user's network on."""
    first = {group["name"]: group["channels"][0] for group in earlier}
    named = {group["name"] for group in now}
    return [
        *(group for group in earlier if group["name"] not in named),
        *(
            {
                **group,
                "channels": [first.get(group["name"], group["channels"][0]), group["channels"][1]],
            }
            for group in now
        ),
    ]


def _check_float(traced: fx.GraphModule) -> None:
    spec = spec_of(traced)
    done = [key for key in ("folded", "convs", "attached", "activations", "gated") if spec.get(key)]
    if done:
        raise QatTricksError(
            "channels can be removed from the float network only, and this one is folded or "
            "quantized: put prune_channels into a stage before"
        )


def _chosen(
    traced: fx.GraphModule, channels: Channels, include: Sequence[str], exclude: Sequence[str]
) -> list[ChannelGroup]:
    """The groups that the patterns leave; see ``ChannelSettings``.

    Those that the logits do not depend on stay: no score tells what they are worth.

    Raises:
        QatTricksError: a pattern matches no layer, or none whose channels can be removed.
    """
    members = {
        group.name: [
            name.removesuffix(".weight")
            for name, units in channels.rows.items()
            if set(group.units) & set(units.tolist())
        ]
        for group in channels.groups
    }
    names = sorted({*channels.columns, *(name for each in members.values() for name in each)})
    check_patterns([*include, *exclude], names)

    def one_matches(group: ChannelGroup, patterns: Sequence[str]) -> bool:
        return any(matches(name, patterns) for name in members[group.name])

    judged = modules_before_logits(traced)
    others = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"} - judged

    def is_judged(group: ChannelGroup) -> bool:
        names = members[group.name]
        return others.isdisjoint(names) or not judged.isdisjoint(names)

    chosen = [
        group
        for group in channels.groups
        if one_matches(group, include) and not one_matches(group, exclude) and is_judged(group)
    ]
    if not chosen:
        reasons = [
            f"{name}: {reason}" for name, reason in channels.fixed.items() if matches(name, include)
        ]
        raise QatTricksError(
            "no channels are left to remove"
            + (f" ({'; '.join(reasons[:3])})" if reasons else "")
            + ": widen include or narrow exclude, or leave prune_channels out"
        )
    return chosen


# Latency -----------------------------------------------------------------------------------------


class _Stopwatch:
    """Times the int8 files of a network with all of its channels, and with some of them.

    Args:
        traced: the network with all of them.
        channels: of it.
        batches: of its inputs.
        settings: the latency that is wanted.
        folder: for the files.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        channels: Channels,
        batches: Sequence[Inputs],
        settings: ChannelSettings,
        folder: str,
    ) -> None:
        self.traced, self.channels, self.settings = traced, channels, settings
        self.batches = first_of_all(batches, TRIAL_IMAGES)
        self.dense, self.pruned = Path(folder) / "dense.onnx", Path(folder) / "pruned.onnx"
        self.times: dict[str, float] = {}  # the last ones, milliseconds a batch
        self._measured: dict[frozenset[int], dict[str, float]] = {}
        _write_int8(traced, self.batches, self.dense)

    def layer_times(self) -> Mapping[str, float]:
        """Milliseconds a batch of each layer with all of its channels."""
        from qat_tricks.deploy.cost.profile import layer_times, profile_file

        profile = profile_file(
            self.dense,
            _shapes(self.batches[0]),
            batch_size=self.settings.batch_size,
            threads=self.settings.threads,
        )
        return layer_times(self.dense, profile)

    def excess(self, removed: Collection[int]) -> float:
        """The latency without ``removed``, as a share of what is wanted."""
        key = frozenset(removed)
        if key not in self._measured:  # what was tried is not written and timed once more
            pruned = copy.deepcopy(self.traced)
            mask_channels(pruned, self.channels, removed)
            remove_channels(pruned, self.channels, removed)
            _write_int8(pruned, self.batches, self.pruned)
            self._measured[key] = _milliseconds(
                {"dense": self.dense, "pruned": self.pruned}, self.batches[0], self.settings
            )
        self.times = self._measured[key]
        return self.times["pruned"] / self.wanted

    @property
    def wanted(self) -> float:
        """Milliseconds a batch."""
        return self.settings.latency_ms or self.settings.share * self.times["dense"]


def _meet_latency(
    stopwatch: _Stopwatch, keep: Callable[[float], Kept], goes: Callable[[Kept], Collection[int]]
) -> Kept:
    """Finds the share of the layers' time with which the file is as fast as is asked for.

    Args:
        stopwatch: of the network.
        keep: the channels that stay for a share; an error where it cannot be met.
        goes: the units that go with these.

    Raises:
        QatTricksError: no share is fast enough.
    """
    settings = stopwatch.settings
    bar = Bar("time networks", TRIALS)
    try:

        def excess(share: float) -> float:
            bar.advance()
            return stopwatch.excess(goes(keep(share)))

        share = largest_share(excess, start=settings.share, trials=TRIALS, near=NEAR)
    finally:
        bar.close()
    if share is None:
        raise QatTricksError(
            f"latency: the int8 network takes {stopwatch.times['pruned']:.3g} ms with the fewest "
            f"channels that were tried, and {stopwatch.wanted:.3g} ms were asked for: allow more "
            "time, or lower least or multiple"
        )
    return keep(share)


def _write_int8(traced: fx.GraphModule, batches: Sequence[Inputs], path: Path) -> None:
    """Writes the int8 file of a float network; how well it classifies does not matter."""
    from qat_tricks.deploy.export import export_onnx

    work = Workbench(copy.deepcopy(traced), lambda count: batches, compares=False)
    for trick in (FoldBatchnorm(), Quantize(), Calibrate(estimator="minmax")):
        trick.apply(work)
    example = first_images(batches[0], 1)
    export_onnx(work.network, path, example, min_top1_agreement=0.0, min_sqnr_db=-math.inf)


def _milliseconds(
    paths: Mapping[str, Path], inputs: Inputs, settings: ChannelSettings
) -> dict[str, float]:
    """The median latency of each file, timed in turn."""
    from qat_tricks.deploy.cost.latency import measure_latency

    times = measure_latency(
        paths,
        image_shape=_shapes(inputs),
        batch_size=settings.batch_size,
        threads=settings.threads,
        max_seconds=SECONDS,
    )
    return {name: of_file["p50"] for name, of_file in times.items()}


def _shapes(inputs: Inputs) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape[1:]) for tensor in as_tensors(inputs)]


class PruneChannels(Trick):
    """Callback of ``prune_channels``.

    Args:
        num_images: on which channels are scored, and weights fitted anew.
        settings: fields of ``ChannelSettings``.

    Raises:
        QatTricksError: a setting that is not allowed.
    """

    # The others say how well, or on what the latency is measured.
    decisive = frozenset(f.name for f in fields(ChannelSettings)) - {
        "refit",
        "batch_size",
        "threads",
    }

    def __init__(
        self,
        budget: str = "macs",
        share: float = 0.5,
        latency_ms: float | None = None,
        criterion: str = "taylor",
        scope: str = "global",
        multiple: int = 16,
        least: float = 0.1,
        refit: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        batch_size: int = 1,
        threads: int = 2,
        num_images: int = 256,
    ) -> None:
        super().__init__()
        self.num_images = check_num_images(num_images)
        # Made now, so that wrong settings are refused before anything is trained.
        self.settings = ChannelSettings(
            budget=budget,
            share=share,
            latency_ms=latency_ms,
            criterion=criterion,
            scope=scope,
            multiple=multiple,
            least=least,
            refit=refit,
            include=include,
            exclude=exclude,
            batch_size=batch_size,
            threads=threads,
        )

    def restructure(self, work: Workbench) -> None:
        """Removes channels as many as there will be; which of them does not matter."""
        plan = plan_channels(work.network, work.batches(2), self.settings)
        remove_planned(work.network, plan)

    def apply(self, work: Workbench) -> None:
        """Masks channels, which changes the function, and removes them, which does not."""
        batches = work.batches(self.num_images)
        plan = plan_channels(work.network, batches, self.settings)
        mask_channels(work.network, plan.channels, plan.removed, plan.hessians)
        work.note_change("channels masked")
        remove_planned(work.network, plan)
        # Dropout draws another pattern for fewer channels.
        work.check_function("channels removed", in_training=False)
