"""The rows that a conv or linear multiplies by its weight."""

import pytest
import torch
from torch import nn

from qat_tricks.graph.layers import as_layer
from qat_tricks.graph.patches import ROWS, rows_of, rows_to_fit, weight_by_group

CASES = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 8)),
    "strided": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (5, 4, 9, 8)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding="same"), (5, 4, 9, 8)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (5, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (5, 4, 9, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (5, 4, 9, 8)),
    "of signals": (nn.Conv1d(4, 6, 3, stride=2), (5, 4, 9)),
    "of volumes": (nn.Conv3d(4, 6, 2, padding=1), (5, 4, 4, 3, 5)),
    "linear": (nn.Linear(4, 6), (5, 4)),
    "linear of tokens": (nn.Linear(4, 6), (5, 7, 4)),
}


@pytest.mark.parametrize("count", [3, 1000])
@pytest.mark.parametrize(("module", "shape"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_rows_times_the_weight_are_the_output(module, shape, count):
    layer, input = as_layer(module), torch.randn(shape)
    output = layer(input)
    inputs, outputs = rows_of(layer, input, output, count, torch.Generator().manual_seed(0))
    groups = getattr(layer, "groups", 1)
    expected = inputs @ weight_by_group(layer.weight, groups) + layer.bias.view(groups, 1, -1)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    positions = output.numel() // len(layer.bias) // len(output)
    assert outputs.shape[1] == len(output) * min(count, positions)


def test_rows_differ_from_image_to_image_and_come_again():
    layer, input = as_layer(nn.Conv2d(1, 1, 1)), torch.arange(36.0).expand(4, 1, 36)[..., None]

    def drawn():
        rows, _ = rows_of(layer, input, input, 5, torch.Generator().manual_seed(0))
        return rows.view(4, 5)

    assert all(len(set(row)) == 5 for row in drawn().tolist())
    assert not torch.equal(drawn()[0], drawn()[1])
    assert torch.equal(drawn(), drawn())


@torch.no_grad()
def test_as_many_rows_of_each_image_are_fitted_to():
    layer = as_layer(nn.Conv2d(4, 6, 3, padding=1))
    batches = [torch.randn(3, 4, 64, 64), torch.randn(2, 4, 64, 64)]
    outputs = [layer(batch) for batch in batches]
    inputs, found = rows_to_fit(layer, batches, outputs, torch.Generator().manual_seed(0))
    count = -(-ROWS // 5)
    assert inputs.shape == (1, 5 * count, 36)
    expected = inputs @ weight_by_group(layer.weight, 1) + layer.bias
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
