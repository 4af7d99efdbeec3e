import pytest
import torch
import torchvision
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import (
    activation_quantizers,
    float_mode,
    layers,
    place_quantizers,
    spec_of,
    trace,
)
from qat_tricks.graph.fold import batchnorms_to_convs
from qat_tricks.tricks import fold_batchnorm
from tests.helpers.nets import images, small_net


def _placed(net=None, **settings):
    return place_quantizers(trace(net or small_net()), **settings)


def test_float_mode_is_the_float_function():
    traced = _placed()
    with float_mode(traced):
        torch.testing.assert_close(traced(images()), small_net()(images()))


def test_points_are_where_integer_kernels_have_them():
    activations = spec_of(_placed())["activations"]
    points = {
        node: entry["activation"] for entry in activations.values() for node in entry["nodes"]
    }
    assert points == {
        "x": None,  # the image
        "stem_2": "relu",
        "block_relu": "relu",
        "block_bn2": None,
        "block_relu_1": "relu",  # the residual add's
        "depthwise_2": "relu6",
        "relu": "relu",
        "relu_1": "relu",
        "mean": None,
    }  # and none after the head: an integer kernel hands out float logits


def test_concat_inputs_share_one_quantizer():
    entry = spec_of(_placed())["activations"]["relu"]
    assert entry["nodes"] == ["relu", "relu_1"]


class MixedConcat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c(torch.cat([torch.relu(self.a(x)), self.b(x)], 1)).flatten(1)


def test_a_concat_of_relus_and_others_has_a_grid_of_its_own():
    traced = _placed(MixedConcat())
    found = {
        name: (entry["activation"], entry["nodes"])
        for name, entry in spec_of(traced)["activations"].items()
    }
    assert found == {
        "x": (None, ["x"]),
        "relu": ("relu", ["relu"]),  # stands in for the ReLU, as the conv's kernel needs it
        "b": (None, ["b"]),
        "cat": (None, ["cat"]),
        "c": (None, ["c"]),
    }
    with float_mode(traced):
        torch.testing.assert_close(traced(images(2)), MixedConcat.forward(traced, images(2)))


class SharedInPlace(nn.Module):
    """The shortcut reads what an in-place ReLU has overwritten."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.a(x)
        return (self.b(nn.functional.relu(y, inplace=True)) + y).mean([2, 3])


def test_in_place_relu_with_another_reader_keeps_its_effect():
    net = SharedInPlace()
    traced = _placed(net)
    with float_mode(traced):
        torch.testing.assert_close(traced(images(2)), net(images(2)))


def test_first_and_last_layer_stay_at_eight_bits():
    traced = _placed(weight_bits=4, activation_bits=4)
    bits = {name: layer.weight_quantizer.scheme.bits for name, layer in layers(traced).items()}
    assert {name for name, b in bits.items() if b == 8} == {"stem.0", "head"}
    inputs = {name: layer.input_quantizer[0].scheme.bits for name, layer in layers(traced).items()}
    assert {name for name, b in inputs.items() if b == 8} == {"stem.0", "head"}
    everywhere = _placed(weight_bits=4, activation_bits=4, first_last_bits=None)
    assert {layer.weight_quantizer.scheme.bits for layer in layers(everywhere).values()} == {4}


def test_of_two_heads_both_are_last_layers():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.classes, self.embedding = nn.Linear(8, 10), nn.Linear(8, 4)

        def forward(self, x):
            x = self.body(self.stem(x).relu()).relu().mean((2, 3))
            return {"logits": self.classes(x), "features": self.embedding(x)}

    traced = _placed(TwoHeads(), weight_bits=4)
    bits = {name: layer.weight_quantizer.scheme.bits for name, layer in layers(traced).items()}
    assert bits == {"stem": 8, "body": 4, "classes": 8, "embedding": 8}


def _bits(traced):
    return {
        name.rpartition(".")[2]: quantizer.scheme.bits
        for name, quantizer in activation_quantizers(traced).items()
    }


def test_only_what_layers_read_has_few_bits():
    bits = _bits(_placed(weight_bits=4, activation_bits=4))
    # The residual add takes this tensor as it is, and a conv takes it with fewer bits.
    assert bits["stem_2"] == 8
    assert bits["stem_2_for_layers"] == 4
    # A conv reads this one alone, and nothing but convs that one.
    assert bits["block_relu"] == bits["block_relu_1"] == 4
    assert bits["block_bn2"] == 8  # which the add reads
    assert bits["relu"] == 8  # which an average reads


class Stream(nn.Module):
    """A residual stream that three layers read, one of them behind a pool."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.c, self.head = nn.Conv2d(4, 4, 2), nn.Linear(4, 10)

    def forward(self, x):
        x = self.stem(x)
        y = self.c(nn.functional.max_pool2d(x, 3, 1, 1))
        z = x + self.a(x) + self.b(x)
        return self.head(y.mean((2, 3)) + z.mean((2, 3)))


def test_layers_that_read_a_stream_share_a_grid_of_few_bits():
    traced = _placed(Stream(), weight_bits=4, activation_bits=4)
    bits = _bits(traced)
    assert bits["stem"] == 8
    assert bits["stem_for_layers"] == 4
    narrow = traced.activation_quantizers.stem_for_layers
    for name in "abc":
        assert layers(traced)[name].input_quantizer == (narrow,)
    entry = spec_of(traced)["activations"]["stem_for_layers"]
    assert entry["nodes"] == ["stem", "max_pool2d"]
    assert entry["readers"] == ["c", "a", "b"]
    # Each tensor is rounded once for all layers that read it.
    calls = [node for node in traced.graph.nodes if str(node.target).endswith("stem_for_layers")]
    assert len(calls) == 2
    # The add has the values of 8 bits.
    (add,) = (node for node in traced.graph.nodes if node.name == "add")
    assert str(add.all_input_nodes[0].target) == "activation_quantizers.stem"
    with float_mode(traced):
        torch.testing.assert_close(traced(images(2)), Stream.forward(traced, images(2)))


def test_a_node_may_have_the_name_of_a_grid_for_layers():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stem_for_layers = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)
            self.head = nn.Linear(4, 10)

        def forward(self, x):
            x = self.stem(x)
            return self.head((x + self.stem_for_layers(x)).mean((2, 3)))

    traced = _placed(Named(), weight_bits=4, activation_bits=4)
    assert _bits(traced).items() >= {"stem": 8, "stem_for_layers": 8, "stem_for_layers_": 4}.items()
    with float_mode(traced):
        torch.testing.assert_close(traced(images(2)), Named.forward(traced, images(2)))


def test_whatever_computes_in_float_reads_eight_bits():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 10)

        def forward(self, x):
            x = self.stem(x)
            y = self.body(x).mean((2, 3))
            return self.head(y), self.norm(x.mean((2, 3))), x

    bits = _bits(_placed(Heads(), weight_bits=4, activation_bits=4))
    assert bits["stem"] == 8
    assert bits["stem_for_layers"] == 4


def test_with_eight_bits_there_is_one_grid_for_all():
    for settings in ({}, {"weight_bits": 4}, {"activation_bits": 4, "exclude": ["block.*"]}):
        found = _bits(_placed(**settings))
        assert not any(name.endswith("_for_layers") for name in found), settings


def test_include_exclude_and_overrides():
    traced = _placed(
        include=["block.*", "left", "right"],
        exclude=["block.conv2"],
        overrides={"le*": {"weight_bits": 3}},
    )
    bits = {
        name: layer.weight_quantizer.scheme.bits
        for name, layer in layers(traced).items()
        if layer.weight_quantizer
    }
    assert bits == {"block.conv1": 8, "left": 3, "right": 8}


@pytest.mark.parametrize(
    "settings",
    [{"include": ["stm*"]}, {"exclude": ["stm*"]}, {"overrides": {"stm*": {"weight_bits": 4}}}],
)
def test_a_pattern_that_matches_nothing_is_an_error(settings):
    with pytest.raises(QatTricksError, match=r'"stm\*" matches no'):
        _placed(**settings)


def test_an_unknown_override_is_an_error():
    with pytest.raises(QatTricksError, match="weight_bits"):
        _placed(overrides={"head": {"weigth_bits": 4}})


def test_nothing_left_is_an_error():
    with pytest.raises(QatTricksError, match="no conv or linear layer is left"):
        _placed(exclude=["*"])


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v2", "squeezenet1_1", "googlenet", "densenet121", "shufflenet_v2_x1_0"],
)
def test_every_layer_of_common_networks_has_a_quantized_input(name):
    net = getattr(torchvision.models, name)(
        num_classes=10, **({"init_weights": False} if name == "googlenet" else {})
    ).eval()
    traced = _placed(net)
    assert all(layer.input_quantizer for layer in layers(traced).values())
    x = torch.randn(1, 3, 64, 64)
    with float_mode(traced), torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(
            traced(x), expected if torch.is_tensor(expected) else expected[0], rtol=1e-4, atol=1e-5
        )
    assert len(activation_quantizers(traced)) == len(spec_of(traced)["activations"])


class Biased(nn.Module):
    """A bias for all images alike, made of a table by linears, and a shift reshaped."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(8, 2))
        self.shift = nn.Parameter(torch.randn(8))
        self.make = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
        self.fc, self.last = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.last(self.fc(x) + self.make(self.table).view(1, 8) * self.shift.reshape(1, 8))


def test_what_depends_on_no_image_is_left_alone():
    spec = spec_of(_placed(Biased().eval()))
    assert set(spec["layers"]) == {"fc", "last"}
    assert set(spec["activations"]) == {"x", "fc", "add"}


def test_a_batchnorm_that_became_a_conv_has_eight_bits():
    """One product a value: fewer bits would round the tensor once more, and save nothing."""

    class ReluThenBatchnorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
            self.b, self.c, self.fc = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            x = self.norm(self.a(x).relu())
            return self.fc(self.c(self.b(x).relu()).mean((2, 3)))

    traced = trace(ReluThenBatchnorm().eval())
    fold_batchnorm(traced)
    assert batchnorms_to_convs(traced) == ["norm"]
    place_quantizers(traced, weight_bits=4, activation_bits=4)
    bits = {name: layer.weight_quantizer.scheme.bits for name, layer in layers(traced).items()}
    assert bits == {"a": 8, "norm": 8, "b": 4, "c": 4, "fc": 8}
    read = {name: layer.input_quantizer[0].scheme.bits for name, layer in layers(traced).items()}
    assert read == {"a": 8, "norm": 8, "b": 4, "c": 4, "fc": 8}


def test_an_untraced_layer_stays_in_float():
    traced = place_quantizers(trace(small_net(), untraced=["stem.0", "block"]))
    assert layers(traced)
    assert layers(traced).keys().isdisjoint({"stem.0", "block.conv1", "block.conv2"})
