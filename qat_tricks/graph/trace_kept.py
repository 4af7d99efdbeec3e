"""Traces a network through the equivalence gate, and tells where a graph begins to differ."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.equivalence import LEAST_DB, Gate, buffers_kept, sqnr, tensors_in
from qat_tricks.graph.inputs import Inputs, as_tensors, call_network
from qat_tricks.graph.modes import kept_modes
from qat_tricks.graph.random_state import kept_random_state
from qat_tricks.graph.trace import trace
from qat_tricks.graph.traceable import TraceSettings
from qat_tricks.graph.traced_network import TracedNetwork
from qat_tricks.graph.tracer import Tracer, follow
from qat_tricks.graph.two_modes import EVALUATION, OWNER, TRAINING, graph_in

TRACED = "traced"


def trace_kept(network: nn.Module, untraced: Sequence[str], gate: Gate) -> TracedNetwork:
    """Traces ``network`` and proves that the result computes what it computes.

    A change that tracing makes beside following the code, and that does not keep the function, is
    left out and noted.

    Args:
        network: the user's.
        untraced: name patterns of submodules to keep whole.
        gate: made of ``network``.

    Raises:
        QatTricksError: the graph computes something else; the line names the place.
    """
    traced = trace(network, untraced)
    step = gate.measure(traced, TRACED, thawed=True)
    if not gate.keeps(step):
        for part in ("splits_attention", "functions_to_modules"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said at the first trace
                again = trace(network, untraced, settings=TraceSettings(**{part: False}))
            without = gate.measure(again, TRACED, thawed=True)
            if gate.keeps(without):
                traced, step = again, replace(without, undone=(part.replace("_", " "),))
                break
    if not gate.keeps(step):
        training = step.evaluation_db >= gate.least_db
        place = _first_difference(network, traced, untraced, gate.inputs, training=training)
        raise QatTricksError(f"{gate.fault(step)}; {place}")
    gate.enter(step)
    return traced


def _first_difference(
    network: nn.Module,
    traced: TracedNetwork,
    untraced: Sequence[str],
    inputs: Inputs,
    *,
    training: bool,
) -> str:
    """Where the traced network begins to differ: the part, its code, and the way out."""
    differing: list[fx.Node] = []
    mode = TRAINING if training else EVALUATION
    with kept_random_state():
        expected = _inputs_of_parts(network, traced, inputs, training=training)
    with kept_random_state():  # again, because code that counts its calls differs from itself
        later = _inputs_of_parts(network, traced, inputs, training=training)

    class Compare(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            is_call = n.op == "call_module"
            runs = [run.get(str(n.target), []) for run in (expected, later) if is_call]
            if all(runs) and not differing:
                args, _ = self.fetch_args_kwargs_from_env(n)
                if any(sqnr(calls.pop(0), tensors_in(args)) < LEAST_DB for calls in runs):
                    differing.append(n)
            return super().run_node(n)

    in_mode = fx.GraphModule(traced, graph_in(traced.graph, mode))
    with kept_modes(traced), buffers_kept(traced), kept_random_state(), torch.no_grad():
        traced.train(training)
        Compare(in_mode).run(*as_tensors(inputs))
    node = differing[0] if differing else in_mode.graph.output_node()
    part = str(node.meta.get(OWNER, "")) if differing else ""
    tracer = Tracer(untraced)
    tracer.record_stack_traces = True
    stacks = {n.name: n.stack_trace for n in follow(network, tracer, training=training).graph.nodes}
    sources = [stacks[s.name] for s in node.all_input_nodes if stacks.get(s.name)]
    line = _users_line(sources[0] or "") if sources else ""
    before = f'before "{node.target}"' if differing else "before the output"
    where = f'in "{part}"' if part else f"in {type(network).__name__}.forward"
    way_out = f'keep that part in float with untraced=["{part}"]'
    if not part:
        way_out = "make that part a module of its own, and keep it in float with untraced"
    return (
        f"they differ in {mode} mode {before}, {where}{line}: let it depend on nothing but its "
        f"inputs, parameters and mode, or {way_out}"
    )


def _inputs_of_parts(
    network: nn.Module, traced: TracedNetwork, inputs: Inputs, *, training: bool
) -> dict[str, list[list[Tensor]]]:
    """What each part that ``traced`` calls is called with in the user's network, call by call."""
    seen: dict[str, list[list[Tensor]]] = {}

    def note(name: str, _: nn.Module, args: Any) -> None:
        seen.setdefault(name, []).append(tensors_in(args))

    parts = dict(network.named_modules())
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    handles = [
        parts[name].register_forward_pre_hook(partial(note, name)) for name in called & parts.keys()
    ]
    try:
        with kept_modes(network), buffers_kept(network), torch.no_grad():
            network.train(training)
            call_network(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _users_line(stack: str) -> str:
    """`` (file:line "code")`` of the user's last frame in a stack of torch.fx, or nothing."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+(?:\n +([^\n]+))?', stack)
    users = [frame for frame in frames if not frame[0].startswith(own)]
    return f' ({users[-1][0]}:{users[-1][1]} "{users[-1][2]}")' if users else ""
