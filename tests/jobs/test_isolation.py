"""A job's settings of the process end with it."""

import contextlib
import os

import torch

from qat_tricks.jobs.isolation import isolated


def test_isolation_restores_the_random_state_too():
    before = torch.get_rng_state()
    with isolated():
        torch.manual_seed(7)
        torch.set_grad_enabled(False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_isolation_restores_the_process_even_after_a_failure(monkeypatch):
    monkeypatch.setenv("BEFORE", "kept")
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with contextlib.suppress(ZeroDivisionError), isolated():
        os.environ |= {"BEFORE": "changed", "ADDED": "1"}
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium" if precision != "medium" else "high")
        torch.use_deterministic_algorithms(True)
        raise ZeroDivisionError
    assert os.environ["BEFORE"] == "kept"
    assert "ADDED" not in os.environ
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() is torch.float32
    assert torch.get_float32_matmul_precision() == precision
    assert not torch.are_deterministic_algorithms_enabled()
