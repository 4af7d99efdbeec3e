"""Small networks as people write them, one for each thing that surgery could get wrong.

``STRUCTURES`` has for each name a function that builds the module, in evaluation mode and always
with the same weights, and the shape of one input image.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

C, B, L = nn.Conv2d, nn.BatchNorm2d, nn.Linear
IMAGE = (3, 16, 16)


class Structure(nn.Module):
    """Modules by name, and the function of them that ``forward`` computes."""

    def __init__(self, compute: Callable[[Any, Any], Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def built(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The module, with BatchNorms of statistics and gains that are not trivial, and channels of
    very different ranges.
    """
    torch.manual_seed(seed)
    net = build()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine and not getattr(module, "keeps", False):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
            if module.running_var is not None:
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        elif type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
            out = module.weight.shape[0]
            factors = torch.logspace(-0.5, 0.5, out)[torch.randperm(out)]
            with torch.no_grad():
                module.weight.mul_(factors.view(-1, *[1] * (module.weight.dim() - 1)))
    return net.eval()


def inputs(shape: tuple[int, ...], count: int = 8, seed: int = 1) -> Tensor:
    """Random images ``[count, *shape]``."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def _norm(channels: int, gamma: float | Tensor, beta: float, kind: Any = B) -> nn.Module:
    """A BatchNorm of a given gain and bias."""
    norm = kind(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.as_tensor(gamma).expand(channels))
        norm.bias.fill_(beta)
    norm.keeps = True
    return norm


def _pooled(pool: Callable[[Tensor], Tensor] | nn.Module) -> Callable[[], nn.Module]:
    """Conv, a BatchNorm far above the ReLU's zero, ReLU, a pool, and a conv."""

    def build() -> nn.Module:
        parts = {"pool": pool} if isinstance(pool, nn.Module) else {}
        apply = (lambda s, x: s.pool(x)) if parts else (lambda s, x: pool(x))
        return Structure(
            lambda s, x: s.fc(
                F.relu(s.d(apply(s, F.relu(s.b(s.c(x)))))).mean((2, 3)),
            ),
            c=C(3, 8, 3, padding=1, bias=False),
            b=_norm(8, 0.5, 5.0),
            d=C(8, 8, 3),
            fc=L(8, 5),
            **parts,
        )

    return build


def _between(compute: Callable[[Any, Any], Any], **parts: Any) -> Callable[[], nn.Module]:
    """A structure whose parts are made anew by calling them."""
    return lambda: Structure(compute, **{name: part() for name, part in parts.items()})


def _head(compute: Callable[[Any, Any], Any], **parts: Any) -> Callable[[], nn.Module]:
    """Stem, what ``compute`` makes of it in eight channels, a conv, a mean and a linear."""
    return _between(
        lambda s, x: s.fc(F.relu(s.last(compute(s, F.relu(s.bn(s.c(x)))))).mean((2, 3))),
        c=lambda: C(3, 8, 3, padding=1, bias=False),
        bn=lambda: B(8),
        last=lambda: C(8, 8, 3, padding=1),
        fc=lambda: L(8, 5),
        **parts,
    )


def _recurrent(kind: Any) -> Callable[[], nn.Module]:
    def compute(s: Any, x: Tensor) -> Tensor:
        values, _ = s.rnn(F.relu(s.c(x)).flatten(2).transpose(1, 2))
        return s.fc(values[:, -1])

    return _between(compute, c=_c, rnn=lambda: kind(8, 8, batch_first=True), fc=lambda: L(8, 5))


def _attending(call: Callable[[Any, Tensor], Tensor], **parts: Any) -> Callable[[], nn.Module]:
    return _between(
        lambda s, x: s.fc(call(s, F.relu(s.c(x)).flatten(2).transpose(1, 2)).mean(1)),
        c=lambda: C(3, 8, 3, stride=4),
        attn=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        fc=lambda: L(8, 5),
        **parts,
    )


def _with_one_bias() -> nn.Module:
    """Two convs with one bias, a BatchNorm behind one of them."""
    net = _head(
        lambda s, x: F.relu(s.b(s.d(x))) + F.relu(s.e(x)),
        d=lambda: C(8, 8, 3),
        e=lambda: C(8, 8, 3),
        b=lambda: B(8),
    )()
    net.e.bias = net.d.bias
    return net


def _c() -> nn.Module:
    return C(3, 8, 3, padding=1)


def _reduced(reduce: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Conv, ReLU, ``reduce`` over height (dimension 2), and a linear over what is left of it."""
    return _between(
        lambda s, x: s.fc(reduce(F.relu(s.c(x))).flatten(1)), c=_c, fc=lambda: L(8 * 16, 5)
    )


def _in_place(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    z = s.relu(y)
    return s.fc(s.d(z + y).mean((2, 3)))


def _padded_by_its_size(s: Any, x: Tensor) -> Tensor:
    """A conv with stride 2 as TensorFlow pads it: more at the end, as the image's size asks for."""
    rows, columns = x.shape[-2:]
    down = max((math.ceil(rows / 2) - 1) * 2 + 3 - rows, 0)
    right = max((math.ceil(columns / 2) - 1) * 2 + 3 - columns, 0)
    return F.relu(s.d(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))))


def _squeeze_excite(s: Any, x: Tensor) -> Tensor:
    x = F.relu(s.c(x))
    gate = torch.sigmoid(s.up(F.relu(s.down(x.mean((2, 3), keepdim=True)))))
    return s.fc(F.relu(s.d(x * gate)).mean((2, 3)))


def _layer_scale(s: Any, x: Tensor) -> Tensor:
    x = F.relu(s.c(x))
    return s.fc((x + s.scale * s.d(x)).mean((2, 3)))


def _arcface(s: Any, x: Tensor) -> Tensor:
    f = F.relu(s.c(x)).mean((2, 3))
    return s.fc(f) + 10 * F.linear(F.normalize(f), F.normalize(s.fc.weight))


def _tied(s: Any, x: Tensor) -> Tensor:
    f = s.c(x).mean((2, 3))
    return F.linear(F.relu(s.fc(f)), s.fc.weight.t())


def _two_weights(s: Any, x: Tensor) -> Tensor:
    f = F.relu(s.c(x)).mean((2, 3))
    return F.linear(f, s.fc.weight * 2) + F.linear(f.sin(), F.normalize(s.fc.weight))


def _tied_embedding(s: Any, x: Tensor) -> Tensor:
    x = F.relu(s.c(x)).flatten(2)
    return F.linear(s.table(x.argmax(2)).mean(1) + x.mean(2), s.table.weight)


def _weight_norm(s: Any, x: Tensor) -> Tensor:
    weight = s.g * s.v / s.v.norm(dim=1, keepdim=True)
    return F.linear(F.relu(s.c(x)).mean((2, 3)), weight)


def _embedding(s: Any, x: Tensor) -> Tensor:
    x = F.relu(s.c(x)).flatten(2)
    best = x.argmax(2)
    return s.fc(s.table(best).mean(1) + x.mean(2))


def _masked(s: Any, x: Tensor) -> Tensor:
    x = s.c(x)
    mask = x > 0
    return s.fc(F.relu(s.d(x * mask + torch.where(mask, x, -x))).mean((2, 3)))


def _unpooled(s: Any, x: Tensor) -> Tensor:
    values, indices = F.max_pool2d(F.relu(s.c(x)), 2, return_indices=True)
    return s.fc(F.relu(s.d(F.max_unpool2d(values, indices, 2))).mean((2, 3)))


def _unpooled_modules(s: Any, x: Tensor) -> Tensor:
    values, indices = s.pool(F.relu(s.c(x)))
    return s.fc(F.relu(s.d(s.unpool(F.relu(s.e(values)), indices))).mean((2, 3)))


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # Linears over an axis that is no channel axis
    "linear_over_width": (
        _between(
            lambda s, x: s.fc(F.relu(s.l(F.relu(s.c(x)))).mean((2, 3))),
            c=lambda: C(1, 16, 3, padding=1), l=lambda: L(16, 12), fc=lambda: L(16, 5),
        ),
        (1, 16, 16),
    ),
    "linear_over_width_last": (
        _between(
            lambda s, x: s.l(F.relu(s.c(x))).mean((1, 2)),
            c=lambda: C(1, 32, 3, padding=1), l=lambda: L(32, 16),
        ),
        (1, 32, 32),
    ),
    "linear_over_positions": (
        _between(
            lambda s, x: s.fc(F.relu(s.l(F.relu(s.c(x)).flatten(2))).mean(2)),
            c=lambda: C(3, 16, 4, stride=4), l=lambda: L(16, 12), fc=lambda: L(16, 5),
        ),
        IMAGE,
    ),
    "linear_over_time": (
        _between(
            lambda s, x: s.fc(F.relu(s.l(F.relu(s.c(x)))).mean(2)),
            c=lambda: nn.Conv1d(3, 16, 3, padding=1), l=lambda: L(16, 12), fc=lambda: L(16, 5),
        ),
        (3, 16),
    ),
    "permuted_linear": (
        _between(
            lambda s, x: s.fc(F.relu(s.l(F.relu(s.c(x)).permute(0, 2, 3, 1))).mean((1, 2))),
            c=lambda: C(3, 16, 3, padding=1), l=lambda: L(16, 12), fc=lambda: L(12, 5),
        ),
        IMAGE,
    ),
    "transposed_wrongly": (
        _between(
            lambda s, x: s.fc(F.relu(s.l(F.relu(s.c(x)).transpose(1, 2))).mean((1, 2))),
            c=lambda: C(3, 16, 3, padding=1), l=lambda: L(16, 12), fc=lambda: L(12, 5),
        ),
        IMAGE,
    ),
    "linear_then_conv1d": (
        _between(
            lambda s, x: s.fc(F.relu(s.c(F.relu(s.l(x)))).mean(2)),
            l=lambda: L(6, 8), c=lambda: nn.Conv1d(8, 8, 1), fc=lambda: L(8, 5),
        ),
        (8, 6),
    ),
    "tokens_flattened": (
        _between(
            lambda s, x: s.fc(F.relu(s.l(x)).flatten(1)), l=lambda: L(6, 8), fc=lambda: L(64, 5)
        ),
        (8, 6),
    ),
    "tokens_mean_of_last_two": (
        _between(
            lambda s, x: s.fc(F.relu(s.l(x)).mean((-1, -2))), l=lambda: L(3, 8), fc=lambda: L(8, 5)
        ),
        (8, 4, 3),
    ),
    "conv_flatten_relu_linear": (
        _between(
            lambda s, x: s.fc(F.relu(s.c(x).flatten(1))), c=_c, fc=lambda: L(8 * 256, 5)
        ),
        IMAGE,
    ),
    "conv_flatten2_conv1d": (
        _between(
            lambda s, x: s.fc(F.relu(s.d(F.relu(s.c(x)).flatten(2))).mean(2)),
            c=_c, d=lambda: nn.Conv1d(8, 8, 3), fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "conv1d_pooled_as_image": (
        _between(
            lambda s, x: s.fc(F.relu(s.d(F.max_pool2d(F.relu(s.c(x)), 2))).mean(2)),
            c=lambda: nn.Conv1d(3, 8, 3, padding=1), d=lambda: nn.Conv1d(4, 8, 1),
            fc=lambda: L(8, 5),
        ),
        (3, 16),
    ),
    "flatten_before_pool": (
        _between(
            lambda s, x: s.fc(
                F.relu(s.d(F.max_pool2d(F.relu(s.c(x)).flatten(2), 3, 1, 1))).mean(2)
            ),
            c=_c, d=lambda: nn.Conv1d(8, 8, 1), fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    # BatchNorms behind linears
    "linear_bn1d": (
        _between(
            lambda s, x: s.fc(F.relu(s.b(s.l(F.relu(s.c(x)).mean((2, 3)))))),
            c=_c, l=lambda: L(8, 12), b=lambda: nn.BatchNorm1d(12), fc=lambda: L(12, 5),
        ),
        IMAGE,
    ),
    "bn1d_over_length": (
        _between(
            lambda s, x: s.fc(F.relu(s.b(s.l(F.relu(s.c(x)).flatten(2)))).mean(2)),
            c=lambda: C(3, 8, 4, stride=4), l=lambda: L(16, 8), b=lambda: nn.BatchNorm1d(8),
            fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "bn1d_over_tokens": (
        _between(
            lambda s, x: s.fc(F.relu(s.b(s.l(x))).mean(1)),
            l=lambda: L(6, 8), b=lambda: nn.BatchNorm1d(8), fc=lambda: L(8, 5),
        ),
        (8, 6),
    ),
    "bn2d_over_rows": (
        _between(
            lambda s, x: s.fc(F.relu(s.b(s.l(F.relu(s.c(x))))).mean((2, 3))),
            c=lambda: C(3, 16, 3, padding=1), l=lambda: L(16, 16), b=lambda: B(16),
            fc=lambda: L(16, 5),
        ),
        IMAGE,
    ),
    "bn1d_transposed": (
        _between(
            lambda s, x: s.fc(F.relu(s.b(s.l(x).transpose(1, 2))).mean(2)),
            l=lambda: L(6, 8), b=lambda: nn.BatchNorm1d(8), fc=lambda: L(8, 5),
        ),
        (8, 6),
    ),
    "bn1d_on_flattened_tokens": (
        _between(
            lambda s, x: s.fc(F.relu(s.b(s.l(x).flatten(0, 1)).unflatten(0, (-1, 8))).mean(1)),
            l=lambda: L(6, 8), b=lambda: nn.BatchNorm1d(8), fc=lambda: L(8, 5),
        ),
        (8, 6),
    ),
    "bn1d_behind_conv1d": (
        _between(
            lambda s, x: s.fc(F.relu(s.b(s.c(x))).mean(2)),
            c=lambda: nn.Conv1d(3, 8, 3), b=lambda: nn.BatchNorm1d(8), fc=lambda: L(8, 5),
        ),
        (3, 16),
    ),
    "bn_behind_cat": (
        _between(
            lambda s, x: s.fc(F.relu(s.b(torch.cat([s.c(x), s.d(x)], 1))).mean((2, 3))),
            c=_c, d=_c, b=lambda: B(16), fc=lambda: L(16, 5),
        ),
        IMAGE,
    ),
    "bn_behind_cat_of_rows": (
        _between(
            lambda s, x: s.fc(F.relu(s.b(torch.cat([s.c(x), s.d(x)], 2))).mean((2, 3))),
            c=_c, d=_c, b=lambda: B(8), fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "bn_shared_by_two_convs": (
        _between(
            lambda s, x: s.fc((F.relu(s.b(s.c(x))) + F.relu(s.b(s.d(x)))).mean((2, 3))),
            c=_c, d=_c, b=lambda: B(8), fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "bn_negative_and_zero_gamma": (
        _between(
            lambda s, x: s.fc(F.relu(s.d(F.relu(s.b(s.c(x))))).mean((2, 3))),
            c=_c, b=lambda: _norm(8, torch.tensor([-1.0, 0, 1, -2, 0, 2, 1e-3, 1]), 2.0),
            d=lambda: C(8, 8, 3), fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    # Shifts through pools, pads and dropout
    "padded_avg_pool": (_pooled(nn.AvgPool2d(3, 2, padding=1)), IMAGE),
    "avg_pool_without_zeros": (_pooled(nn.AvgPool2d(3, 2, 1, count_include_pad=False)), IMAGE),
    "avg_pool_ceil": (_pooled(nn.AvgPool2d(3, 2, ceil_mode=True)), IMAGE),
    "avg_pool_ceil_padded": (
        _pooled(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)), IMAGE
    ),
    "avg_pool_divisor": (_pooled(lambda x: F.avg_pool2d(x, 2, divisor_override=3)), IMAGE),
    "padded_max_pool": (_pooled(nn.MaxPool2d(3, 2, padding=1)), IMAGE),
    "max_pool_ceil": (_pooled(nn.MaxPool2d(3, 2, ceil_mode=True)), IMAGE),
    "lp_pool": (_pooled(nn.LPPool2d(2, 2)), IMAGE),
    "zero_pad": (_pooled(lambda x: F.pad(x, (1, 1, 1, 1))), IMAGE),
    "zero_pad_module": (_pooled(nn.ZeroPad2d(1)), IMAGE),
    "constant_pad": (_pooled(lambda x: F.pad(x, (1, 1, 1, 1), value=1.0)), IMAGE),
    "reflection_pad": (_pooled(nn.ReflectionPad2d(1)), IMAGE),
    "replication_pad": (_pooled(nn.ReplicationPad2d(1)), IMAGE),
    "dropout_between": (_pooled(nn.Dropout(0.3)), IMAGE),
    "adaptive_pool": (_pooled(nn.AdaptiveAvgPool2d(5)), IMAGE),
    "adaptive_max_pool": (_pooled(nn.AdaptiveMaxPool2d(4)), IMAGE),
    "bilinear": (_pooled(nn.Upsample(scale_factor=2, mode="bilinear")), IMAGE),
    "nearest": (_pooled(nn.Upsample(scale_factor=2)), IMAGE),
    "shuffled_channels": (_pooled(nn.ChannelShuffle(2)), IMAGE),
    "pixel_shuffled_back": (
        _pooled(lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)), IMAGE
    ),
    "pixel_shuffle": (
        _head(
            lambda s, x: s.up(F.pixel_shuffle(x, 2)),
            up=lambda: C(2, 8, 3, stride=2, padding=1),
        ),
        IMAGE,
    ),
    "unfold": (
        _between(
            lambda s, x: s.fc(F.relu(s.l(F.unfold(F.relu(s.c(x)), 2, stride=2).mean(2)))),
            c=_c, l=lambda: L(32, 8), fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    # Kinds of convs
    "reflect_padded_conv": (
        _head(
            lambda s, x: F.relu(s.b(s.d(x))),
            d=lambda: C(8, 8, 3, padding=1, padding_mode="reflect"), b=lambda: _norm(8, 0.5, 5.0),
        ),
        IMAGE,
    ),
    "circular_padded_conv": (
        _head(
            lambda s, x: s.e(F.relu(s.b(s.d(x)))),
            d=lambda: C(8, 8, 3, padding=1), b=lambda: _norm(8, 0.5, 5.0),
            e=lambda: C(8, 8, 3, padding=1, padding_mode="circular"),
        ),
        IMAGE,
    ),
    "same_padded_conv": (
        _head(
            lambda s, x: s.e(F.relu(s.b(s.d(x)))),
            d=lambda: C(8, 8, 1), b=lambda: _norm(8, 0.5, 5.0),
            e=lambda: C(8, 8, 3, padding="same"),
        ),
        IMAGE,
    ),
    "padded_by_its_size": (_head(_padded_by_its_size, d=lambda: C(8, 8, 3, stride=2)), IMAGE),
    "valid_padded_conv": (
        _head(
            lambda s, x: s.e(F.relu(s.b(s.d(x)))),
            d=lambda: C(8, 8, 1), b=lambda: _norm(8, 0.5, 5.0),
            e=lambda: C(8, 8, 3, padding="valid"),
        ),
        IMAGE,
    ),
    "grouped_convs": (
        _head(
            lambda s, x: F.relu(s.e(F.relu(s.d(x)))),
            d=lambda: C(8, 12, 3, groups=4), e=lambda: C(12, 8, 3, groups=2),
        ),
        IMAGE,
    ),
    "transposed_conv": (
        _head(
            lambda s, x: F.relu(s.b(s.up(x))),
            up=lambda: nn.ConvTranspose2d(8, 8, 2, stride=2), b=lambda: B(8),
        ),
        IMAGE,
    ),
    "conv3d": (
        _between(
            lambda s, x: s.fc(F.relu(s.d(F.relu(s.b(s.c(x))))).mean((2, 3, 4))),
            c=lambda: nn.Conv3d(1, 8, 3), b=lambda: nn.BatchNorm3d(8),
            d=lambda: nn.Conv3d(8, 8, 3), fc=lambda: L(8, 5),
        ),
        (1, 6, 8, 8),
    ),
    "conv1d": (
        _between(
            lambda s, x: s.fc(F.relu(s.d(F.relu(s.c(x)))).mean(2)),
            c=lambda: nn.Conv1d(3, 8, 3), d=lambda: nn.Conv1d(8, 8, 3), fc=lambda: L(8, 5),
        ),
        (3, 16),
    ),
    "conv_called_twice": (
        _head(lambda s, x: F.relu(s.d(F.relu(s.d(x)))), d=lambda: C(8, 8, 3, padding=1)), IMAGE
    ),
    "conv_bn_called_twice": (
        _head(
            lambda s, x: F.relu(s.b(s.d(F.relu(s.b(s.d(x)))))),
            d=lambda: C(8, 8, 3, padding=1), b=lambda: B(8),
        ),
        IMAGE,
    ),
    # Activations
    "leaky_relu": (
        _head(
            lambda s, x: F.leaky_relu(s.b(s.d(x)), 0.2),
            d=lambda: C(8, 8, 3, padding=1), b=lambda: _norm(8, 0.5, 3.0),
        ),
        IMAGE,
    ),
    "prelu": (
        _head(lambda s, x: s.act(s.d(x)), d=lambda: C(8, 8, 3), act=lambda: nn.PReLU(8)), IMAGE
    ),
    "silu": (_head(lambda s, x: F.silu(s.d(x)), d=lambda: C(8, 8, 3)), IMAGE),
    "relu6": (
        _head(
            lambda s, x: F.relu6(s.e(F.relu6(s.d(x)))),
            d=lambda: C(8, 8, 3), e=lambda: C(8, 8, 3, groups=8),
        ),
        IMAGE,
    ),
    "in_place_relu_read_twice": (
        _between(
            _in_place, c=_c, relu=lambda: nn.ReLU(inplace=True), d=lambda: C(8, 8, 3),
            fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    # Several branches
    "residual_without_bn": (
        _head(lambda s, x: F.relu(x + s.d(x)), d=lambda: C(8, 8, 3, padding=1)), IMAGE
    ),
    "residual_before_relu": (
        _between(
            lambda s, x: s.fc(s.d(F.relu(y := s.c(x))).mean((2, 3)) + y.mean((2, 3))),
            c=_c, d=lambda: C(8, 8, 3), fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "squeeze_excite": (
        _between(
            _squeeze_excite, c=_c, down=lambda: C(8, 4, 1), up=lambda: C(4, 8, 1),
            d=lambda: C(8, 8, 3), fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "scale_parameter": (
        _head(
            lambda s, x: s.d(x) * s.scale,
            d=lambda: C(8, 8, 3), scale=lambda: torch.rand(8, 1, 1),
        ),
        IMAGE,
    ),
    "layer_scale": (
        _between(
            _layer_scale, c=_c, d=lambda: C(8, 8, 3, padding=1),
            scale=lambda: 0.1 * torch.rand(8, 1, 1), fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "cat_of_rows": (
        _head(
            lambda s, x: torch.cat([F.relu(s.d(x)), F.relu(s.e(x))], 2),
            d=lambda: C(8, 8, 3, padding=1), e=lambda: C(8, 8, 3, padding=1),
        ),
        IMAGE,
    ),
    "stacked": (
        _head(
            lambda s, x: torch.stack([F.relu(s.d(x)), F.relu(s.e(x))], 1).mean(1),
            d=lambda: C(8, 8, 3), e=lambda: C(8, 8, 3),
        ),
        IMAGE,
    ),
    "split_and_swapped": (
        _head(
            lambda s, x: torch.cat([(y := s.d(x).chunk(2, 1))[1], y[0]], 1), d=lambda: C(8, 8, 3)
        ),
        IMAGE,
    ),
    "unbound": (
        _head(
            lambda s, x: s.d(x).unflatten(1, (2, 8)).unbind(1)[1], d=lambda: C(8, 16, 3)
        ),
        IMAGE,
    ),
    "reshaped": (
        _head(
            lambda s, x: s.d(x.reshape(x.shape[0], 4, 2, 16, 16).transpose(1, 2).flatten(1, 2)),
            d=lambda: C(8, 8, 3),
        ),
        IMAGE,
    ),
    # Means and sums
    "mean_keepdim": (
        _between(
            lambda s, x: s.fc(F.relu(s.c(x)).mean((2, 3), keepdim=True).flatten(1)),
            c=_c, fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "mean_of_channels": (
        _between(
            lambda s, x: s.fc(F.relu(s.c(x)).mean(1).flatten(1)), c=_c, fc=lambda: L(256, 5)
        ),
        IMAGE,
    ),
    "mean_of_rows": (_reduced(lambda x: x.mean(2)), IMAGE),
    "sum_of_rows": (_reduced(lambda x: x.sum(2)), IMAGE),
    "amax_of_rows": (_reduced(lambda x: x.amax(2)), IMAGE),
    "norm_of_rows": (_reduced(lambda x: x.norm(dim=2)), IMAGE),
    # Tuples
    "max_of_rows": (_reduced(lambda x: torch.max(x, 2)[0]), IMAGE),
    "min_of_rows": (_reduced(lambda x: x.min(dim=2).values), IMAGE),
    "topk": (_reduced(lambda x: torch.topk(x, 2, dim=2)[0].mean(2)), IMAGE),
    "sorted": (_reduced(lambda x: torch.sort(x, dim=2)[0][:, :, 0]), IMAGE),
    "var_mean": (_reduced(lambda x: torch.var_mean(x, dim=2)[0]), IMAGE),
    "std_mean": (_reduced(lambda x: torch.std_mean(x, dim=2)[1]), IMAGE),
    "max_of_two": (_reduced(lambda x: torch.max(x[:, :, 0], x[:, :, 1])), IMAGE),
    "rnn": (_recurrent(nn.RNN), IMAGE),
    "lstm": (_recurrent(nn.LSTM), IMAGE),
    "gru": (_recurrent(nn.GRU), IMAGE),
    "attention": (_attending(lambda s, t: s.attn(t, t, t)[0]), IMAGE),
    "attention_without_weights": (
        _attending(lambda s, t: s.attn(t, t, t, need_weights=False)[0]), IMAGE
    ),
    "attention_by_keywords": (
        _attending(lambda s, t: s.attn(query=t, key=t, value=t)[0]), IMAGE
    ),
    "cross_attention": (_attending(lambda s, t: s.attn(t[:, :2], t, t)[0]), IMAGE),
    "attention_maps": (_attending(lambda s, t: s.attn(t, t, t)[1] @ t), IMAGE),
    "modules_made_in_forward": (
        _head(
            lambda s, x: nn.Softplus()(s.parts[:2](x)) + nn.AvgPool2d(3, 1, 1)(s.parts[2:](x)),
            parts=lambda: nn.Sequential(C(8, 8, 1), nn.ReLU(), C(8, 8, 3, padding=1), B(8)),
        ),
        IMAGE,
    ),
    "attention_without_heads": (
        _attending(lambda s, t: F.scaled_dot_product_attention(s.q(t), t, t), q=lambda: L(8, 8)),
        IMAGE,
    ),
    "attention_with_a_mask": (
        _attending(
            lambda s, t: F.scaled_dot_product_attention(
                s.q(t), t, t, attn_mask=torch.ones(16, 16, dtype=torch.bool).tril()
            ),
            q=lambda: L(8, 8),
        ),
        IMAGE,
    ),
    "rrelu": (
        _head(lambda s, x: F.rrelu(s.d(s.act(x))), d=lambda: C(8, 8, 3), act=nn.RReLU), IMAGE
    ),
    # Integers
    "embedding_of_argmax": (
        _between(
            _embedding, c=lambda: C(3, 8, 3, stride=4), table=lambda: nn.Embedding(16, 8),
            fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "masked": (_between(_masked, c=_c, d=lambda: C(8, 8, 3), fc=lambda: L(8, 5)), IMAGE),
    "arange_added": (
        _head(
            lambda s, x: s.d(x) + torch.arange(x.shape[3], device=x.device)[: x.shape[3] - 2] * 0.1,
            d=lambda: C(8, 8, 3),
        ),
        IMAGE,
    ),
    "mask_concatenated": (
        _between(
            lambda s, x: s.fc(F.relu(s.d(torch.cat([y := s.c(x), y > 0], 1))).mean((2, 3))),
            c=_c, d=lambda: C(16, 8, 3), fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "mask_averaged": (
        _head(
            lambda s, x: s.d(x) * (x > 0.5).float().mean((2, 3), keepdim=True),
            d=lambda: C(8, 8, 3, padding=1),
        ),
        IMAGE,
    ),
    "mask_of_mask": (
        _head(
            lambda s, x: s.d(x) * ((x > 0.2) & ~(x > 1.0)),
            d=lambda: C(8, 8, 3, padding=1),
        ),
        IMAGE,
    ),
    "unpooled_modules": (
        _between(
            _unpooled_modules, c=_c, pool=lambda: nn.MaxPool2d(2, return_indices=True),
            unpool=lambda: nn.MaxUnpool2d(2), d=lambda: C(8, 8, 3), e=lambda: C(8, 8, 1),
            fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "parts_concatenated": (
        _between(
            lambda s, x: s.fc(torch.cat(F.relu(s.c(x)).mean((2, 3)).unbind(1)).unflatten(0, (8, -1))
                              .t()),
            c=_c, fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "unpooled": (_between(_unpooled, c=_c, d=lambda: C(8, 8, 3), fc=lambda: L(8, 5)), IMAGE),
    # Weights used in several ways
    "normalized_head": (_between(_arcface, c=_c, fc=lambda: L(8, 5)), IMAGE),
    "tied_weight": (_between(_tied, c=_c, fc=lambda: L(8, 12)), IMAGE),
    "two_computed_weights": (_between(_two_weights, c=_c, fc=lambda: L(8, 5, bias=False)), IMAGE),
    "tied_embedding": (
        _between(
            _tied_embedding, c=lambda: C(3, 8, 3, stride=4), table=lambda: nn.Embedding(16, 8)
        ),
        IMAGE,
    ),
    "weight_called_and_read": (
        _between(
            lambda s, x: s.fc(F.relu(s.c(x)).mean((2, 3))) + F.linear(
                s.c(x).mean((2, 3)), s.fc.weight
            ),
            c=_c, fc=lambda: L(8, 5),
        ),
        IMAGE,
    ),
    "standardized_conv_beside_the_conv": (
        _head(
            lambda s, x: s.d(x) + F.conv2d(x, s.d.weight - s.d.weight.mean()),
            d=lambda: C(8, 8, 3),
        ),
        IMAGE,
    ),
    "blurred": (
        _head(
            lambda s, x: F.conv2d(F.relu(s.d(x)), s.kernel, stride=2, padding=1, groups=8),
            d=lambda: C(8, 8, 3), kernel=lambda: torch.rand(8, 1, 3, 3),
        ),
        IMAGE,
    ),
    "bias_shared_by_two_convs": (_with_one_bias, IMAGE),
    "weight_norm_by_hand": (
        _between(
            _weight_norm, c=_c, v=lambda: torch.randn(5, 8), g=lambda: torch.rand(5, 1) + 0.5
        ),
        IMAGE,
    ),
}  # fmt: skip


def ratio(expected, found):
    """The signal to noise ratio in dB."""
    noise = (found - expected).double().square().mean()
    return float(10 * torch.log10(expected.double().square().mean() / noise.clamp_min(1e-300)))
