import torch

from qat_tricks.numerics.optimal_brain import DAMPING, curvature, refit, saliencies

GROUPS, OUTPUTS, INPUTS = 2, 6, 12


def problem(seed=0):
    """Correlated inputs of two groups, their Hessian, and a weight ``[6, 4, 3]``."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(GROUPS, INPUTS, INPUTS, generator=generator)
    x = torch.randn(GROUPS, 200, INPUTS, generator=generator) @ mix
    weight = torch.randn(OUTPUTS, 4, 3, generator=generator)
    return x, x.transpose(1, 2) @ x / 200, weight


def damped(hessian):
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    return hessian.double() + DAMPING * mean.double() * torch.eye(INPUTS)


def least_cost(row, hessian, gone):
    """The cost of a row without the inputs ``gone``, by solving for the others."""
    kept = [i for i in range(INPUTS) if i not in gone]
    other = torch.zeros_like(row)
    other[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ row)
    return (other - row) @ hessian @ (other - row), other


def test_a_saliency_is_the_least_cost_of_a_weights_loss():
    _, hessian, weight = problem()
    costs = saliencies(weight, curvature(weight, hessian))
    rows = weight.double().reshape(OUTPUTS, INPUTS)
    energy = sum(row @ hessian[i // 3].double() @ row for i, row in enumerate(rows))
    for row, place in ((0, 0), (2, 7), (5, 11)):
        expected, _ = least_cost(rows[row], damped(hessian)[row // 3], [place])
        assert torch.isclose(costs.reshape(OUTPUTS, INPUTS)[row, place], expected / energy)


def test_saliencies_do_not_depend_on_scales():
    _, hessian, weight = problem()
    costs = saliencies(weight, curvature(weight, hessian))
    scaled = saliencies(weight * 50, curvature(weight * 50, hessian * 0.01))
    assert torch.allclose(costs, scaled)


def test_the_weights_that_stay_follow_the_output():
    _, hessian, weight = problem()
    mask = (torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    found = refit(weight, mask, hessian, weight)
    assert torch.equal(found, found * mask)
    rows = weight.double().reshape(OUTPUTS, INPUTS)
    for row, values in enumerate(found.reshape(OUTPUTS, INPUTS)):
        gone = (mask.reshape(OUTPUTS, INPUTS)[row] == 0).nonzero().flatten().tolist()
        _, expected = least_cost(rows[row], damped(hessian)[row // 3], gone)
        assert torch.allclose(values.double(), expected, atol=1e-3)
    again = refit(weight, mask, hessian, found)  # from where it ended
    assert torch.allclose(again, found, atol=1e-3)


def test_nothing_pruned_is_nothing_changed_and_a_diagonal_has_nothing_to_follow():
    _, hessian, weight = problem()
    everything = torch.ones_like(weight)
    assert torch.equal(refit(weight, everything, hessian, weight), weight)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mask = (weight > 0).float()
    assert torch.equal(refit(weight, mask, diagonal, weight), weight * mask)
    costs = saliencies(weight, curvature(weight, diagonal)).reshape(GROUPS, 3, INPUTS)
    power = (diagonal * (1 + DAMPING * diagonal.mean(1, keepdim=True) / diagonal))[:, None]
    expected = weight.reshape(GROUPS, 3, INPUTS).square() * power
    assert torch.allclose(costs / costs.sum(), (expected / expected.sum()).double(), rtol=1e-4)


def test_inputs_of_zeros_cost_nothing():
    weight = torch.ones(4, 3)
    hessian = torch.zeros(1, 3, 3)
    assert saliencies(weight, curvature(weight, hessian)).isfinite().all()
    mask = torch.tensor([[1.0, 0, 1]]).expand(4, 3)
    assert torch.allclose(refit(weight, mask, hessian, weight), weight * mask)
