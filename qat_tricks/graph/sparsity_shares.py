"""Shares out a network's sparsity among its layers by what each layer's pruning does to the output.

Each layer is pruned alone to several levels, and the error of the network's output is measured. The
levels chosen are those of the least sum of errors that reach the sparsity of the whole network
(Frantar and Alistarh 2022, "Optimal Brain Compression", arXiv 2208.11580, section 6, with the
output's error in the place of the layer's).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, fx

from qat_tricks.graph.bit_options import LARGEST_ERROR
from qat_tricks.graph.calls_beside import caller_of
from qat_tricks.graph.inputs import Inputs, check_batches
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.nodes import modules_before_logits
from qat_tricks.graph.pruning import count_of, refit_layer
from qat_tricks.graph.sensitivity import Change, errors_alone
from qat_tricks.numerics.choices import choose
from qat_tricks.numerics.sparsity import largest_sparsity, without_smallest

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


@torch.no_grad()
def sparsity_shares(
    traced: fx.GraphModule,
    pruned: Mapping[str, Layer],
    scores: Mapping[str, Tensor],
    batches: Sequence[Inputs],
    *,
    sparsity: float,
    granularity: str,
    hessians: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """The sparsity of each layer, as a multiple of that of the whole network.

    A layer that the logits do not depend on, as of a second head, has just that of the network: no
    error tells what another would do.

    Args:
        traced: the network, which stays as it is.
        pruned: its layers that are to be pruned.
        scores: of their weights, each under the name of one layer; the smallest go first.
        batches: the network's inputs, a batch each.
        sparsity: of all these layers together, above 0.
        granularity: limits the sparsity of a layer.
        hessians: of the layers' inputs; given, the weights that stay are fitted anew.

    Raises:
        QatTricksError: no batches.
    """
    check_batches(batches, "to share out sparsity by")
    most = largest_sparsity(granularity)
    # With the sparsity itself among them there is always a choice that reaches it.
    levels = sorted({*(level for level in LEVELS if level <= most), sparsity})
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    judged = modules_before_logits(traced)
    callers = {name: caller_of(name, called) for name in scores}
    alike = {name: 1.0 for name in scores if callers[name] not in judged}
    pruned = {name: pruned[name] for name in scores if name not in alike}
    if not pruned:
        return alike
    changes = [
        Change(
            module=callers[name],
            applied=_pruned_alone(layer, scores[name], level, (hessians or {}).get(name)),
        )
        for name, layer in pruned.items()
        for level in levels
    ]
    _, measured = errors_alone(traced, batches, changes, "measure sparsity")
    kl = [min(error.kl, LARGEST_ERROR) for error in measured]
    # Level 0 is that of a layer which stays dense, and errs by nothing.
    errors = [[0.0, *kl[i : i + len(levels)]] for i in range(0, len(kl), len(levels))]
    sizes = [layer.weight.numel() for layer in pruned.values()]
    kept = [[size * (1.0 - level) for level in (0.0, *levels)] for size in sizes]
    chosen = choose(errors, kept, (1 - sparsity) * sum(sizes))
    assert chosen is not None
    reached = [(0.0, *levels)[index] for index in chosen]
    # Levels are coarse, so that the choice reaches a little more than was asked for.
    mean = sum(a * size for a, size in zip(reached, sizes, strict=True)) / sum(sizes)
    return alike | {name: level / mean for name, level in zip(pruned, reached, strict=True)}


def _pruned_alone(
    layer: Layer, score: Tensor, level: float, hessian: Tensor | None
) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def applied() -> Iterator[None]:
        weight = layer.weight.detach().clone()
        keep = without_smallest(score, count_of(level, score.numel())).to(weight)
        if hessian is not None:
            refit_layer(layer, layer.masked_weight(), keep, hessian)
        layer.weight.mul_(keep)  # and not the mask: other layers may have the weight too
        try:
            yield
        finally:
            layer.weight.copy_(weight)

    return applied
