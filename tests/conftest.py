import os

import pytest
import torch

os.environ["WANDB_MODE"] = "offline"


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "feature(name): a row of docs/results/lightning.md that the test proves"
    )


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    """Each test has its own cache and a fixed seed."""
    monkeypatch.setenv("QAT_TRICKS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    torch.set_num_threads(1)  # these networks are too small to share
