"""Functions that work in place: whoever reads their input later reads their result, everywhere."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.in_place import works_in_place
from qat_tricks.graph.output_error import output_error
from tests.helpers.lit import Data, Lit, trainer
from tests.helpers.nets import images

FUNCTIONS = {
    "kwarg": lambda x: F.hardswish(x, inplace=True),
    "by_place": lambda x: F.leaky_relu(x, 0.1, True),
    "silu": lambda x: F.silu(x, inplace=True),
    "method": lambda x: x.relu_(),
    "torch": torch.relu_,
    "sigmoid": lambda x: x.sigmoid_(),
    "module": nn.LeakyReLU(0.1, inplace=True),
    "gate": nn.Hardsigmoid(inplace=True),
}


class ReadAgain(nn.Module):
    """Reads the input of a function in place behind it."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.function = function
        self.a.weight.data *= 8

    def forward(self, x):
        x = self.a(x)
        y = self.function(x)
        return self.fc((self.b(x) + y).mean((2, 3)))  # x has the function's values by now


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_file_is_the_simulation_where_the_input_is_read_again(name, tmp_path):
    net = ReadAgain(FUNCTIONS[name]).eval()
    with torch.no_grad():
        expected = net(images(32))
    traced = trace(net)
    assert any(works_in_place(node, traced) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(images(32)), expected)
    quantized = qat_tricks.quantize(ReadAgain(FUNCTIONS[name]).eval(), [images(32)])
    report = qat_tricks.export_onnx(quantized, tmp_path / "m.onnx", images(2), images=[images(32)])
    assert max(tensor.differing for tensor in report.layers) == 0
    with torch.no_grad():
        error = (quantized(images(32)) - expected).square().mean() / expected.square().mean()
    assert error < 1e-2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_fit_trains_behind_quantizers(name):
    """A quantizer's gradient needs the values that it yielded."""
    lit = Lit().train()
    lit.backbone = ReadAgain(FUNCTIONS[name])
    run = trainer(qat_tricks.recipe("w4a4_qat", report=False), max_epochs=1)
    run.fit(lit, datamodule=Data())
    assert all(parameter.isfinite().all() for parameter in lit.parameters())


class ChangesView(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.head, self.change = nn.Linear(8, 4), change

    def forward(self, x):
        return self.head(self.second(self.change(self.first(x).relu())).mean((2, 3)))


def of_slice(z):
    z[:, :4].mul_(1.04)
    return z


def of_shape(z):
    z.view(z.shape[0], -1).add_(1.0)
    return z


def of_part(z):
    torch.chunk(z, 2, 1)[0].add_(1.0)
    return z


def of_relu(z):
    nn.functional.relu(z.transpose(2, 3), inplace=True)
    return z


@pytest.mark.parametrize("change", [of_slice, of_shape, of_part, of_relu])
def test_a_view_that_is_changed_and_read_through_its_tensor_is_refused(change):
    with pytest.raises(QatTricksError, match=r"changes a view of a tensor in place .* torch\.cat"):
        trace(ChangesView(change).eval())


def read_through_the_view(z):
    return z.view(z.shape[0], 8, -1).mul_(2.0).view_as(z).view(z.shape)


def parts_apart(z):
    first, second = z.chunk(2, 1)
    return torch.cat([first.add_(1.0), second], 1)


def of_a_copy(z):
    z[:, [0, 1]].mul_(3.0)  # which is lost in PyTorch too
    return z


@pytest.mark.parametrize("change", [read_through_the_view, parts_apart, of_a_copy])
def test_a_view_that_is_changed_and_read_itself_is_followed(change, tmp_path):
    net, x = ChangesView(change).eval(), images(64)
    quantized = qat_tricks.quantize(net, [x])
    with torch.no_grad():
        assert output_error(net(x), quantized(x)).sqnr_db > 30
    report = qat_tricks.export_onnx(quantized, tmp_path / "net.onnx", x[:2], images=[x])
    assert report.sqnr_db > 60
