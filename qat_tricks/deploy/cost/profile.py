"""Where the time of an ONNX file goes: ONNX Runtime's own profile, operator by operator.

Conversions compute nothing: they turn floats into integers and back, or lay values out as the next
kernel wants them. They are counted in the graph that really runs, after ONNX Runtime's fusions.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qat_tricks.deploy.onnx_graph import load_model
from qat_tricks.deploy.passes import COPY
from qat_tricks.deploy.runtimes.network import Shapes, feed, random_batch
from qat_tricks.deploy.runtimes.session import input_specs, open_session, run_session
from qat_tricks.errors import QatTricksError

CONVERSIONS = (
    *("QuantizeLinear", "DequantizeLinear", "Cast"),
    *("Transpose", "ReorderInput", "ReorderOutput"),
)
"""Types of operators that compute nothing."""

PREFIX = "node_"  # of operators' names, by PyTorch's exporter
SUFFIX = "_kernel_time"  # of the profile's events that are an operator's run
_WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
_OF_WEIGHTS = ("DequantizeLinear", "Transpose")  # what may stand between a weight and its operator
_WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """One operator of the graph that ONNX Runtime runs."""

    name: str
    op_type: str
    ms: float  # median of its runs


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The operators of a file in the order in which they run; at least one."""

    operators: tuple[OperatorTime, ...]

    @property
    def ms(self) -> float:
        """The time of all operators, in milliseconds a batch."""
        return sum(operator.ms for operator in self.operators)

    def conversions(self) -> dict[str, Any]:
        """Their ``count``, their ``share`` of the time (0..1), and the counts ``by_type``."""
        found = [operator for operator in self.operators if operator.op_type in CONVERSIONS]
        by_type: dict[str, int] = {}
        for operator in found:
            by_type[operator.op_type] = by_type.get(operator.op_type, 0) + 1
        spent = sum(operator.ms for operator in found)
        return {
            "count": len(found),
            "share": spent / self.ms if self.ms else 0.0,
            "by_type": by_type,
        }

    def dearest(self, count: int = 10) -> list[dict[str, Any]]:
        """The operators that take longest: ``name``, ``op_type``, ``ms`` and ``share``."""
        order = sorted(self.operators, key=lambda operator: -operator.ms)
        return [asdict(o) | {"share": o.ms / self.ms if self.ms else 0.0} for o in order[:count]]


def layer_times(path: str | PathLike[str], profile: Profile) -> dict[str, float]:
    """The time of each conv and linear, in milliseconds a batch, all of its calls together.

    Args:
        path: an int8 file that ``export_onnx`` wrote, in which weights have their layers' names; a
            float one is laid out anew, with operators of other names.
        profile: of this file.
    """
    graph = load_model(path).graph
    # A weight may be stored in integers, and reach its operator through a DequantizeLinear.
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type in _OF_WEIGHTS}
    times = {operator.name: operator.ms for operator in profile.operators}
    found: dict[str, float] = {}
    for node in graph.node:
        if node.op_type not in _WITH_WEIGHTS:
            continue
        weight = node.input[1]
        while weight in source:
            weight = source[weight]
        weight = weight.partition(COPY)[0]  # each call has a copy of its own
        name = node.name.removeprefix(PREFIX)
        if weight.endswith(_WEIGHT) and name in times:
            layer = weight.removesuffix(_WEIGHT)
            found[layer] = found.get(layer, 0.0) + times[name]
    return found


def profile_file(
    path: str | PathLike[str],
    image_shape: Shapes,
    *,
    batch_size: int = 1,
    threads: int,
    warmup: int = 3,
    runs: int = 10,
) -> Profile:
    """Runs a file in ONNX Runtime under its profiler, which itself takes some time.

    Args:
        path: the ONNX file.
        image_shape: (channels, height, width); of a network with several inputs one shape for each.
        batch_size: images in a run.
        threads: threads within an operator.
        warmup: runs that do not count.
        runs: runs that do.

    Raises:
        QatTricksError: the file does not open, the images do not fit, or the profile is empty.
    """
    with TemporaryDirectory() as folder:
        session = open_session(path, threads=threads, profile_prefix=str(Path(folder) / "profile"))
        specs = input_specs(session)
        batch = feed(specs, random_batch(specs, image_shape, batch_size))
        for _ in range(warmup + runs):
            run_session(session, None, batch)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    found: dict[str, tuple[str, str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(SUFFIX):
            # Names may be empty, and of several operators the same.
            index = event["args"]["node_index"]
            found[index] = event["name"].removesuffix(SUFFIX), event["args"]["op_name"]
            times[index].append(event["dur"] / 1e3)  # microseconds
    if not found:
        raise QatTricksError(f'ONNX Runtime has no profile of "{path}": it has no operator to run')
    return Profile(
        operators=tuple(
            OperatorTime(
                name=name.removeprefix(PREFIX).split("_token_")[0],  # of a fused operator
                op_type=op_type,
                ms=float(np.median(times[index][warmup:])),
            )
            for index, (name, op_type) in found.items()
        )
    )
