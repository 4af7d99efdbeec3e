import torch
from torch import nn

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
