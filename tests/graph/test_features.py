"""Feature maps that a quantized network and its float network have in common."""

import copy

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers
from qat_tricks.graph.features import (
    Listener,
    TracedTeacher,
    chosen_tensors,
    last_of_each_size,
    matching,
    quantized_tensors,
)
from qat_tricks.graph.surgery import share_quantizer
from tests.helpers.nets import images, small_net


class InPlace(nn.Module):
    """A residual stream without ReLU whose sums are made in place, and share a grid."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            out = norm(conv(x))
            out += x
            x = out
        return self.head(torch.relu(x).mean([2, 3]))


def in_place(seed=0):
    torch.manual_seed(seed)
    net = InPlace().eval()
    for norm in net.norms:
        nn.init.normal_(norm.weight)  # some are negative
        nn.init.normal_(norm.bias)
    return net


def test_a_tensor_that_is_rounded_twice_is_one_feature():
    net = small_net()
    student = qat_tricks.quantize(net, [images(64)], "w4a4_ptq")
    names = [name.rpartition(".")[2] for name in activation_quantizers(student)]
    assert "stem_2_for_layers" in names
    tensors = quantized_tensors(student, TracedTeacher(net, student))
    of_tensor = [name.rpartition(".")[2] for name, group in tensors.items() if "stem_2" in group]
    assert of_tensor == ["stem_2"]


@pytest.mark.parametrize("make", [small_net, in_place])
def test_the_teacher_yields_what_the_student_rounds(make):
    """At 8 bits, and without a change of scales, both nearly agree, tensor by tensor."""
    net = make()
    overrides = [f"~stages.ptq.tricks.{name}" for name in ("equalize", "correct_bias")]
    student = qat_tricks.quantize(net, [images(64)], overrides=overrides)
    teacher = TracedTeacher(net, student)
    tensors = quantized_tensors(student, teacher)
    names = [name for group in tensors.values() for name in group]
    assert len(names) >= 6
    assert "x" not in names
    teacher.tap(names)
    expected, taps = teacher(images(64))
    assert torch.allclose(expected, net(images(64)), atol=1e-5)  # its BatchNorms are folded
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.network.modules())
    with torch.no_grad(), Listener(student, tensors) as listener:
        student(images(64))
        heard = listener.take()
    assert set(heard) == set(taps) == set(names)
    for name in names:
        error = (heard[name] - taps[name]).norm() / taps[name].norm()
        assert error < 0.15, name
    assert not any(m._forward_hooks for m in activation_quantizers(student).values())


def test_a_shared_quantizer_has_all_of_its_tensors_in_the_order_of_calls():
    student = qat_tricks.quantize(in_place(), [images(64)])
    share_quantizer(student, ["convs_2", "convs_0"])
    teacher = TracedTeacher(in_place(), student)
    tensors = quantized_tensors(student, teacher)
    assert tensors["activation_quantizers.convs_2"] == ["convs_0", "convs_2"]
    teacher.tap(["convs_0", "convs_2"])
    _, taps = teacher(images(64))
    with torch.no_grad(), Listener(student, tensors) as listener:
        student(images(64))
        heard = listener.take()

    def r(ours, theirs):
        return float(
            torch.corrcoef(torch.stack([heard[ours].flatten(), taps[theirs].flatten()]))[0, 1]
        )

    assert min(r("convs_0", "convs_0"), r("convs_2", "convs_2")) > 0.95
    assert max(r("convs_0", "convs_2"), r("convs_2", "convs_0")) < 0.9


def test_tapping_leaves_the_network_that_was_given_alone():
    net = small_net()
    student = qat_tricks.quantize(net, [images(16)])
    before = copy.deepcopy(net.state_dict())
    teacher = TracedTeacher(net, student)
    teacher.tap(["block_relu_1"])
    _, taps = teacher(images(4))
    assert list(taps) == ["block_relu_1"]
    assert isinstance(net(images(4)), torch.Tensor)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    teacher.tap([])
    assert teacher(images(4))[1] == {}


def test_patterns_choose_and_one_that_matches_nothing_is_refused():
    tensors = {"a": ["layer1_0_relu2", "add"], "b": ["layer2_relu"], "c": ["head"]}
    assert chosen_tensors(tensors, ["layer*.relu*"]) == {k: tensors[k] for k in ("a", "b")}
    assert matching(["layer1_0_relu2", "add"], ["layer1.*"]) == ["layer1_0_relu2"]
    with pytest.raises(QatTricksError, match=r'pattern "layer3\.\*" matches no quantized tensor'):
        chosen_tensors(tensors, ["add", "layer3.*"])


def test_the_last_map_of_each_size_is_chosen_and_no_vector():
    sizes = {
        "a": (2, 3, 8, 8),
        "b": (2, 4, 4, 4),
        "c": (2, 5, 8, 8),
        "d": (2, 6),
        "e": (2, 6, 1, 1),
    }
    heard = {name: torch.zeros(size) for name, size in reversed(sizes.items())}
    assert last_of_each_size(heard, {name: i for i, name in enumerate(sizes)}) == ["c", "b"]


class Tokens(torch.nn.Module):
    """A BatchNorm1d behind a linear that takes tokens, as many as they have channels."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.linear, self.norm = torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 10)

    def forward(self, x):
        tokens = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)[:, :8]
        return self.head(torch.relu(self.norm(self.linear(tokens))).mean(1))


def test_a_batchnorm_that_the_student_keeps_stays_in_the_teacher():
    torch.manual_seed(0)
    net = Tokens().eval()
    student = qat_tricks.quantize(net, [images(64)])
    teacher = TracedTeacher(net, student)
    assert any(isinstance(m, torch.nn.BatchNorm1d) for m in student.modules())
    assert torch.allclose(teacher(images(16))[0], net(images(16)), atol=1e-5)
