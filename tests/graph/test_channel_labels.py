"""Which channels are tied, and which are fixed, for what a network does with them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_tricks.graph import trace
from qat_tricks.graph.channel_groups import find_channels
from qat_tricks.graph.channel_labels import NO_CHANNEL, Labels, follow_channels
from tests.helpers.nets import images, small_net
from tests.helpers.structures import Structure


def _net(compute, **parts):
    parts = {"a": nn.Conv2d(1, 8, 3, padding=1), "fc": nn.Linear(8, 4), **parts}
    return trace(Structure(compute, **parts).eval())


def _groups(net):
    return {group.name: group for group in find_channels(net, images(2)).groups}


def _reason(net, layer="a"):
    return find_channels(net, images(2)).fixed[layer]


def _pooled(s, x):
    return s.fc(x.mean((2, 3)))


def test_ties_join_and_a_reason_holds_for_all():
    labels = Labels()
    first, second = labels.new(3), labels.new(3)
    labels.tie(first, second, "unused")
    assert labels.roots(first).tolist() == labels.roots(second).tolist()
    labels.fix(second[:1], "read by a norm")
    assert labels.reason(int(first[0])) == "read by a norm"
    assert labels.reason(int(first[1])) is None
    labels.tie(first[1:2], torch.tensor([NO_CHANNEL]), "meets the image")
    assert labels.reason(int(second[1])) == "meets the image"


def test_a_residual_stream_is_one_group_and_a_concat_is_not():
    groups = _groups(trace(small_net()))
    assert {name: len(group.units) for name, group in groups.items()} == {
        "stem.0": 8,
        "block.conv1": 8,
        "left": 8,
        "right": 8,
    }


def test_labels_of_the_classes_are_fixed():
    channels = find_channels(trace(small_net()), images(2))
    assert channels.fixed == {"head": "it is an output of the network"}
    assert set(channels.rows["head.weight"].tolist()) == {NO_CHANNEL}


def test_groups_of_a_conv_go_as_a_whole():
    net = _net(lambda s, x: _pooled(s, s.d(F.relu(s.a(x)))), d=nn.Conv2d(8, 8, 3, groups=4))
    group = _groups(net)["a"]
    assert (len(group.units), group.channels) == (4, 2)


@pytest.mark.parametrize(
    ("name", "compute", "parts", "units"),
    [
        (
            "shuffle by views",
            lambda s, x: _pooled(
                s, s.a(x).view(x.size(0), 2, -1, 8, 8).transpose(1, 2).flatten(1, 2)
            ),
            {},
            4,
        ),
        ("shuffle", lambda s, x: _pooled(s, F.channel_shuffle(s.a(x), 2)), {}, 4),
        ("halves", lambda s, x: _pooled(s, torch.cat(s.a(x).chunk(2, 1)[::-1], 1)), {}, 4),
        (
            "pixel shuffle",
            lambda s, x: s.fc(F.pixel_shuffle(s.a(x), 2).flatten(1)),
            {"fc": nn.Linear(512, 4)},
            2,
        ),
        ("flattened", lambda s, x: s.fc(s.a(x).flatten(1)), {"fc": nn.Linear(512, 4)}, 8),
        (
            "squeeze and excite",
            lambda s, x: _pooled(s, s.a(x) * torch.sigmoid(s.b(x).mean((2, 3), keepdim=True))),
            {"b": nn.Conv2d(1, 8, 3)},
            8,
        ),
        (
            "attention of positions",
            lambda s, x: _pooled(s, s.a(x) * torch.sigmoid(s.b(x))),
            {"b": nn.Conv2d(1, 1, 3, padding=1)},
            8,
        ),
        (
            "a factor a channel",
            lambda s, x: _pooled(s, s.a(x) * s.scale),
            {"scale": torch.ones(8, 1, 1)},
            8,
        ),
        ("prelu", lambda s, x: _pooled(s, s.p(s.a(x))), {"p": nn.PReLU(8)}, 8),
        ("called twice", lambda s, x: _pooled(s, s.a(x) + s.a(-x)), {}, 8),
    ],
)
def test_units_of(name, compute, parts, units):
    group = _groups(_net(compute, **parts))["a"]
    assert (len(group.units), len(group.units) * group.channels) == (units, 8)


@pytest.mark.parametrize(
    ("compute", "parts", "reason"),
    [
        (
            lambda s, x: _pooled(s, s.a(x) + x.expand(-1, 8, -1, -1)),
            {},
            "combines it with what has no channels",
        ),
        (
            lambda s, x: s.fc(s.n(s.a(x).mean((2, 3)))),
            {"n": nn.LayerNorm(8)},
            "computes with all channels",
        ),
        (lambda s, x: s.fc(s.a(x).mean((2, 3)).view(-1, 8)), {}, "a constant shape"),
        (lambda s, x: s.fc(torch.softmax(s.a(x).mean((2, 3)), 1)), {}, "computes with all"),
        (
            lambda s, x: s.fc(s.a(x)[:, :4].mean((2, 3))),
            {"fc": nn.Linear(4, 4)},
            "takes some channels by their number",
        ),
        (
            lambda s, x: s.fc(torch.split(s.a(x), 4, 1)[0].mean((2, 3))),
            {"fc": nn.Linear(4, 4)},
            "splits it at a constant number",
        ),
        (
            lambda s, x: s.fc(F.pad(s.a(x), (0, 0, 0, 0, 1, 1)).mean((2, 3))),
            {"fc": nn.Linear(10, 4)},
            "a constant number of channels",
        ),
        (lambda s, x: s.fc(s.a(x).mean(1).flatten(1)), {"fc": nn.Linear(64, 4)}, "mixes"),
        (
            lambda s, x: _pooled(s, s.a(x)) + F.linear(x.mean((2, 3)), s.a.weight[:4, 0, 0, :1]),
            {},
            "shares its parameters",
        ),
    ],
)
def test_the_reason_for_channels_that_stay_is_told(compute, parts, reason):
    assert reason in _reason(_net(compute, **parts))


def test_what_only_training_reads_is_fixed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc, self.aux = nn.Conv2d(1, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            x = self.a(x).mean((2, 3))
            return self.fc(x) + self.aux(x) if self.training else self.fc(x)

    assert "in training" in _reason(trace(Net().eval()))


def test_following_leaves_the_network_as_it_is():
    traced = trace(small_net())
    traced.train()
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    followed = follow_channels(traced, images(2))
    assert traced.training
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())
    assert set(followed.read) == {
        *("stem.0", "block.conv1", "block.conv2", "depthwise.0", "left", "right", "head")
    }
