"""Networks whose function depends on how many channels there are keep those channels."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import rebuild, spec_of, trace
from qat_tricks.graph.channel_check import DEPENDS, sound_channels
from qat_tricks.graph.channel_groups import find_channels
from qat_tricks.graph.channel_labels import follow_channels
from qat_tricks.graph.macs import macs_of_calls
from qat_tricks.tricks import prune, prune_channels
from tests.helpers.nets import images, small_net
from tests.helpers.structures import Structure, ratio

CONVS = {"a": (1, 8), "b": (8, 8), "c": (8, 8)}


def _net(compute, **parts):
    """Two convs, what ``compute`` makes of them, and a head of another conv and a linear."""
    torch.manual_seed(0)
    convs = {name: nn.Conv2d(*widths, 3, padding=1) for name, widths in CONVS.items()}
    return Structure(
        lambda s, x: s.fc(F.relu(s.c(compute(s, x))).mean((2, 3))),
        **{**convs, "fc": nn.Linear(8, 4), **parts},
    ).eval()


def _shaped_by_another(s, x):
    y = F.relu(s.a(x))
    n, c, h, w = y.shape
    return s.b(y).reshape(n, c, h * w).reshape(n, c, h, w)


SIZED = {
    "scaled by its channels": lambda s, x: s.b(s.a(x) * s.a(x).shape[1] ** -0.5),
    "divided by its values": lambda s, x: s.b(s.a(x) / s.a(x).numel() * 512),
    "shaped by another": _shaped_by_another,
    "shaped as another": lambda s, x: s.b(F.relu(s.a(x))).view_as(s.a(x)),
    "spread as another": lambda s, x: s.b(x0 := s.a(x)).mean((2, 3), True).expand(x0.shape),
}
BY_NUMBER = {
    "each by its number": lambda s, x: s.b(s.a(x)[:, [0, 1, 2, 3, 4, 5, 6, 7]]),
    "by a permutation": lambda s, x: s.b(s.a(x)[:, s.order]),
    "cut within a group": lambda s, x: s.b(F.pad(s.g(s.a(x))[:, :7], (0, 0, 0, 0, 0, 1))),
}


@pytest.mark.parametrize("name", SIZED)
def test_channels_whose_number_counts_stay(name, capfd):
    x = images(4)
    traced = trace(_net(SIZED[name]))
    channels = sound_channels(traced, find_channels(traced, x), x)
    assert channels.fixed["a"] == DEPENDS
    whole = sum(call.macs for call in macs_of_calls(traced, x))
    # The last conv's channels can go, and 0.95 is what is left with them.
    entry = prune_channels(traced, [x], share=0.95, multiple=1, least=0.0)
    assert entry["macs"] == [whole, sum(call.macs for call in macs_of_calls(traced, x))]
    assert traced(x).shape == (4, 4)
    assert capfd.readouterr().err == ""  # torch.fx prints what a graph raises


@pytest.mark.parametrize("name", BY_NUMBER)
def test_channels_that_are_named_by_number_stay(name):
    parts = {"g": nn.Conv2d(8, 8, 3, padding=1, groups=4)}
    net = _net(BY_NUMBER[name], **parts)
    net.register_buffer("order", torch.tensor([3, 1, 2, 0, 7, 6, 5, 4]))
    channels = find_channels(trace(net), images(4))
    assert "by their number" in channels.fixed["a"]
    assert not any(group.name == "order" for group in channels.groups)


def test_a_buffer_that_no_checkpoint_holds_keeps_its_channels():
    net = _net(lambda s, x: s.b(s.a(x) * s.v))
    net.register_buffer("v", torch.linspace(0.1, 2, 8).view(1, 8, 1, 1), persistent=False)
    twin = copy.deepcopy(net)
    traced, x = trace(net), images(16)
    prune_channels(traced, [x], share=0.8, multiple=1)
    assert traced.v.shape == (1, 8, 1, 1)
    again = rebuild(twin, spec_of(traced))
    again.load_state_dict(traced.state_dict())
    assert torch.equal(again(x), traced(x))


def test_a_layers_own_bias_read_elsewhere_keeps_its_channels():
    net = _net(lambda s, x: s.b(s.a(x)) + s.a.bias.view(1, -1, 1, 1))
    channels = find_channels(trace(net), images(4))
    assert "a" in channels.fixed
    assert "b" in channels.fixed


def test_what_an_untraced_part_yields_is_fixed():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return {"a": self.conv(x)}

    net = _net(lambda s, x: s.b(s.part(s.a(x))["a"]), part=Part())
    channels = find_channels(trace(net, untraced=["part"]), images(4))
    assert "a" in channels.fixed
    assert [group.name for group in channels.groups] == ["b", "c"]


def test_a_batch_of_one_image_is_followed_as_two():
    net = _net(lambda s, x: s.b(s.a(x)))
    net.compute = lambda s, x: s.fc(s.c(s.b(s.a(x))).mean((2, 3), keepdim=True).squeeze())
    followed = follow_channels(trace(net), images(1))
    assert set(followed.read) == {"a", "b", "c", "fc"}


def test_tokens_of_an_image_are_scored_together_and_what_has_no_gradient_is_told():
    def of_tokens(s, x):
        y = s.a(x).flatten(2).transpose(1, 2).reshape(-1, 8)
        return s.d(F.relu(s.e(y))).reshape(x.shape[0], 8, 8, 8).permute(0, 3, 1, 2)

    traced = trace(_net(of_tokens, e=nn.Linear(8, 16), d=nn.Linear(16, 8)))
    entry = prune_channels(traced, [images(4)], share=0.8, multiple=1)
    assert "e" in [group["name"] for group in entry["groups"]]

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        @torch.no_grad()
        def forward(self, x):
            return self.net(x)

    with pytest.raises(QatTricksError, match=r"taylor needs gradients.*take output_error"):
        prune_channels(trace(Frozen().eval()), [images(4)], multiple=1)


def test_pruned_weights_stay_zero_where_the_others_are_fitted():
    traced, x = trace(small_net()), images(64)
    prune(traced, 0.5)
    prune_channels(traced, [x], share=0.6, multiple=1)
    for layer in (traced.get_submodule(name) for name in ("block.conv2", "left", "head")):
        assert not layer.weight[layer.weight_mask == 0].any()
        assert layer.weight_mask.shape == layer.weight.shape
    assert ratio(traced(x), copy.deepcopy(traced)(x)) > 120
