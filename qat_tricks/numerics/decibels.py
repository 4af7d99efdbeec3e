"""Ratios of powers, in decibels."""

import math

# Stands for values without any difference, so that a report stays plain JSON.
LARGEST_SQNR_DB = 200.0


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers in dB, from -200 to 200."""
    if noise == 0.0:
        return LARGEST_SQNR_DB
    if not math.isfinite(noise) or not math.isfinite(signal):
        return -LARGEST_SQNR_DB
    # a signal of zeros has no logarithm
    ratio_db = 10 * math.log10(max(signal, 1e-300) / noise)
    return min(max(ratio_db, -LARGEST_SQNR_DB), LARGEST_SQNR_DB)
