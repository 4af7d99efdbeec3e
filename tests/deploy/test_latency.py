"""Latency: more work takes longer, time is bounded, bad input is refused."""

import time

import numpy as np
import pytest
from handmade import float_conv

from qat_tricks.deploy.latency import MIN_RUNS, measure_latency
from qat_tricks.errors import QatTricksError


def test_more_work_takes_longer(tmp_path):
    small = float_conv(tmp_path / "small.onnx", np.ones((4, 256, 1, 1)))
    large = float_conv(tmp_path / "large.onnx", np.ones((256, 256, 3, 3)))
    times = measure_latency(
        {"small": small, "large": large}, image_shape=(256, 8, 8), batch_size=4, threads=1, runs=20
    )
    assert times["large"]["p50"] > 3 * times["small"]["p50"]
    assert all(0 < t["p50"] <= t["p95"] for t in times.values())


def test_time_is_bounded(tmp_path):
    path = float_conv(tmp_path / "m.onnx", np.ones((64, 64, 3, 3)))
    start = time.perf_counter()
    times = measure_latency({"m": path}, image_shape=(64, 8, 8), threads=1, runs=10**6, max_seconds=0.3)
    assert times["m"]["p50"] > 0
    assert time.perf_counter() - start < 5


def test_every_network_is_timed_even_without_time(tmp_path):
    path = float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3)))
    times = measure_latency({"a": path, "b": path}, image_shape=(3, 8, 8), threads=1, max_seconds=0)
    assert set(times) == {"a", "b"}


@pytest.mark.parametrize(
    ("paths", "settings", "message"),
    [
        ([], {}, "no ONNX file"),
        (["m"], {"runs": MIN_RUNS - 1}, "runs is"),
        (["m"], {"batch_size": 0}, "sizes of 1 or more"),
        (["m"], {"image_shape": (1, 8, 8)}, "images of shape"),
    ],
)
def test_bad_settings_are_refused(tmp_path, paths, settings, message):
    path = float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3)))
    with pytest.raises(QatTricksError, match=message):
        measure_latency(dict.fromkeys(paths, path), **{"image_shape": (3, 8, 8), "threads": 1} | settings)
