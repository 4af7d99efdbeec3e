"""ONNX Runtime sessions on the CPU, opened in one way everywhere.

On x86 CPUs without VNNI, ONNX Runtime multiplies unsigned activations by signed weights with
``vpmaddubsw``, which adds two products into 16 bits and saturates: with weights of 127 and
activations of 255, about half of a convolution's value is lost. ``session.x64quantprecision`` makes
it store the weights as unsigned there, which is exact. With VNNI it changes no value, and makes
int8 slower on some processors: so it is set only where products saturate.

Threads of an operator wait for the next one in a loop that keeps a core busy, also after a run. Of
two sessions run in turn, each would wait for the other's core: at two threads the same network
read 0.43 to 1.14 times itself. ``session.force_spinning_stop`` ends the waiting with each run; the
times are those of a session that is alone.
"""

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import onnxruntime as ort

from qat_tricks.deploy.runtimes.network import InputSpec, feed
from qat_tricks.deploy.runtimes.processor import products_saturate
from qat_tricks.errors import QatTricksError, cut, one_line

# numpy's types by ONNX Runtime's names for those of inputs
_TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,  # pixels, where the network normalizes them itself
    **{
        f"tensor({name})": np.dtype(name).type
        for name in ("int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
    },
    "tensor(bool)": np.bool_,
}


def session_config() -> dict[str, str]:
    """The entries that every session of this package sets."""
    config = {"session.force_spinning_stop": "1"}
    if products_saturate():
        config["session.x64quantprecision"] = "1"
    return config


def open_session(
    path: str | PathLike[str],
    *,
    threads: int | None = None,
    optimize: bool = True,
    profile_prefix: str | None = None,
    optimized_path: str | PathLike[str] | None = None,
    disabled_optimizers: Sequence[str] = (),
) -> ort.InferenceSession:
    """Opens an ONNX file on the CPU.

    Args:
        path: the ONNX file.
        threads: threads within an operator; None leaves the number to ONNX Runtime.
        optimize: False runs the graph as written, without any fusion.
        profile_prefix: where to write ONNX Runtime's profile; None writes none.
        optimized_path: where to save the graph that really runs; None does not save it.
        disabled_optimizers: names of ONNX Runtime's graph transformers to leave out.

    Raises:
        QatTricksError: the file is missing, truncated, or no ONNX graph that ONNX Runtime can run.
    """
    path = Path(path)
    if not path.is_file():
        raise QatTricksError(
            f'no ONNX file at "{path}": give the path of a model.onnx that an export wrote'
        )
    # ONNX Runtime would take 0 for "all".
    if threads is not None and threads < 1:
        raise QatTricksError(f"threads is {threads}, allowed: 1 or more")
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # none: errors are raised, and ours say what to do
    for key, value in session_config().items():
        options.add_session_config_entry(key, value)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    try:
        return ort.InferenceSession(
            str(path),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(disabled_optimizers) or None,
        )
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
        raise QatTricksError(
            f'ONNX Runtime cannot open "{path}" ({one_line(error)}): the file is truncated or not '
            "an ONNX network, or ONNX Runtime lacks an operation of it; export it again"
        ) from error


def input_specs(session: ort.InferenceSession) -> tuple[InputSpec, ...]:
    """Returns name, shape and dtype of each of the network's inputs.

    Raises:
        QatTricksError: an input is no tensor of numbers, or there is none.
    """
    inputs = session.get_inputs()
    if not inputs or any(node.type not in _TYPES for node in inputs):
        listed = ", ".join(f"{node.name}: {node.type}" for node in inputs) or "none"
        raise QatTricksError(
            f"the ONNX network's inputs are ({listed}), allowed: tensors of numbers"
        )
    return tuple(
        InputSpec(
            name=node.name,
            # a dynamic dimension has a name in place of a size
            shape=tuple(size if isinstance(size, int) else None for size in node.shape),
            dtype=np.dtype(_TYPES[node.type]),
        )
        for node in inputs
    )


def run_batch(session: ort.InferenceSession, *inputs: np.ndarray) -> np.ndarray:
    """Runs one batch.

    Args:
        session: an open network.
        inputs: images [batch, channels, height, width], or one array for each input of the
            network; they are cast to its dtypes.

    Returns:
        The first output, logits of shape [batch, classes].

    Raises:
        QatTricksError: the number of inputs, or a shape, is not the network's, an input of
            integers or truth values would be changed by the cast, or ONNX Runtime cannot run it.
    """
    return run_session(session, None, feed(input_specs(session), inputs))[0]


def run_session(
    session: ort.InferenceSession, outputs: Sequence[str] | None, inputs: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Runs a session on named inputs, and returns the outputs named, or all of them.

    Raises:
        QatTricksError: ONNX Runtime cannot run it.
    """
    try:
        return session.run(outputs, dict(inputs))
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base class
        raise QatTricksError(_told(error)) from error


# What an integer average says where its input's scale over its output's, divided by the number of
# positions, is below 2**-32, or 256 or more: all its outputs would be one value.
_CONSTANT_AVERAGE = "QLinearGlobalAveragePool parameter out of computation range"


def _told(error: Exception) -> str:
    """An error of ONNX Runtime in one line, with the operation that fails and the way out."""
    text = one_line(error, limit=None)
    found = re.search(r"Name:'(?:node_)?(.*?)'", text)
    where = f'"{found[1]}"' if found and found[1] else "the network"
    if _CONSTANT_AVERAGE in text:
        return (
            f"ONNX Runtime cannot run the average {where}: the scales of its input and its output "
            "lie so far apart that its output is constant, as after a fit that has collapsed: "
            "begin again from the float network with a lower learning rate, and compare the "
            "validation with the float network's before the export"
        )
    reason = text.rpartition("Status Message: ")[2]
    reason = re.sub(r"^/\S+ .*?\) ", "", reason)  # the place in its source, and the signature
    return (
        f"ONNX Runtime cannot run {where} ({cut(reason)}): it takes other values, "
        "or one of its operations fails; compare the images with those of training"
    )
