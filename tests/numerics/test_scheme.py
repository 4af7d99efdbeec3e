import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.numerics import Scheme
from qat_tricks.numerics.scheme import SCALE_OF_ZEROS, SMALLEST_SCALE


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_ranges(bits):
    assert (Scheme(bits=bits).qmin, Scheme(bits=bits).qmax) == (0, 2**bits - 1)
    signed = Scheme(bits=bits, signed=True)
    assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    narrow = Scheme(bits=bits, signed=True, symmetric=True, narrow_range=True)
    assert narrow.qmin == -narrow.qmax == 1 - 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [1, 9, 0, 4.0, True, "8"])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(QatTricksError, match="from 2 to 8"):
        Scheme(bits=bits)


def test_narrow_range_needs_a_symmetric_signed_grid():
    with pytest.raises(QatTricksError, match="narrow_range"):
        Scheme(narrow_range=True)


@pytest.mark.parametrize(
    "scheme",
    [Scheme(bits=b, symmetric=s, signed=g) for b in (2, 4, 8) for s in (0, 1) for g in (0, 1)],
)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_range_is_covered_and_zero_is_exact(scheme, low, high):
    scale, zero_point = scheme.qparams(low, high)
    assert scheme.qmin <= zero_point <= scheme.qmax
    reach = (scale * (scheme.qmin - zero_point), scale * (scheme.qmax - zero_point))
    # The zero point is rounded to an integer, which moves the range by at most half a step.
    assert reach[0] <= min(low, 0) + scale / 2 + 1e-6
    assert reach[1] >= max(high, 0) - scale / 2 - 1e-6


def test_plain_data_round_trip():
    scheme = Scheme(bits=4, symmetric=True, signed=True, narrow_range=True, per_channel=True)
    assert Scheme(**scheme.as_dict()) == scheme


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_are_those_of_the_range_however_small_as_far_as_kernels_can_multiply_them(symmetric):
    scheme = Scheme(symmetric=symmetric)
    exact, _ = scheme.qparams(-1.0, 1.0)
    small, _ = scheme.qparams(-1e-15, 1e-15)
    assert small == pytest.approx(exact * 1e-15)
    assert scheme.qparams(-1e-30, 1e-30)[0] == SMALLEST_SCALE
    assert SMALLEST_SCALE**2 > 1.2e-38  # a normal number of float32
    assert scheme.qparams(0.0, 0.0)[0] == SCALE_OF_ZEROS
