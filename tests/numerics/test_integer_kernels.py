"""The simulation of integer kernels against ONNX Runtime's own."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from qat_tricks.numerics import ActivationQuantizer, Scheme
from qat_tricks.numerics import integer_kernels as kernels
from qat_tricks.numerics.scheme import ACTIVATIONS


def _grid(low, high, scheme=None):
    quantizer = ActivationQuantizer(scheme or Scheme())
    quantizer.set_range(low, high)
    return quantizer


def _integers(values, grid):
    return (torch.round(values / grid.scale) + grid.zero_point).to(
        torch.int8 if grid.scheme.signed else torch.uint8
    )


def _run(op, domain, inputs, feed):
    initializers = [
        helper.make_tensor(name, *value)
        for name, value in inputs.items()
        if isinstance(value, tuple)
    ]
    kind = helper.np_dtype_to_tensor_dtype(next(iter(feed.values())).dtype)
    values = [helper.make_tensor_value_info(name, kind, feed[name].shape) for name in feed]
    node = helper.make_node(op, list(inputs), ["out"], domain=domain)
    out = helper.make_tensor_value_info("out", kind, None)
    graph = helper.make_graph([node], "kernel", values, [out], initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def _scalar(quantizer):
    scale = (TensorProto.FLOAT, [], [float(quantizer.scale)])
    kind = TensorProto.INT8 if quantizer.scheme.signed else TensorProto.UINT8
    return scale, (kind, [], [int(quantizer.zero_point)])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("op", "kernel", "function"),
    [("QLinearAdd", kernels.add, torch.add), ("QLinearMul", kernels.multiply, torch.mul)],
)
@pytest.mark.parametrize(
    "scheme", [Scheme(**signs) for signs in ACTIVATIONS.values()], ids=ACTIVATIONS
)
def test_adds_and_products_differ_nowhere(op, kernel, function, seed, scheme):
    ends = np.random.default_rng(seed).uniform(1, 60, (3, 2))
    x_grid, y_grid, out_grid = (_grid(-low, high, scheme) for low, high in ends.tolist())
    every = torch.arange(scheme.qmin, scheme.qmax + 1).to(
        torch.int8 if scheme.signed else torch.uint8
    )
    qx, qy = (q.flatten().contiguous() for q in torch.meshgrid(every, every, indexing="ij"))
    x, y = ((q.float() - grid.zero_point) * grid.scale for q, grid in ((qx, x_grid), (qy, y_grid)))
    with torch.no_grad():
        simulated = _integers(kernel(x, y, x_grid, y_grid, out_grid), out_grid)
    (sx, zx), (sy, zy), (so, zo) = map(_scalar, (x_grid, y_grid, out_grid))
    inputs = {"x": None, "sx": sx, "zx": zx, "y": None, "sy": sy, "zy": zy, "so": so, "zo": zo}
    run = _run(op, "com.microsoft", inputs, {"x": qx.numpy(), "y": qy.numpy()})
    naive = _integers(out_grid(function(x, y)).detach(), out_grid)
    # Kernels of other processors fuse other products: there, at most as many differ as without all
    # this.
    differing = int((torch.from_numpy(run) != simulated).sum())
    assert differing == 0 or differing <= int((torch.from_numpy(run) != naive).sum())


@pytest.mark.parametrize("side", [1, 2, 7, 14])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(
    "scheme", [Scheme(**signs) for signs in ACTIVATIONS.values()], ids=ACTIVATIONS
)
def test_means_differ_nowhere(side, keepdim, scheme):
    random = np.random.default_rng(side)
    # on one grid, averages lie in the middle between two steps most often
    for same in (False, True):
        x_grid, out_grid = (
            _grid(*ends, scheme) for ends in random.uniform((-60, 1), (-1, 60), (2, 2)).tolist()
        )
        out_grid = x_grid if same else out_grid
        integers = random.integers(
            scheme.qmin,
            scheme.qmax + 1,
            (8, 128, side, side),
            np.int8 if scheme.signed else np.uint8,
        )
        x = (torch.from_numpy(integers).float() - x_grid.zero_point) * x_grid.scale.detach()
        with torch.no_grad():
            simulated = _integers(kernels.mean(x, x_grid, out_grid, keepdim=keepdim), out_grid)
        assert simulated.shape == (8, 128, *((1, 1) if keepdim else ()))
        (sx, zx), (so, zo) = map(_scalar, (x_grid, out_grid))
        inputs = {"x": None, "sx": sx, "zx": zx, "so": so, "zo": zo}
        run = _run("QLinearGlobalAveragePool", "com.microsoft", inputs, {"x": integers})
        assert (torch.from_numpy(run).view(simulated.shape) == simulated).all()
