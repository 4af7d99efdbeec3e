import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.numerics import ESTIMATORS, Scheme, make_estimator

HEAVY_TAILED = torch.randn(20000) ** 3


def _range(name, *batches, scheme=Scheme()):  # noqa: B008
    estimator = make_estimator(name)
    for batch in batches:
        estimator.observe(batch)
    return estimator.range(scheme)


def _error(x, bounds, scheme):
    scale, zero_point = scheme.qparams(*bounds)
    return (
        (torch.fake_quantize_per_tensor_affine(x, scale, zero_point, scheme.qmin, scheme.qmax) - x)
        .square()
        .mean()
    )


def test_minmax_is_the_extremes_of_all_batches():
    assert _range("minmax", torch.tensor([0.0, 2.0]), torch.tensor([-3.0, 1.0])) == (-3.0, 2.0)


def test_moving_average_lies_between_the_batches():
    low, high = _range("moving_average", torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 5.0]))
    assert -3 < low < -1
    assert 1 < high < 5


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_order_of_batches_and_growing_ranges_do_not_break(name):
    low, high = _range(name, HEAVY_TAILED[:100] * 0.01, HEAVY_TAILED, HEAVY_TAILED * 2)
    assert low < 0 < high
    assert high <= float(HEAVY_TAILED.max()) * 2 + 1e-4


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"moving_average"}))
def test_merged_estimators_answer_as_one_that_saw_it_all(name):
    parts = HEAVY_TAILED[:10000], HEAVY_TAILED[10000:] * 5
    one, *others = (make_estimator(name) for _ in range(3))
    for part, other in zip(parts, others, strict=True):
        one.observe(part)
        other.observe(part)
    others[0].merge(others[1])
    assert others[0].range(Scheme()) == pytest.approx(one.range(Scheme()), rel=1e-6)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_is_no_worse_than_minmax_and_others(bits):
    scheme = Scheme(bits=bits)
    errors = {
        name: _error(HEAVY_TAILED, _range(name, HEAVY_TAILED, scheme=scheme), scheme)
        for name in ESTIMATORS
    }
    assert errors["mse"] <= 1.02 * min(errors.values()), errors
    assert errors["mse"] < errors["minmax"] * (0.8 if bits < 8 else 1)


def test_percentile_leaves_out_its_share():
    low, high = _range("percentile", torch.linspace(-1, 1, 60001))
    assert high == pytest.approx(0.9998, abs=1e-3)
    assert low == pytest.approx(-0.9998, abs=1e-3)
    estimator = make_estimator("percentile", percentile=90)
    estimator.observe(torch.linspace(0, 1, 60001))
    assert estimator.range(Scheme())[1] == pytest.approx(0.9, abs=5e-3)


def test_kl_clips_a_heavy_tail_and_keeps_a_uniform_one():
    assert _range("kl", HEAVY_TAILED, scheme=Scheme(bits=4))[1] < 0.9 * float(HEAVY_TAILED.max())
    assert _range("kl", torch.rand(20000))[1] > 0.9


def test_a_relus_range_begins_at_zero():
    assert _range("mse", torch.relu(torch.randn(5000)))[0] >= 0


def test_unknown_name_lists_the_nearest():
    with pytest.raises(QatTricksError, match='did you mean "percentile"'):
        make_estimator("percentil")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(QatTricksError, match="NaN"):
        _range("minmax", torch.tensor([1.0, value]))


def test_nothing_observed_is_refused():
    with pytest.raises(QatTricksError, match="nothing was observed"):
        _range("mse")
