"""Parity: figures that follow from known differences."""

import numpy as np
import pytest
import torch
from torch import nn

from qat_tricks.deploy.parity.network import ParityReport, measure_parity
from qat_tricks.deploy.parity.tensors import TensorParity
from qat_tricks.errors import QatTricksError
from qat_tricks.numerics.decibels import LARGEST_SQNR_DB
from tests.helpers.handmade import float_conv


class Scaled(nn.Module):
    """The conv of the file, as logits ``[N, C, 8, 8]``, times a factor."""

    def __init__(self, weight: np.ndarray, factor: float) -> None:
        super().__init__()
        self.weight, self.factor = torch.from_numpy(weight).float(), factor

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight) * self.factor


WEIGHT = np.diag([1.0, 2.0, 4.0]).reshape(3, 3, 1, 1)


@pytest.mark.parametrize(("factor", "decibels"), [(2.0, 6.0206), (1.01, 40.0864), (-1.0, -6.0206)])
def test_sqnr_of_a_scaled_network(tmp_path, factor, decibels):
    batch = torch.rand(4, 3, 8, 8)
    report = measure_parity(
        float_conv(tmp_path / "m.onnx", WEIGHT), Scaled(WEIGHT, factor), [batch]
    )
    assert report.sqnr_db == pytest.approx(decibels, abs=1e-2)
    logits = nn.functional.conv2d(batch, torch.from_numpy(WEIGHT).float())
    assert report.max_abs_error == pytest.approx(float(logits.max()) * abs(1 - factor), rel=1e-4)
    assert report.images == 4


def test_no_difference_is_a_finite_figure(tmp_path):
    exact = np.eye(3).reshape(3, 3, 1, 1)
    batches = [(torch.ones(n, 3, 8, 8), torch.zeros(n)) for n in (2, 1)]  # as a loader yields them
    report = measure_parity(float_conv(tmp_path / "m.onnx", exact), Scaled(exact, 1.0), batches)
    assert (report.top1_agreement, report.max_abs_error, report.images) == (1.0, 0.0, 3)
    assert report.as_dict()["sqnr_db"] == LARGEST_SQNR_DB


def test_agreement_counts_images(tmp_path):
    class Logits(nn.Module):
        def __init__(self, flipped):
            super().__init__()
            self.flipped = flipped

        def forward(self, x):
            logits = x.mean([2, 3])
            return torch.where(torch.arange(len(x))[:, None] < self.flipped, -logits, logits)

    from qat_tricks.deploy.export import export_onnx

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean([2, 3])

    export_onnx(Mean(), tmp_path / "m.onnx", torch.rand(1, 3, 8, 8))
    report = measure_parity(tmp_path / "m.onnx", Logits(3), [torch.rand(12, 3, 8, 8) + 0.1])
    assert report.top1_agreement == pytest.approx(9 / 12)


def test_values_that_are_no_numbers_are_the_worst_parity(tmp_path):
    path = float_conv(tmp_path / "m.onnx", WEIGHT)
    report = measure_parity(path, Scaled(WEIGHT, float("nan")), [torch.rand(2, 3, 8, 8)])
    assert report.sqnr_db == -LARGEST_SQNR_DB


def test_no_images_and_foreign_logits_are_refused(tmp_path):
    path = float_conv(tmp_path / "m.onnx", WEIGHT)
    with pytest.raises(QatTricksError, match="no images"):
        measure_parity(path, Scaled(WEIGHT, 1.0), [])
    with pytest.raises(QatTricksError, match=r"\(2, 192\).*\(2, 3, 8, 8\)"):
        measure_parity(path, nn.Flatten(), [torch.rand(2, 3, 8, 8)])


def test_a_report_prints_as_five_lines():
    tensors = [
        TensorParity(name="late", place=5, sqnr_db=20.0, differing=0.2),
        TensorParity(name="first", place=2, sqnr_db=45.0, differing=0.1),
        TensorParity(name="same", place=1, sqnr_db=200.0, differing=0.0),
    ]
    figures = {"top1_agreement": 0.995, "max_abs_error": 0.0123, "sqnr_db": 44.0, "images": 200}
    report = ParityReport(**figures, layers=tuple(tensors))
    lines = str(report).splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) <= 100
    for part in ("200 images", "99.50%", "44.0 dB", "0.0123"):
        assert part in str(report)
    assert lines[-1].endswith('1 of 3 to the last bit, "first" the first that differs (45.0 dB)')
    assert "late" in repr(report)
    assert len(str(ParityReport(**figures)).splitlines()) == 5
