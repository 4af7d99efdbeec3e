import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.block_values import BlockInterpreter, KeptTensor, chunks, keep_inputs
from qat_tricks.graph.blocks import Cells, find_blocks
from qat_tricks.graph.float_names import float_names
from qat_tricks.graph.grids import grid_of
from qat_tricks.numerics import ActivationQuantizer
from qat_tricks.numerics.scheme import ACTIVATIONS, activation_scheme
from tests.helpers.networks import Concatenated, PartlyRectified, Residual, images, quantized


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_tensor_on_a_grid_is_kept_exactly_in_a_byte(activations):
    grid = ActivationQuantizer(activation_scheme(8, activations))
    grid.set_range(-1.3, 2.9)
    x = grid(torch.randn(6, 3, 4, 4)).detach()
    kept = KeptTensor(x.split(2), 6, grid)
    assert torch.equal(kept.of(torch.tensor([4, 1])), x[[4, 1]])
    assert kept._by_image.element_size() == 1


def test_other_values_are_kept_in_half_where_that_holds_them():
    x = torch.randn(4, 3)
    half = KeptTensor([x], 4).of(slice(1, 3))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, x[1:3], atol=1e-3, rtol=1e-3)
    for large in (x * 1e6, x.double()):
        assert torch.equal(KeptTensor([large], 4).of(slice(0, 4)), large)
    assert torch.equal(KeptTensor([x, x * 1e6], 8).of(slice(4, 8)), x * 1e6)
    assert torch.equal(KeptTensor([x], 4, exactly=True).of(slice(0, 4)), x)


def test_rows_of_an_image_stay_together():
    x = torch.arange(12.0).view(12, 1)  # four images of three rows
    kept = KeptTensor(x.split(6), 4)
    assert kept.of(torch.tensor([2, 0])).flatten().tolist() == [6, 7, 8, 0, 1, 2]


@pytest.mark.parametrize("kind", [Residual, Concatenated, PartlyRectified])
def test_blocks_one_after_the_other_compute_the_network(kind):
    traced = quantized(kind, activation_bits=4).eval()
    cells = Cells(traced, float_names(traced))
    x = images(40)
    interpreter = BlockInterpreter(traced)
    with torch.no_grad():
        kept = keep_inputs(cells.inputs, [x[:30], x[30:]])
        for block in find_blocks(cells):
            outputs = [
                interpreter.compute(block, {n.name: kept[n.name].of(part) for n in block.inputs})
                for part in chunks(40)
            ]
            kept[block.output.name] = KeptTensor(outputs, 40, grid_of(block.output, traced))
        assert torch.equal(torch.cat(outputs), torch.cat([traced(part) for part in x.split(32)]))


def test_images_of_several_sizes_are_refused():
    traced = quantized(Residual)
    cells = Cells(traced, float_names(traced))
    with pytest.raises(QatTricksError, match="give images of one size"):
        keep_inputs(cells.inputs, [images(2), images(2)[..., :16]])


def test_small_values_are_kept_as_well_as_large_ones():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 2.0**-12, 2.0**-27, 2.0**-60, 0.0):
        kept = KeptTensor([x * factor], 4).of(slice(0, 4))
        assert float((kept - x * factor).abs().amax()) <= 2.0**-10 * factor
