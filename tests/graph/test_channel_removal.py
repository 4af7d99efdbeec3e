"""What is left after channels were removed computes what it did with them masked."""

import copy

import pytest
import torch

from qat_tricks.graph import layers, spec_of, trace
from qat_tricks.graph.channel_groups import find_channels
from qat_tricks.graph.channel_removal import mask_channels, missing_tensors, remove_channels, resize
from qat_tricks.graph.equivalence import tensors_in
from tests.helpers.nets import images, small_net
from tests.helpers.structures import STRUCTURES, built, inputs, ratio


def _some(channels, seed=0):
    """About half of the units of each group, at least one of them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.units[i]
        for group in channels.groups
        for i in torch.randperm(len(group.units), generator=generator)[: len(group.units) // 2]
    }


@torch.no_grad()
@pytest.mark.parametrize("name", STRUCTURES)
def test_masked_channels_can_be_removed_and_the_shapes_rebuilt(name):
    build, shape = STRUCTURES[name]
    x = inputs(shape)
    traced = trace(built(build))
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    channels = find_channels(traced, x)
    removed = _some(channels)
    mask_channels(traced, channels, removed)
    expected = tensors_in(traced(x))
    shapes = remove_channels(traced, channels, removed)
    assert bool(shapes) == bool(removed)
    for masked, left in zip(expected, tensors_in(traced(x)), strict=True):
        assert ratio(masked, left) > 120
    again = trace(built(build, seed=1))
    assert missing_tensors(again, shapes) == []
    resize(again, shapes)
    again.load_state_dict(traced.state_dict())
    for left, rebuilt in zip(tensors_in(traced(x)), tensors_in(again(x)), strict=True):
        assert torch.equal(left, rebuilt)
    assert any(value.shape != before[key].shape for key, value in again.state_dict().items()) == (
        bool(removed)
    )


# Networks of one layer, layers that all channels pass a norm behind, or shapes that the code fixes.
def test_most_structures_have_channels_that_can_go():
    movable = [
        name
        for name, (build, shape) in STRUCTURES.items()
        if find_channels(trace(built(build)), inputs(shape)).groups
    ]
    assert len(movable) >= 75, sorted(set(STRUCTURES) - set(movable))


@torch.no_grad()
def test_parameters_stay_the_objects_that_they_are():
    traced = trace(small_net())
    held = dict(traced.named_parameters())
    channels = find_channels(traced, images())
    remove_channels(traced, channels, _some(channels))
    assert all(parameter is held[name] for name, parameter in traced.named_parameters())
    conv = traced.get_submodule("block.conv1")
    assert (conv.out_channels, conv.in_channels) == tuple(conv.weight.shape[:2]) == (4, 4)
    assert traced.get_submodule("block.bn1").num_features == 4
    assert traced.get_submodule("depthwise.0").groups == 4
    assert traced.get_submodule("head").in_features == 8


def test_gradients_and_masks_have_the_shape_that_is_left():
    traced = trace(small_net())
    from qat_tricks.tricks import prune

    prune(traced, 0.5)
    traced(images()).sum().backward()
    channels = find_channels(traced, images())
    remove_channels(traced, channels, _some(channels))
    for layer in layers(traced).values():
        assert layer.weight_mask.shape == layer.weight.shape
        assert layer.weight.grad is None or layer.weight.grad.shape == layer.weight.shape
    traced(images()).sum().backward()


def test_a_network_that_lacks_what_was_removed_is_told():
    traced = trace(small_net())
    channels = find_channels(traced, images())
    shapes = remove_channels(copy.deepcopy(traced), channels, _some(channels))
    assert missing_tensors(traced, shapes) == []
    narrow = trace(small_net(width=2))
    assert "stem.0.weight" in missing_tensors(narrow, shapes)
    assert "other.weight" in missing_tensors(traced, {"other.weight": [1]})
    assert spec_of(traced).get("channels") is None
