"""The settings of quantization: which layers, and with how many bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.numerics.scheme import ACTIVATIONS, MAX_BITS, MIN_BITS, is_bits

OVERRIDES = ("weight_bits", "activation_bits")
"""The settings that a pattern in ``overrides`` may change."""
FUNCTIONS = ("integer", "float")


class Limits(Protocol):
    """The limits of a runtime's kernels."""

    @property
    def max_weight_bits(self) -> int:
        """The most bits that weights may have."""

    @property
    def activations(self) -> Sequence[str]:
        """The kinds of activations that it takes, of ``scheme.ACTIVATIONS``; its choice first."""

    @property
    def activation_bits(self) -> int:
        """The fewest bits that activations may have."""

    @property
    def functions(self) -> str:
        """Its choice of ``FUNCTIONS``."""

    @property
    def because(self) -> str:
        """Why it takes no other activations, for the error."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """Which layers are quantized, and with how many bits.

    Patterns are names of convs and linears, with the wildcards of ``fnmatch``. A pattern that
    matches no layer is refused when quantizers are placed.

    Raises:
        QatTricksError: everything that is wrong with the values, in one message.
    """

    # Bits of the weights, and of the activations that convs and linears read, 2 to 8. Others, such
    # as a residual stream where it is added to, have 8.
    weight_bits: int = 8
    activation_bits: int = 8
    # Bits of the weights and inputs of the last layer, and of the first that each input of the
    # network reaches; None leaves them as the others.
    first_last_bits: int | None = 8
    # Patterns of the layers to quantize, and of those among them to leave in float.
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    # {pattern: {"weight_bits": …, "activation_bits": …}}; activation_bits is the layer's input's.
    overrides: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    # The kind of activations, of ``scheme.ACTIVATIONS``; None: the target's, or unsigned_affine.
    activations: str | None = None
    # "integer" splits SiLU and Hardswish into steps that have integer kernels, "float" leaves them
    # in float; None: the target's, or integer.
    functions: str | None = None

    def __post_init__(self) -> None:
        problems = [*self._problems_of_bits(), *self._problems_of_patterns()]
        if self.activations is not None and self.activations not in ACTIVATIONS:
            problems.append(
                f'activations="{self.activations}" is not supported: '
                f"{did_you_mean(str(self.activations), ACTIVATIONS)}"
            )
        if self.functions is not None and self.functions not in FUNCTIONS:
            problems.append(
                f'functions="{self.functions}" is not supported: '
                f"{did_you_mean(str(self.functions), FUNCTIONS)}"
            )
        if problems:
            raise QatTricksError("; ".join(problems))
        # Plain copies: nobody else's list or mapping changes these settings later.
        # The layers of an ``nn.Sequential`` have numbers for names, which YAML reads as such.
        plain = {str(pattern): dict(bits) for pattern, bits in (self.overrides or {}).items()}
        object.__setattr__(self, "include", tuple(self.include))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        object.__setattr__(self, "overrides", plain)

    def _problems_of_bits(self) -> list[str]:
        bits: dict[str, Any] = {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
        }
        if self.first_last_bits is not None:
            bits["first_last_bits"] = self.first_last_bits
        problems = []
        for pattern, changes in (self.overrides or {}).items():
            if isinstance(pattern, bool) or not isinstance(pattern, str | int):
                problems.append(f"overrides={{{pattern!r}: …}} is not allowed: give name patterns")
            for key, value in changes.items():
                if key in OVERRIDES:
                    bits[f'overrides."{pattern}".{key}'] = value
                else:
                    problems.append(
                        f'override "{pattern}" has no setting "{key}": '
                        f"{did_you_mean(str(key), OVERRIDES)}"
                    )
        return problems + [
            f"{name}={value!r} is not supported: give a whole number from {MIN_BITS} to {MAX_BITS}"
            for name, value in bits.items()
            if not is_bits(value)
        ]

    def _problems_of_patterns(self) -> list[str]:
        # A text is a sequence too: of patterns of one letter each.
        return [
            f'{name}="{patterns}" is not allowed: give a list of name patterns, ["{patterns}"]'
            for name, patterns in (("include", self.include), ("exclude", self.exclude))
            if isinstance(patterns, str)
        ]

    @property
    def splits_gates(self) -> bool:
        """Whether functions are split into steps that have integer kernels."""
        return self.functions != "float"

    def limited_to(self, limits: Limits) -> "QuantizeSettings":
        """The settings with a runtime's kind of activations and no weight above its bits.

        ``first_last_bits`` is for weights and inputs alike. Where it equals the other inputs' bits,
        it becomes None, so that the inputs keep theirs; else the limit lowers it.

        Raises:
            QatTricksError: activations were asked for that the runtime does not take.
        """
        most = limits.max_weight_bits
        limited = replace(
            self,
            activations=self._activations_for(limits),
            functions=self.functions or limits.functions,
        )
        if most >= MAX_BITS:
            return limited
        first_last_bits = self.first_last_bits
        if first_last_bits is not None and first_last_bits > most:
            # None gives the ends the bits of the others, which must not be fewer than the limit.
            others_suffice = self.weight_bits >= most and self.activation_bits == first_last_bits
            first_last_bits = None if others_suffice else most
        return replace(
            limited,
            weight_bits=min(self.weight_bits, most),
            first_last_bits=first_last_bits,
            overrides={
                pattern: {
                    key: min(bits, most) if key == "weight_bits" else bits
                    for key, bits in changes.items()
                }
                for pattern, changes in self.overrides.items()
            },
        )

    def _activations_for(self, limits: Limits) -> str:
        """The kind of activations that the settings ask for and ``limits`` allow."""
        kind = self.activations or limits.activations[0]
        if kind not in limits.activations:
            raise QatTricksError(
                f"quantize.activations={kind} is not for this target: {limits.because}; give "
                f"{' or '.join(limits.activations)}, or null"
            )
        bits_of = {
            "activation_bits": self.activation_bits,
            "first_last_bits": self.first_last_bits or self.activation_bits,
        }
        for pattern, changes in self.overrides.items():
            bits_of[f'overrides."{pattern}"'] = changes.get("activation_bits", MAX_BITS)
        for setting, bits in bits_of.items():
            if bits < limits.activation_bits:
                raise QatTricksError(
                    f"quantize.{setting} gives activations {bits} bits, and {limits.because}: give "
                    f"{limits.activation_bits}"
                )
        return kind


def settings_with(
    settings: QuantizeSettings | None, changes: Mapping[str, Any]
) -> QuantizeSettings:
    """``settings``, by default the default ones, with some fields changed.

    Raises:
        QatTricksError: a field that there is not, or a value that is not allowed.
    """
    names = [each.name for each in fields(QuantizeSettings)]
    unknown = [name for name in changes if name not in names]
    if unknown:
        raise QatTricksError(
            "; ".join(
                f'there is no setting "{name}": {did_you_mean(name, names)}' for name in unknown
            )
        )
    return replace(settings or QuantizeSettings(), **changes)
