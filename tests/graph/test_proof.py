"""Tricks that are judged by the network's output on images that they did not see."""

import copy
import warnings

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.graph import trace
from qat_tricks.graph.layers import layers
from qat_tricks.graph.proof import (
    FEWEST,
    PROOF_IMAGES,
    SHARE,
    Prover,
    held_out_of,
    paired_interval,
    proof_lines,
)
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.workbench import Workbench
from qat_tricks.tricks import (
    Calibrate,
    CorrectBias,
    Equalize,
    Quantize,
    calibrate,
    fold_batchnorm,
    quantize,
)
from tests.helpers.nets import images, small_net


def _quantized() -> torch.fx.GraphModule:
    traced = trace(small_net())
    fold_batchnorm(traced)
    return calibrate(quantize(traced), [images(32)])


def _prover(traced) -> Prover:
    prover = Prover([images(16, seed=3), images(16, seed=4)])
    prover.begin(traced)
    return prover


def _spoil(traced, names=None, by=3.0):
    """Adds to the biases of layers, which no calibration would do."""
    with torch.no_grad():
        for name, layer in layers(traced).items():
            if names is None or name in names:
                layer.bias.add_(torch.linspace(-by, by, len(layer.bias)))


def _state(traced):
    return {name: value.clone() for name, value in traced.state_dict().items()}


def test_a_trick_that_harms_is_rolled_back_to_the_last_bit():
    traced = _quantized()
    prover, before = _prover(traced), _state(traced)
    bias = next(iter(layers(traced).values())).bias
    proof = prover.prove("spoil", traced, lambda: _spoil(traced), None)
    assert proof.verdict == "rolled back"
    assert proof.change[0] > 0
    assert proof.kl_after > proof.kl_before == proof.kl_kept
    assert all(torch.equal(value, before[name]) for name, value in traced.state_dict().items())
    assert next(iter(layers(traced).values())).bias is bias  # an optimizer may hold it


def test_a_trick_that_helps_stays_and_the_next_is_measured_from_there():
    traced = _quantized()
    prover = _prover(traced)
    helped = _state(traced)
    _spoil(traced)
    proof = prover.prove("mend", traced, lambda: traced.load_state_dict(helped), None)
    assert proof.verdict == "kept"
    assert proof.change[1] < 0
    again = prover.prove("nothing", traced, lambda: None, None)
    assert again.verdict == "kept"
    assert again.kl_before == proof.kl_after == again.kl_after


def test_of_a_trick_that_harms_in_one_place_the_rest_stays():
    traced = _quantized()
    prover, right = _prover(traced), _state(traced)
    names = list(layers(traced))
    # The last layer's bias is wrong, which the trick would mend.
    _spoil(traced, names[-1:], by=0.05)

    def trick():
        traced.load_state_dict(right)
        _spoil(traced, names[:1], by=9.0)

    proof = prover.prove("both", traced, trick, None)
    assert proof.verdict == "rolled back in part"
    assert names[0] in proof.undone
    assert names[-1] not in proof.undone
    assert proof.kl_kept < proof.kl_before < proof.kl_after
    for name, value in right.items():
        if not name.startswith("activation") and name.rpartition(".")[0] in (names[0], names[-1]):
            assert torch.equal(traced.state_dict()[name], value)


def test_a_trick_before_the_quantizers_is_judged_by_copies_that_are_quantized():
    def spread(work: Workbench) -> None:
        """Keeps the float function, and leaves most channels few integers."""
        first, second = list(layers_of(work.network))[:2]
        with torch.no_grad():
            first.weight[1:] /= 3e3
            first.bias[1:] /= 3e3
            second.weight[:, 1:] *= 3e3

    def layers_of(network):
        return (m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(8 * 12 * 12, 5))
    x = torch.randn(160, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    work = Workbench(copy.deepcopy(net).eval(), lambda count: [x])
    work.begin_proofs([Equalize(), Quantize(), Calibrate()], prove=True)
    before = _state(work.network)
    with pytest.warns(UserWarning, match="spread rolled back: it took the output's divergence"):
        work.prove("spread", lambda: spread(work))
    assert all(torch.equal(v, before[name]) for name, v in work.network.state_dict().items())
    (proof,) = spec_of(work.network)["proofs"]
    assert proof["verdict"] == "rolled back"
    assert proof["images"] == 160 // SHARE


def test_tricks_do_not_see_the_images_that_they_are_judged_by():
    x = torch.arange(300.0).view(-1, 1, 1, 1).expand(-1, 1, 12, 12)
    work = Workbench(small_net().eval(), lambda count: x.split(50))
    assert float(work.batches(10)[0][0].max()) == 0
    work.begin_proofs([CorrectBias(num_images=500)], prove=True)
    seen = torch.cat(work.batches(1000))
    assert len(seen) == 300 - PROOF_IMAGES
    assert float(seen.min()) == PROOF_IMAGES
    assert len(torch.cat(work.batches(7))) == 7
    work.end_proofs()
    assert len(torch.cat(work.batches(1000))) == 300


def test_a_loader_that_shuffles_shows_tricks_none_of_those_images():
    x = torch.arange(200.0).view(-1, 1, 1, 1).expand(-1, 1, 12, 12)
    loader = torch.utils.data.DataLoader(x, batch_size=20, shuffle=True)
    work = Workbench(small_net().eval(), lambda count: loader)
    work.begin_proofs([CorrectBias()], prove=True)
    work.prove("nothing", lambda: None)
    held_out = {int(image.max()) for batch in work.prover.batches for image in batch}
    assert len(held_out) == 200 // SHARE
    for _ in range(3):
        assert not held_out & {int(image.max()) for batch in work.batches(64) for image in batch}


def test_random_numbers_in_evaluation_are_the_same_for_both_networks():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return nn.functional.dropout(self.net(x), 0.5, training=True)

    traced = quantize(trace(Noisy()))
    calibrate(traced, [images(32)])
    prover = _prover(traced)
    state = torch.get_rng_state()
    assert prover.measure(traced).sqnr_db > 20
    assert torch.equal(torch.get_rng_state(), state)


def test_few_images_are_not_held_out():
    assert held_out_of(SHARE * FEWEST - 1) == 0
    assert held_out_of(SHARE * FEWEST) == FEWEST
    assert held_out_of(10_000) == PROOF_IMAGES


def test_the_interval_is_that_of_paired_differences():
    before = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    low, high = paired_interval(before, before + torch.tensor([0.9, 1.0, 1.1, 1.0]))
    # Student's factor for three degrees of freedom is 3.182.
    assert (low + high) / 2 == pytest.approx(1.0, rel=1e-4)
    assert (high - low) / 2 == pytest.approx(3.182 * 0.08165 / 2, rel=1e-3)


def test_a_network_without_logits_is_not_judged():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net(x).argmax(1)

    work = Workbench(Ids().eval(), lambda count: [images(64)])
    work.begin_proofs([Quantize(), Calibrate(), CorrectBias()], prove=True)
    work.prove("anything", lambda: None)
    (proof,) = spec_of(work.network)["proofs"]
    assert proof["verdict"] == "not judged"
    assert proof["kl_after"] is None
    assert proof_lines([proof]) == ["not judged: anything; outputs of torch.int64 are no logits"]


def test_outputs_that_are_not_finite_harm_and_mending_them_helps():
    traced = _quantized()
    prover, right = _prover(traced), _state(traced)
    last = list(layers(traced).values())[-1]

    def ruin():
        with torch.no_grad():
            last.bias.fill_(float("inf"))

    assert prover.prove("ruin", traced, ruin, None).verdict == "rolled back"
    ruin()
    prover.forget()
    mended = prover.prove("mend", traced, lambda: traced.load_state_dict(right), None)
    assert mended.verdict == "kept"
    assert mended.change[1] < 0


def test_a_recipe_records_its_proofs_and_can_do_without():
    batches = [images(64, seed=seed) for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proved = qat_tricks.quantize(small_net(), batches)
        again = qat_tricks.quantize(small_net(), batches)
        plain = qat_tricks.quantize(small_net(), batches, overrides=["prove=false"])
    proofs = spec_of(proved)["proofs"]
    assert [p["trick"] for p in proofs] == ["equalize", "correct_weights", "correct_bias"]
    assert all(p["images"] == 48 for p in proofs)
    assert proofs == spec_of(again)["proofs"]
    assert "proofs" not in spec_of(plain)
    with pytest.raises(qat_tricks.QatTricksError, match=r"recipe.prove='maybe' is not allowed"):
        qat_tricks.quantize(small_net(), batches, overrides=["prove=maybe"])
