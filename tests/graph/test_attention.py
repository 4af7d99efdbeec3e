import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from qat_tricks.graph import is_layer, rebuild, spec_of, trace
from qat_tricks.tricks import calibrate, quantize


class Encoder(nn.Module):
    def __init__(self, dropout=0.0, need_weights=False):
        super().__init__()
        self.norm, self.need_weights = nn.LayerNorm(16), need_weights
        self.attention = nn.MultiheadAttention(16, 4, dropout=dropout, batch_first=True)
        self.fc = nn.Linear(16, 5)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x):
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=self.need_weights)
        return self.fc((x + y).mean(1))


def tokens(count=8):
    return torch.randn(count, 6, 16, generator=torch.Generator().manual_seed(0))


def test_the_function_stays_and_its_projections_are_layers():
    net = Encoder().eval()
    traced = trace(net)
    torch.testing.assert_close(traced(tokens()), net(tokens()))
    torch.testing.assert_close(traced(tokens(3)), net(tokens(3)))  # no size of a batch is frozen
    found = {name for name, module in traced.named_modules() if is_layer(module)}
    assert found == {"attention.in_proj", "attention.out_proj", "fc"}
    assert traced.get_submodule("attention.in_proj").weight is net.attention.in_proj_weight
    assert traced.get_submodule("attention.out_proj").weight is net.attention.out_proj.weight


def test_projections_are_quantized_and_rebuilt():
    traced = calibrate(quantize(trace(Encoder().eval())), [tokens()]).eval()
    assert set(spec_of(traced)["layers"]) == {"attention.in_proj", "attention.out_proj", "fc"}
    rebuilt = rebuild(Encoder(), spec_of(traced)).eval()
    rebuilt.load_state_dict(traced.state_dict())
    assert torch.equal(rebuilt(tokens()), traced(tokens()))


def test_dropout_of_attention_follows_the_mode():
    traced = trace(Encoder(dropout=0.5).eval())
    assert torch.equal(traced(tokens()), traced(tokens()))
    assert not torch.equal(traced.train()(tokens()), traced(tokens()))


def test_attention_whose_weights_are_read_stays_whole():
    net = Encoder(need_weights=True).eval()
    traced = trace(net)
    assert [name for name, module in traced.named_modules() if is_layer(module)] == ["fc"]
    torch.testing.assert_close(traced(tokens()), net(tokens()))


class Windows(nn.Module):
    def __init__(self, kind, shift, **settings):
        super().__init__()
        self.attention = kind(8, [4, 3], shift, 2, **settings)
        self.fc = nn.Linear(8, 5)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        return self.fc(x + self.attention(x))


def fields(height, width, count=2):
    return torch.randn(count, height, width, 8, generator=torch.Generator().manual_seed(0))


KINDS = [ShiftedWindowAttention, ShiftedWindowAttentionV2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [(0, 0), (2, 1), (0, 1), (2, 0)], ids=str)
# Whole windows, padding on both sides or one, a window as large as one side, or larger than all.
@pytest.mark.parametrize("size", [(8, 9), (9, 7), (8, 7), (4, 9), (9, 3), (3, 2)], ids=str)
def test_attention_in_windows_stays_the_function_it_was(kind, shift, size):
    torch.manual_seed(0)
    net = Windows(kind, list(shift)).eval()
    traced = trace(net)
    expected = net(fields(*size)).detach()
    torch.testing.assert_close(
        traced(fields(*size)), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_projections_in_windows_are_layers_under_their_own_names(kind, bias):
    net = Windows(kind, [2, 1], qkv_bias=bias, proj_bias=bias).eval()
    keys = net.state_dict().keys() - {
        "attention.relative_coords_table",
        "attention.relative_position_index",
    }
    traced = quantize(trace(net))
    # Not what makes V2's position bias, which depends on no image; nor are the scores that it is
    # added to.
    assert set(spec_of(traced)["layers"]) == {"attention.qkv", "attention.proj", "fc"}
    # the input, query with key and value, what is mixed, projected and added
    assert len(spec_of(traced)["activations"]) == 5
    calibrate(traced, [fields(8, 9)]).eval()
    assert traced.get_submodule("attention.qkv").weight is net.attention.qkv.weight
    assert keys <= traced.state_dict().keys()
    rebuilt = rebuild(Windows(kind, [2, 1], qkv_bias=bias, proj_bias=bias), spec_of(traced)).eval()
    rebuilt.load_state_dict(traced.state_dict())
    assert torch.equal(rebuilt(fields(8, 9)), traced(fields(8, 9)))


@pytest.mark.parametrize("setting", ["dropout", "attention_dropout"])
def test_dropout_in_windows_follows_the_mode(setting):
    traced = trace(Windows(ShiftedWindowAttention, [2, 1], **{setting: 0.5}).eval())
    assert torch.equal(traced(fields(8, 9)), traced(fields(8, 9)))
    assert not torch.equal(traced.train()(fields(8, 9)), traced(fields(8, 9)))


def test_attention_in_windows_can_be_kept_whole():
    net = Windows(ShiftedWindowAttention, [2, 1]).eval()
    traced = trace(net, untraced=["attention"])
    assert [name for name, module in traced.named_modules() if is_layer(module)] == [
        "attention.qkv",
        "attention.proj",
        "fc",
    ]
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == [
        "attention",
        "fc",
    ]
    assert torch.equal(traced(fields(8, 9)), net(fields(8, 9)))
