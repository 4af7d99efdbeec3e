"""The steps of the guideline: recipes in the order of their price, each whole and repeatable.

Hu, Zeng, Wu 2023, "Bag of Tricks with Quantized Convolutional Neural Networks for Image
Classification" (arXiv 2303.07080) quantize to 8 bits without training first, train only for fewer
bits, and prune behind that. Where this differs: between the two stand, below 8 bits, bits of each
layer's own and learned rounding, and a few layers at more bits, which all cost less than training.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qat_tricks.errors import QatTricksError
from qat_tricks.settings.ranges import NOT_NEGATIVE, Range, between, check_ranges

SHARE = Range(lambda value: 0 < value < 1, "a share between 0 and 1, such as 0.5")
PRUNING_STEPS = 3  # from no pruning to what was asked for
SENSITIVE_SHARE = 0.1  # of the convs and linears gets more bits, at least one


@dataclass(frozen=True, kw_only=True)
class GuidelineSettings:
    """What the guideline aims at.

    Raises:
        QatTricksError: a value that is not allowed, or two that exclude each other.
    """

    budget: float = 0.5  # points of accuracy that may be lost
    weight_bits: int = 8
    activation_bits: int = 8
    sparsity: float | None = None  # share of zeros to prune to, by steps
    latency: float | None = None  # share of the int8 file's latency to remove channels to, by steps

    def __post_init__(self) -> None:
        bits, share = between(2, 8), SHARE.or_null()
        check_ranges(
            self,
            budget=NOT_NEGATIVE,
            weight_bits=bits,
            activation_bits=bits,
            sparsity=share,
            latency=share,
        )
        if self.sparsity is not None and self.latency is not None:
            raise QatTricksError(
                f"sparsity={self.sparsity} and latency={self.latency} exclude each other: zeros "
                "make no file faster, and channels that are removed leave none; give one of them"
            )
        if self.latency is not None and not self.is_int8:
            raise QatTricksError(
                f"latency={self.latency} with weight_bits={self.weight_bits} and activation_bits="
                f"{self.activation_bits} is not allowed: fewer than 8 bits run no faster in ONNX "
                "Runtime; leave both at 8"
            )

    @property
    def is_int8(self) -> bool:
        """Whether all is quantized to 8 bits."""
        return self.weight_bits == self.activation_bits == 8


@dataclass(frozen=True, kw_only=True)
class Step:
    """A recipe to try, with what it does in a few words."""

    name: str
    does: str
    recipe: str
    overrides: tuple[str, ...] = ()
    # Of convs and linears that the step before is most sensitive to, a few get more bits: which
    # ones is known when that step has been tried.
    spares_sensitive: bool = False

    @property
    def command(self) -> str:
        """The arguments that run this step alone."""
        inside = [_in_command(override) for override in self.overrides]
        return shlex.join([f"recipe={self.recipe}", *inside])


def quality_steps(settings: GuidelineSettings) -> list[Step]:
    """The steps to come within the budget, the cheapest first.

    Two are none at 8 bits: bits of each layer's own, for there are no more to give, and learned
    rounding, which leaves the weights as they are.
    """
    int8 = settings.is_int8
    ptq, qat = ("int8_ptq", "int8_qat") if int8 else ("w4a8_ptq", _trained(settings))
    bits = () if int8 else _bits(settings)
    more = "stay in float" if int8 else "have 8 bits"
    distill, trick = "stages.qat.tricks.distill", "+trick@stages"
    rounding = () if int8 else (f"{trick}.ptq.tricks=learned_rounding",)
    # The recipes below 8 bits have a teacher already, the one of 8 bits has none.
    alone, taught = ((), (f"{trick}.qat.tricks=distill",)) if int8 else ((f"~{distill}",), ())
    steps = [Step(name="ptq", does="quantize without training", recipe=ptq, overrides=bits)]
    if not int8:
        steps += [
            Step(
                name="mixed_bits",
                does="each layer gets bits of its own at the same cost",
                recipe="mixed_w4a4_ptq" if settings.activation_bits < 8 else "mixed_w4a8_ptq",
                overrides=bits,
            ),
            Step(
                name="learned_rounding",
                does="learn the rounding of each weight",
                recipe=ptq,
                overrides=(*bits, *rounding),
            ),
        ]
    return [
        *steps,
        Step(
            name="sensitive_layers",
            does=f"the most sensitive layers {more}",
            recipe=ptq,
            overrides=(*bits, *rounding),
            spares_sensitive=True,
        ),
        Step(name="qat", does="fine-tune with fake-quant", recipe=qat, overrides=(*bits, *alone)),
        Step(
            name="qat_distill",
            does="fine-tune with the float network as teacher",
            recipe=qat,
            overrides=(*bits, *taught),
        ),
    ]


def pruning_steps(settings: GuidelineSettings) -> list[Step]:
    """The steps to what is to be pruned, the smallest first; none where nothing is to be."""
    shares = [index / PRUNING_STEPS for index in range(1, PRUNING_STEPS + 1)]
    if settings.latency is not None:
        latencies = [_short(1 - (1 - settings.latency) * share) for share in shares]
        key = "stages.channels.tricks.prune_channels.share"
        return [
            Step(
                name=f"latency_{latency:g}",
                does=f"remove channels until {latency:g} of the latency is left",
                recipe="int8_latency",
                overrides=(f"{key}={latency}",),
            )
            for latency in latencies
        ]
    if settings.sparsity is None:
        return []
    sparsities = [_short(settings.sparsity * share) for share in shares]
    recipe, stage = (_trained(settings), "qat")
    others: tuple[str, ...] = (*_bits(settings), "+trick@stages.qat.tricks=prune")
    if settings.is_int8:  # there is a recipe that prunes
        recipe, stage, others = "int8_prune50", "prune_qat", ()
    return [
        Step(
            name=f"sparsity_{sparsity:g}",
            does=f"prune {sparsity:g} of the weights while fine-tuning",
            recipe=recipe,
            overrides=(*others, f"stages.{stage}.tricks.prune.sparsity={sparsity}"),
        )
        for sparsity in sparsities
    ]


def _short(share: float) -> float:
    """A share in four digits, which tell the steps apart."""
    return float(f"{share:.4g}")


def sparing(step: Step, layers: Sequence[str]) -> Step:
    """``step`` with ``layers`` in float at 8 bits, and at 8 bits below."""
    quantize = "stages.ptq.tricks.quantize"
    if step.recipe == "int8_ptq":
        names = ",".join(json.dumps(name) for name in layers)  # a name may be a number
        override = f"{quantize}.exclude=[{names}]"
    else:
        bits = "{weight_bits:8,activation_bits:8}"
        override = f"++{quantize}.overrides={{{','.join(f'{name}:{bits}' for name in layers)}}}"
    return replace(step, overrides=(*step.overrides, override), spares_sensitive=False)


def _trained(settings: GuidelineSettings) -> str:
    """The recipe that trains with about these bits."""
    if settings.weight_bits == 2:
        return "w2a4_qat"
    if settings.weight_bits == 3:
        return "w3a3_qat"
    return "w4a4_qat" if settings.activation_bits < 8 else "w4a8_qat"


def _bits(settings: GuidelineSettings) -> tuple[str, ...]:
    return tuple(
        f"stages.ptq.tricks.quantize.{name}={getattr(settings, name)}"
        for name in ("weight_bits", "activation_bits")
    )


def _in_command(override: str) -> str:
    mark = override[: len(override) - len(override.lstrip("+~"))]
    key = override[len(mark) :]
    if key.startswith("trick@"):
        return f"{mark}{key.replace('@', '@recipe.', 1)}"
    return f"{mark}recipe.{key}"
