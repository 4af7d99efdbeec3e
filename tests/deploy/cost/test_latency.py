"""Latency: more work takes longer, time is bounded, bad input is refused."""

import time

import numpy as np
import pytest

from qat_tricks.deploy.cost import latency
from qat_tricks.deploy.cost.latency import (
    MIN_RUNS,
    measure_latency,
    measure_load,
    measure_throughput,
)
from qat_tricks.errors import QatTricksError
from tests.helpers.handmade import float_conv


def test_more_work_takes_longer(tmp_path):
    small = float_conv(tmp_path / "small.onnx", np.ones((4, 256, 1, 1)))
    large = float_conv(tmp_path / "large.onnx", np.ones((256, 256, 3, 3)))
    times = measure_latency(
        {"small": small, "large": large}, image_shape=(256, 8, 8), batch_size=4, threads=1, runs=20
    )
    assert times["large"]["p50"] > 3 * times["small"]["p50"]
    assert all(0 < t["p50"] <= t["p95"] <= t["p99"] for t in times.values())
    for of_file in times.values():
        quantiles = of_file["quantiles"]
        assert len(quantiles) == 21
        assert quantiles == sorted(quantiles)
        assert quantiles[10] == of_file["p50"]
        assert quantiles[-1] >= of_file["p99"]


def test_throughput_is_the_images_of_all_runs_over_their_time_at_each_combination(
    tmp_path, monkeypatch
):
    paths = {"a": float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3)))}
    settings = {
        "image_shape": (3, 8, 8),
        "batch_sizes": [2, 4],
        "thread_counts": [1, 2],
        "seconds": 0.01,
    }
    rows = measure_throughput(paths, **settings)
    assert [(row["threads"], row["batch_size"]) for row in rows] == [(1, 2), (1, 4), (2, 2), (2, 4)]
    assert all(row["a"] > 0 for row in rows)
    monkeypatch.setattr(latency, "time_in_turn", lambda *_: {"a": [1.0, 1.0, 6.0]})  # milliseconds
    assert [row["a"] for row in measure_throughput(paths, **settings)] == [750, 1500, 750, 1500]


def test_each_file_is_opened_and_the_middle_time_told(tmp_path, monkeypatch):
    paths = {name: float_conv(tmp_path / f"{name}.onnx", np.ones((4, 3, 3, 3))) for name in "ab"}
    clock = iter([0, 1, 0, 10, 0, 2, 0, 20, 0, 9, 0, 90])  # seconds: a and b in turn
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    assert measure_load(paths, threads=1, runs=3) == {"a": 2000, "b": 20000}


def test_time_is_bounded(tmp_path):
    path = float_conv(tmp_path / "m.onnx", np.ones((64, 64, 3, 3)))
    start = time.perf_counter()
    times = measure_latency(
        {"m": path}, image_shape=(64, 8, 8), threads=1, runs=10**6, max_seconds=0.3
    )
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
        measure_latency(
            dict.fromkeys(paths, path), **{"image_shape": (3, 8, 8), "threads": 1} | settings
        )
