"""Least squares: the fit to inputs, and the rounding that lets other weights take up the error."""

import itertools

import pytest
import torch

from qat_tricks.numerics.least_squares import GridRounder, Moments, damped, fitted_change


def _inputs(rows: int = 400, size: int = 12, groups: int = 2, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, ``[groups, rows, size]``."""
    generator = torch.Generator().manual_seed(seed)
    # Of half as many sources, as neighbouring pixels and channels are.
    mixed = torch.randn(groups, size // 2, size, generator=generator)
    values = torch.randn(groups, rows, size // 2, generator=generator) @ mixed
    return values + 0.3 * torch.randn(groups, rows, size, generator=generator)


def _error(inputs: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error of ``inputs @ weight``, ``[groups, channels]``."""
    return (inputs @ weight - target).square().mean(1)


def test_weights_are_rounded_such_that_outputs_err_less():
    inputs, weight = _inputs(), torch.randn(2, 12, 5)
    scale = weight.abs().amax(1) / 7
    nearest = (weight / scale[:, None]).round() * scale[:, None]
    rounder = GridRounder(inputs.transpose(1, 2) @ inputs, 7)
    integers, _ = rounder.round(weight, scale)
    assert torch.equal(integers, integers.round())
    assert integers.abs().max() <= 7
    target = inputs @ weight
    least = _error(inputs, integers * scale[:, None], target)
    assert least.sum() < 0.5 * _error(inputs, nearest, target).sum()


def test_the_error_is_known_without_the_inputs():
    inputs, weight = _inputs(), torch.randn(2, 12, 5)
    moments = inputs.transpose(1, 2) @ inputs
    scale = weight.abs().amax(1) / 3
    integers, loss = GridRounder(moments, 3).round(weight, scale)
    change = integers * scale[:, None] - weight
    expected = (change * (damped(moments, 0.01) @ change)).sum(1)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-3)


def test_few_weights_are_rounded_nearly_as_well_as_can_be():
    inputs = _inputs(size=4, groups=1)
    moments = inputs.transpose(1, 2) @ inputs
    weight = torch.randn(1, 4, 30, generator=torch.Generator().manual_seed(3))
    scale = weight.abs().amax(1) / 3
    integers, _ = GridRounder(moments, 3).round(weight, scale)
    every = torch.tensor(list(itertools.product(range(-3, 4), repeat=4)), dtype=torch.float32)

    def errors(change):
        return (change * (moments[0] @ change)).sum(0)

    best = torch.stack([errors(row[:, None] * scale[0] - weight[0]) for row in every]).amin(0)
    nearest = errors((weight[0] / scale[0]).round() * scale[0] - weight[0])
    assert errors(integers[0] * scale[0] - weight[0]).sum() < 2 * best.sum() < nearest.sum()


def test_uncorrelated_inputs_leave_rounding_to_the_nearest():
    weight = torch.randn(1, 6, 4)
    scale = weight.abs().amax(1) / 7
    integers, _ = GridRounder(torch.eye(6)[None], 7).round(weight, scale)
    assert torch.equal(integers, (weight / scale[:, None]).round())


def test_held_integers_stay_and_the_others_take_up_the_error():
    inputs, weight = _inputs(), torch.randn(2, 12, 5)
    scale = weight.abs().amax(1) / 127
    held = torch.full_like(weight, torch.nan)
    held[:, :4] = 0.0
    rounder = GridRounder(inputs.transpose(1, 2) @ inputs, 127)
    integers, _ = rounder.round(weight, scale, held)
    assert (integers[:, :4] == 0).all()
    pruned = weight.clone()
    pruned[:, :4] = 0.0
    target = inputs @ weight
    taken_up = _error(inputs, integers * scale[:, None], target).sum()
    assert taken_up < 0.7 * _error(inputs, pruned, target).sum()


def test_the_scale_that_is_chosen_errs_least_of_all():
    inputs, weight = _inputs(), torch.randn(2, 12, 5)
    weight[:, 0] *= 6  # an outlier that had better be clipped or not, as the inputs say
    rounder = GridRounder(inputs.transpose(1, 2) @ inputs, 7)
    chosen = rounder.fit_scale(weight)
    _, least = rounder.round(weight, chosen)
    for share in (0.3, 0.5, 0.8, 1.0):
        _, loss = rounder.round(weight, share * weight.abs().amax(1) / 7)
        assert (least <= loss * 1.1).all()
        assert (least < loss * 0.99).any()


def test_scales_are_the_same_in_parts(monkeypatch):
    inputs, weight = _inputs(), torch.randn(2, 12, 5)
    rounder = GridRounder(inputs.transpose(1, 2) @ inputs, 7)
    whole = rounder.fit_scale(weight)
    monkeypatch.setattr("qat_tricks.numerics.least_squares.MOST_ENTRIES", 1)
    torch.testing.assert_close(rounder.fit_scale(weight), whole)


@pytest.mark.parametrize("values", [0.0, 1e-12])
def test_inputs_of_nothing_are_rounded_to_the_nearest(values):
    weight = torch.randn(1, 6, 4)
    scale = weight.abs().amax(1) / 7
    integers, _ = GridRounder(torch.full((1, 6, 6), values), 7).round(weight, scale)
    assert integers.isfinite().all()
    if values == 0.0:
        assert torch.equal(integers, (weight / scale[:, None]).round())


@pytest.mark.parametrize("fits_scale", [True, False])
def test_all_steps_together(fits_scale):
    inputs, weight = _inputs(), torch.randn(2, 12, 5)
    pruned = torch.zeros(2, 12, 5, dtype=torch.bool)
    pruned[:, ::4] = True
    rounder = GridRounder(inputs.transpose(1, 2) @ inputs, 127).with_limit(3)
    integers, scale = rounder.fit(weight, pruned, fits_scale=fits_scale)
    assert integers[pruned].abs().max() == 0
    assert integers.abs().max() == 3
    if not fits_scale:  # that of the largest weight that is left, which stays the largest
        largest = weight.masked_fill(pruned, 0).abs().amax(1)
        torch.testing.assert_close(scale, largest / 3)
        torch.testing.assert_close((integers * scale[:, None]).abs().amax(1), largest)
    nearest = (weight.masked_fill(pruned, 0) / scale[:, None]).round().clamp(-3, 3)

    def error(integers):
        return (inputs @ (integers * scale[:, None] - weight)).square().mean()

    assert error(integers) < 0.8 * error(nearest)
    # The moments' own rounder is as it was.
    assert rounder.with_limit(7).limit == 7
    assert rounder.limit == 3


def test_a_fit_finds_the_weights_of_the_targets():
    inputs, change = _inputs(), torch.randn(2, 12, 5)
    errors = inputs @ change
    seen, unseen = (
        Moments.of(inputs[:, rows], errors[:, rows]) for rows in (slice(0, 300), slice(300, 400))
    )
    found = fitted_change(seen, unseen)
    assert (inputs @ (change - found)).square().mean() < 0.01 * errors.square().mean()
    assert seen.gain(change) == pytest.approx(float(errors[:, :300].square().sum()), rel=1e-3)


def test_a_fit_to_chance_is_left_alone():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 60, 40, generator=generator)
    errors = torch.randn(1, 60, 5, generator=generator)
    seen = Moments.of(inputs[:, :45], errors[:, :45])
    unseen = Moments.of(inputs[:, 45:], errors[:, 45:])
    # Fewer rows than weights fit anything, and predict nothing.
    assert seen.gain(seen.least_change(0.01)) > 0.5 * float(errors[:, :45].square().sum())
    found = fitted_change(seen, unseen)
    worst = unseen.gain(seen.least_change(0.01))
    assert worst < 0
    assert (inputs @ found).square().mean() < 0.1 * errors.square().mean()


@pytest.mark.parametrize("limit", [1, 3])
def test_no_integer_alone_can_be_moved_to_less_error(limit):
    inputs, weight = _inputs(size=16), torch.randn(2, 16, 40)
    scale = 0.6 * weight.abs().amax(1) / limit
    rounder = GridRounder(inputs.transpose(1, 2) @ inputs, limit)
    rounded, _ = rounder.round(weight, scale)

    def errors(integers):
        change = integers * scale[:, None] - weight
        return (change * (rounder.moments @ change)).sum(1)

    integers = rounder.refine(weight, rounded, scale)
    least = errors(integers)
    assert (least <= errors(rounded) * (1 + 1e-5)).all()
    assert least.sum() < 0.99 * errors(rounded).sum()
    assert torch.equal(integers, integers.round())
    assert integers.abs().max() <= limit
    for i, step in itertools.product(range(16), (-1, 1)):
        moved = integers.clone()
        moved[:, i] = (moved[:, i] + step).clamp(-limit, limit)
        assert (errors(moved) >= least * (1 - 1e-5)).all()


def test_integers_that_are_held_stay():
    inputs, weight = _inputs(), torch.randn(2, 12, 5)
    scale, held = weight.abs().amax(1) / 7, torch.full((2, 12, 5), torch.nan)
    held[:, ::3] = 0.0
    rounder = GridRounder(inputs.transpose(1, 2) @ inputs, 7)
    rounded, _ = rounder.round(weight, scale, held)
    integers = rounder.refine(weight, rounded, scale, held)
    assert (integers[:, ::3] == 0).all()
    assert not torch.equal(integers, rounded)


@pytest.mark.parametrize("is_centered", [True, False])
def test_moments_of_rows_that_count_otherwise_for_each_channel(is_centered):
    generator = torch.Generator().manual_seed(0)
    inputs = 1 + _inputs(groups=2, size=6)
    errors = 2 + torch.randn(2, 400, 3, generator=generator)
    weights = torch.rand(2, 400, 3, generator=generator) + 0.01
    moments = Moments.weighted(inputs, errors, weights, is_centered=is_centered)
    assert moments.rows == 400
    for channel in range(6):
        group = channel // 3
        x, e, w = inputs[group], errors[group, :, channel % 3], weights[group, :, channel % 3]
        if is_centered:
            x, e = (v - (v.T * w).sum(-1) / w.sum() for v in (x, e))
        by_input = (x * w[:, None]).T
        torch.testing.assert_close(moments.inputs[channel], by_input @ x, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(
            moments.errors[channel, :, 0], by_input @ e, rtol=1e-4, atol=2e-3
        )


def test_where_all_rows_count_alike_each_channel_has_its_groups_moments():
    inputs, errors = _inputs(), torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(1))
    alike = Moments.weighted(inputs, errors, torch.ones_like(errors), is_centered=False)
    expected = Moments.of(inputs, errors)
    for channel in range(6):
        group = channel // 3
        torch.testing.assert_close(alike.inputs[channel], expected.inputs[group])
        torch.testing.assert_close(
            alike.errors[channel, :, 0], expected.errors[group, :, channel % 3]
        )
