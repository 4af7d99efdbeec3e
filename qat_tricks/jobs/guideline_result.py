"""What the guideline has tried, and what it has kept."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qat_tricks.evidence.language import ENGLISH
from qat_tricks.evidence.paired import show_change
from qat_tricks.evidence.show import show
from qat_tricks.recipes.guideline_steps import GuidelineSettings

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

WITHIN, OVER, FAILED = "within the budget", "over the budget", "does not work here"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a step."""

    name: str
    does: str
    recipe: str
    overrides: Sequence[str]
    command: str  # the arguments of ``train.py`` that run this step alone
    foretold_seconds: float | None
    seconds: float
    decision: str  # WITHIN, OVER or FAILED
    reason: str  # of a step that failed
    judgement: dict[str, Any] | None  # see ``Judgement``; None of a step that failed

    @property
    def within(self) -> bool:
        """Whether the step loses no more than the budget."""
        return self.decision == WITHIN

    def __str__(self) -> str:
        """One line of a step that has been tried."""
        if self.judgement is None:
            return f"{self.name}: {self.decision} ({self.reason})"
        agreement = show(self.judgement["agreement"], "percent")
        change = show_change(self.judgement["change"], ENGLISH)
        return (
            f"{self.name}: {change}, agreement {agreement}, {show(self.seconds, 'seconds')}: "
            f"{self.decision}"
        )


@dataclass(frozen=True, kw_only=True)
class Guideline:
    """The result of the guideline; ``module`` is the kept step's, quantized."""

    module: "LightningModule" = field(repr=False)
    settings: GuidelineSettings
    kept: Outcome
    outcomes: Sequence[Outcome]
    potential: dict[str, Any]  # of 8 bits without training, on a few images: see ``Judgement``
    images: int  # validation images on which it was decided
    foretold_seconds: float | None  # of the steps that were tried
    seconds: float  # of all, rehearsals included

    @property
    def within(self) -> bool:
        """Whether the kept step loses no more than the budget."""
        return self.kept.within

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a report."""
        return {
            **asdict(self.settings),
            "images": self.images,
            "potential": self.potential,
            "steps": [asdict(outcome) for outcome in self.outcomes],
            "kept": self.kept.name,
            "within": self.within,
            "foretold_seconds": self.foretold_seconds,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        """The verdict in one line."""
        assert self.kept.judgement is not None
        change = show_change(self.kept.judgement["change"], ENGLISH)
        held = "within" if self.within else "NOT within"
        return (
            f"kept {self.kept.name}: {change} on {self.images} validation images, {held} the "
            f"budget of {self.settings.budget:g}; alone: python train.py {self.kept.command}"
        )
