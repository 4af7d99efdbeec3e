"""Foretells how long a step of the guideline takes, from rehearsals with a part of its work.

A step is run with few images, steps or batches, and with a few more. Through the two goes a line: a
fixed part, as for tracing, and one that grows with the work. Where the fixed part is most of both,
the line's slope would be noise: there the step is run with more again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qat_tricks.recipes.guideline_steps import Step
from qat_tricks.recipes.recipe import StagedRecipe
from qat_tricks.tricks.learned_rounding import LearnedRounding

IMAGES = (1 / 16, 1 / 4)  # shares of the calibration images
ITERATIONS = (5, 25)  # of each block whose rounding is learned
BATCHES = (4, 16, 64)  # of training
CLEAR = 2.0  # times the first rehearsal that a later one takes, to tell the slope of the two


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of a step's work is done; None is all of it."""

    images: float | None = None  # share of each trick's images
    iterations: int | None = None  # of learned rounding
    batches: int | None = None  # of each epoch of training
    epochs: int = 1  # of each fit, where it has as many


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the data and the network give a step to do, beside its recipe."""

    batches: float | None  # of an epoch; None where the loader does not say
    pass_seconds: float  # of a quantized network over the validation images
    sensitivity_seconds: float  # of measuring each layer alone


class Forecaster:
    """Foretells steps; what several of them do is rehearsed once.

    Args:
        rehearse: runs a recipe on a copy of the module with a part of its work, and returns the
            seconds.
        load: builds the recipe of a step.
        work: of the data and the network.
    """

    def __init__(
        self,
        rehearse: Callable[[StagedRecipe, Scale], float],
        load: Callable[[Step], StagedRecipe],
        work: Work,
    ) -> None:
        self._rehearse, self._load, self._work = rehearse, load, work
        self._known: dict[tuple[str, ...], float | None] = {}
        # Of the images that rehearsals of other steps leave out: known from the first step.
        self._images_left_out: float | None = None

    def seconds(self, step: Step) -> float | None:
        """The seconds of ``step`` with its judgement; None where an epoch has no known length.

        The first step that is asked for must be one without training.
        """
        # Steps that prune differ in how much, and not in their work.
        shares = ("prune.sparsity=", "prune_channels.share=")
        same = [one for one in step.overrides if not any(share in one for share in shares)]
        key = (step.recipe, *same)
        if key not in self._known:
            self._known[key] = self._recipe_seconds(self._load(step))
        seconds = self._known[key]
        if seconds is None:
            return None
        besides = self._work.sensitivity_seconds if step.spares_sensitive else 0.0
        return seconds + self._work.pass_seconds + besides

    def _recipe_seconds(self, recipe: StagedRecipe) -> float | None:
        rounding = [trick for trick in recipe.tricks if isinstance(trick, LearnedRounding)]
        if recipe.training:
            return self._training_seconds(recipe)
        if rounding:
            iterations = rounding[0].settings.iterations
            points = [Scale(images=IMAGES[0], iterations=few) for few in ITERATIONS]
            fixed, slope = self._line(recipe, points, ITERATIONS)
            return fixed + slope * iterations + self._of_images_left_out()
        fixed, slope = self._line(recipe, [Scale(images=share) for share in IMAGES], IMAGES)
        if self._images_left_out is None:  # later ones may look at images longer
            self._images_left_out = slope * (1 - IMAGES[0])
        return fixed + slope

    def _of_images_left_out(self) -> float:
        assert self._images_left_out is not None
        return self._images_left_out

    def _training_seconds(self, recipe: StagedRecipe) -> float | None:
        if self._work.batches is None:
            return None
        each = max(1, math.floor(self._work.batches))  # as Lightning rounds a share of them
        longest = max(stage.epochs for stage in recipe.training)
        points = []
        for few in BATCHES:
            # A short epoch has fewer batches: then several of them make up the number.
            epochs = min(max(1, math.ceil(few / each)), longest)
            points.append(Scale(images=IMAGES[0], batches=min(few, each), epochs=epochs))
        fixed, slope = self._line(recipe, points, [_batches(recipe, point) for point in points])
        epochs = sum(stage.epochs for stage in recipe.training)
        # Each epoch ends with the trainer's own validation.
        validation = epochs * self._work.pass_seconds
        return fixed + slope * epochs * each + validation + self._of_images_left_out()

    def _line(
        self, recipe: StagedRecipe, scales: Sequence[Scale], amounts: Sequence[float]
    ) -> tuple[float, float]:
        """Seconds of no work, and of each unit of it, from as many rehearsals as tell it."""
        first = self._rehearse(recipe, scales[0])
        slope, last = 0.0, amounts[0]  # no slope where the first amount is all of the work
        for scale, amount in zip(scales[1:], amounts[1:], strict=True):
            if amount == last:
                continue
            last = amount
            seconds = self._rehearse(recipe, scale)
            slope = max(0.0, (seconds - first) / (amount - amounts[0]))
            if seconds >= CLEAR * first:
                break
        return max(0.0, first - slope * amounts[0]), slope


def _batches(recipe: StagedRecipe, scale: Scale) -> int:
    """The batches that all fits of a recipe train on with a part of their work."""
    assert scale.batches is not None
    return sum(min(stage.epochs, scale.epochs) for stage in recipe.training) * scale.batches


def scaled(recipe: StagedRecipe, scale: Scale) -> StagedRecipe:
    """``recipe`` with a part of its work; its tricks are changed."""
    for trick in recipe.tricks:
        images = vars(trick).get("num_images", 0)
        if scale.images is not None and images > 0:
            vars(trick)["num_images"] = max(2, math.ceil(scale.images * images))
        if scale.iterations is not None and isinstance(trick, LearnedRounding):
            trick.settings = replace(trick.settings, iterations=scale.iterations)
    if scale.batches is None:
        return recipe
    return replace(
        recipe,
        stages=[replace(stage, epochs=min(stage.epochs, scale.epochs)) for stage in recipe.stages],
    )
