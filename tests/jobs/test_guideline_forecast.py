import pytest

from qat_tricks.jobs.guideline_forecast import (
    BATCHES,
    IMAGES,
    ITERATIONS,
    Forecaster,
    Scale,
    Work,
    scaled,
)
from qat_tricks.recipes.guideline_steps import GuidelineSettings, pruning_steps, quality_steps
from qat_tricks.recipes.recipe import load_recipe

WORK = Work(batches=100, pass_seconds=3.0, sensitivity_seconds=5.0)


def load(step):
    return load_recipe(step.recipe, step.overrides)


def rehearse(recipe, scale):
    """A machine on which everything is exactly as long as it is much."""
    seconds = 2.0 + (32.0 if recipe.name.startswith("mixed") else 16.0) * scale.images
    seconds += 0.5 * (scale.iterations or 0)
    epochs = min(scale.epochs, *(stage.epochs for stage in recipe.training or recipe.stages), 99)
    return seconds + (1.0 + 0.25 * epochs * scale.batches if scale.batches else 0)


def test_a_step_takes_what_lines_through_two_rehearsals_say():
    forecaster = Forecaster(rehearse, load, WORK)
    steps = quality_steps(GuidelineSettings(weight_bits=4, activation_bits=4))
    ptq, mixed, rounding, sensitive, qat, _ = [forecaster.seconds(step) for step in steps]
    assert ptq == pytest.approx(2 + 16 + WORK.pass_seconds)
    assert mixed == pytest.approx(ptq + 16)
    assert rounding == pytest.approx(ptq + 0.5 * 500)
    assert sensitive == pytest.approx(rounding + WORK.sensitivity_seconds)
    epochs = load(steps[4]).training[0].epochs
    assert qat == pytest.approx(ptq + 1 + epochs * (0.25 * WORK.batches + WORK.pass_seconds))


def test_what_is_the_same_work_is_rehearsed_once():
    rehearsed = []

    def note(recipe, scale):
        rehearsed.append(recipe.name)
        return rehearse(recipe, scale)

    forecaster = Forecaster(note, load, WORK)
    settings = GuidelineSettings(sparsity=0.6)
    steps = [*quality_steps(settings), *pruning_steps(settings)]
    seconds = [forecaster.seconds(step) for step in steps]
    # without training in two rehearsals; with it, without and with a teacher; and pruning
    assert len(rehearsed) == 11
    assert len(set(seconds[-3:])) == 1


@pytest.mark.parametrize("batches", [1, 3, 5, 10, 40, 1000])
def test_short_epochs_are_foretold_as_long_ones(batches):
    forecaster = Forecaster(
        rehearse, load, Work(batches=batches, pass_seconds=0.5, sensitivity_seconds=1)
    )
    steps = quality_steps(GuidelineSettings(weight_bits=4, activation_bits=4))
    ptq, qat = forecaster.seconds(steps[0]), forecaster.seconds(steps[4])
    epochs = load(steps[4]).training[0].epochs
    assert qat == pytest.approx(ptq + 1 + epochs * (0.25 * batches + 0.5))


def test_batches_are_rehearsed_until_they_are_seen_beside_the_fixed_part():
    rehearsed = []

    def slow(recipe, scale):
        """100 s of tracing, beside which a few batches are lost in its noise."""
        if scale.batches is None:
            return 1.0
        rehearsed.append(scale.batches)
        return 100.0 + {4: 3.0, 16: -3.0, 64: 0.0}[scale.batches] + 2.0 * scale.batches

    forecaster = Forecaster(slow, load, WORK)
    steps = quality_steps(GuidelineSettings(weight_bits=4, activation_bits=4))
    ptq, qat = forecaster.seconds(steps[0]), forecaster.seconds(steps[4])
    assert rehearsed == list(BATCHES)
    epochs = load(steps[4]).training[0].epochs
    whole = ptq + 99.0 + epochs * (2.0 * WORK.batches + WORK.pass_seconds)
    assert qat == pytest.approx(whole, rel=0.04)


def test_an_epoch_of_unknown_length_is_not_foretold():
    forecaster = Forecaster(
        rehearse, load, Work(batches=None, pass_seconds=1, sensitivity_seconds=1)
    )
    seconds = [forecaster.seconds(step) for step in quality_steps(GuidelineSettings())]
    assert [value is None for value in seconds] == [False, False, True, True]


def test_a_rehearsal_does_a_part_of_the_work_and_all_of_its_tricks():
    whole, part = (load_recipe("w4a4_qat", []) for _ in range(2))
    part = scaled(part, Scale(images=IMAGES[0], batches=BATCHES[0]))
    assert [trick.name for trick in part.tricks] == [trick.name for trick in whole.tricks]
    for few, many in zip(part.tricks, whole.tricks, strict=True):
        if getattr(many, "num_images", 0):
            assert few.num_images == many.num_images * IMAGES[0]
    assert [stage.epochs for stage in part.stages] == [0, 1]
    rounding = load_recipe("w4a8_ptq", ["+trick@stages.ptq.tricks=learned_rounding"])
    part = scaled(rounding, Scale(iterations=ITERATIONS[0]))
    learned = next(trick for trick in part.tricks if trick.name == "learned_rounding")
    assert learned.settings.iterations == ITERATIONS[0]
