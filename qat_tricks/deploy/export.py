"""Writes a network as one ONNX file, and proves that ONNX Runtime runs it as simulated."""

import copy
import json
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor, fx, nn
from torch.utils._pytree import MappingKey, tree_flatten_with_path

from qat_tricks.deploy.cost.weights import WEIGHT_BITS_KEY
from qat_tricks.deploy.exporter_registry import kept_registry
from qat_tricks.deploy.functions import ExportableFunctions
from qat_tricks.deploy.layouts import DEFAULT_LAYOUT
from qat_tricks.deploy.parity.logits import MIN_SQNR_DB, check_agreement
from qat_tricks.deploy.parity.network import ParityReport, measure_parity
from qat_tricks.deploy.parity.tensors import measure_tensor_parity
from qat_tricks.deploy.passes import COPY, name_quantized, tidy
from qat_tricks.deploy.pools import mend_pools
from qat_tricks.deploy.prepare import prepare_for_export
from qat_tricks.deploy.qdq import Emitted, to_qdq
from qat_tricks.deploy.targets import NEWEST_OPSET, OPSET
from qat_tricks.errors import QatTricksError, one_line
from qat_tricks.files import replacing
from qat_tricks.graph.equivalence import tensors_in
from qat_tricks.graph.inputs import (
    Inputs,
    as_tensors,
    call_network,
    first_images,
    input_names,
    inputs_of,
    map_tensors,
    on_cpu,
)
from qat_tricks.graph.layers import activation_quantizers, layers
from qat_tricks.graph.logits import check_batch_first, logits_of
from qat_tricks.graph.unwrap import unwrapped
from qat_tricks.version import __version__

INPUT, OUTPUT = "images", "logits"
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
TENSOR_IMAGES = 8  # for parity tensor by tensor, which holds the values of all tensors at once

FAULT = "the ONNX file does not run as simulated, so it was not kept"
REMEDY = "compare on real images, or lower min_top1_agreement or min_sqnr_db"


def export_onnx(
    network: nn.Module,
    path: str | PathLike[str],
    example: Inputs,
    *,
    images: Iterable[object] | None = None,
    metadata: Mapping[str, str] | None = None,
    min_top1_agreement: float = 0.9,
    min_sqnr_db: float = MIN_SQNR_DB,
    opset: int = OPSET,
    layout: str = DEFAULT_LAYOUT,
) -> ParityReport:
    """Writes ``network`` to ``path``, runs the file in ONNX Runtime and compares.

    A network with our quantizers becomes a QDQ network with int8 weights; any other is written in
    float. The network itself and its mode stay as they are. The file takes ``images`` of any batch
    size, or several inputs by the names of the arguments of the network's ``forward``. It yields
    ``logits``, and the network's other outputs. If parity does not hold, no file is written, and an
    older one stays.

    Args:
        network: a network of ours, calibrated, or any float network. It yields logits ``[N,
            classes]`` or, of two classes, one an image; a tuple that begins with them, or a mapping
            that has them as ``logits``.
        path: of the file to write; its folder is made.
        example: images ``[N, C, H, W]``, ``N`` at least 1; a tuple if the network takes several
            inputs.
        images: batches to measure parity on, real images at best; ``example`` by default.
        metadata: the file's properties, such as class names and preprocessing.
        min_top1_agreement: least share of the images, 0..1, with the same class as in the
            simulation; one differing image is always tolerated unless it is 1.
        min_sqnr_db: least ratio of the logits to their error, in dB.
        opset: ONNX operator set, 18 to 25.
        layout: ``onnxruntime`` or ``tensorrt`` (see ``deploy.layouts``); ONNX Runtime runs the
            latter too, mostly in float.

    Raises:
        QatTricksError: the network does not take ``example``, cannot be exported, or has quantizers
            without a range; parity is below a limit; or ``path`` cannot be written.
    """
    if not OPSET <= opset <= NEWEST_OPSET:
        raise QatTricksError(f"opset={opset} is not supported: give {OPSET} to {NEWEST_OPSET}")
    network = unwrapped(network)
    names = input_names(network)
    example = inputs_of(example, names)
    _check_inputs(example, names)
    # In float32 on the CPU, where the file will run.
    simulated = copy.deepcopy(network).cpu().float().eval()
    batches = [example] if images is None else list(images)
    file_inputs = names if len(names) > 1 else [INPUT]
    # Under a trainer's autocast the file would hold bfloat16, which ONNX Runtime does not run.
    with replacing(path) as draft, torch.autocast("cpu", enabled=False):
        model = _to_onnx(copy.deepcopy(simulated), on_cpu(example), file_inputs, opset, layout)
        _check_hooks(network, simulated, on_cpu(example))
        _save(model, draft, metadata or {})
        report = _compare(draft, simulated, batches)
        limits = {"min_top1_agreement": min_top1_agreement, "min_sqnr_db": min_sqnr_db}
        remedy = f"{_where_it_begins(report)}; {REMEDY}"
        check_agreement(report.as_dict(), FAULT, **limits, remedy=remedy)
    return report


def _compare(path: Path, simulated: nn.Module, batches: Sequence[object]) -> ParityReport:
    """Parity of the logits on all batches, and of each quantized tensor on the first images."""
    report = measure_parity(path, simulated, batches)
    if not any(quantizer.enabled for quantizer in activation_quantizers(simulated).values()):
        return report
    assert isinstance(simulated, fx.GraphModule)
    few = on_cpu(first_images(inputs_of(batches[0], input_names(simulated)), TENSOR_IMAGES))
    return replace(report, layers=tuple(measure_tensor_parity(path, simulated, few)))


def _where_it_begins(report: ParityReport) -> str:
    """The first tensor that differs, for the error of a file that is refused."""
    differing = [tensor for tensor in report.layers if tensor.differing > 0]
    if differing:
        first = min(differing, key=lambda tensor: tensor.place)
        return f'the first tensor that differs is "{first.name}" ({first.sqnr_db:.1f} dB)'
    if report.layers:
        return f"of the first {TENSOR_IMAGES} images no quantized tensor differs, only the logits"
    return "of a float network only the logits are compared"


def _check_inputs(example: Inputs, names: list[str]) -> None:
    """Refuses inputs from which no file can be made (QatTricksError)."""
    for values in as_tensors(example):
        if values.numel() == 0 or (len(names) < 2 and values.dim() < 2):
            raise QatTricksError(
                f"the example's shape is {tuple(values.shape)}: give at least one image, [N, C, H, "
                "W]"
            )
    if len(names) > 1 and OUTPUT in names:
        raise QatTricksError(
            f'an input called "{OUTPUT}" cannot be told from the output of that name: rename the '
            "argument"
        )


def _save(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes and checks the file, with its producer and ``metadata`` among its properties."""
    model.producer_name, model.producer_version = "qat_tricks", __version__
    # setting properties drops those that are there
    present = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, {**present, **metadata})
    onnx.save(model, str(path))
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise QatTricksError(
            f"the exported file is no valid ONNX network ({one_line(error)}): if the network "
            "yields a mapping, give its keys other names"
        ) from error


def _to_onnx(
    network: nn.Module, example: Inputs, names: list[str], opset: int, layout: str
) -> onnx.ModelProto:
    """Exports ``network``, changing it on the way.

    Args:
        network: a copy, on the CPU and in evaluation mode.
        example: its inputs for one image or more.
        names: of the file's inputs.
        opset: ONNX operator set.
        layout: a name of ``deploy.layouts.LAYOUTS``.
    """
    emitted = Emitted({}, {})
    if isinstance(network, fx.GraphModule) and "qat_tricks" in network.meta:
        prepare_for_export(network)
        emitted = to_qdq(network, layout)
    for name, layer in layers(network).items():  # those left in float; others are emitters by now
        if layer.is_quantizing:
            raise QatTricksError(
                f'layer "{name}" is quantized, the network around it not traced: hand over the '
                "traced network"
            )
        # Pruned weights become zeros in the file, which knows no masks.
        layer.weight.data, layer.weight_mask = layer.masked_weight().data, None
    one = first_images(example, 1)
    # two images: the exporter would freeze a batch size of one
    pair = as_tensors(map_tensors(one, lambda values: torch.cat([values] * 2)))
    try:
        with _quiet(), kept_registry(), ExportableFunctions():
            # The file takes any number of images, and a squeeze() changes the shape of one alone.
            check_batch_first(logits_of(call_network(network, one)), 1)
            output = network(*pair)
            check_batch_first(logits_of(output), 2)
            outputs = _output_names(output)
            program = torch.onnx.export(
                network,
                pair,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in pair),
                opset_version=opset,
            )
    except Exception as error:  # PyTorch's exporter lets any kind of error through
        kind, reason = type(network).__name__, one_line(_cause(error))
        raise QatTricksError(f"{kind} cannot be exported to ONNX: {reason}") from error
    assert program is not None
    assert program.exported_program is not None
    model = program.model_proto
    _check_opset(model, opset)
    _put_logits_first(model.graph)
    mend_pools(model.graph, program.exported_program)
    name_quantized(model.graph, emitted.calls)
    # After the names, because rewrites merge tensors.
    tidy(model)
    if emitted.bits:
        bits = _bits_of_initializers(model.graph, emitted.bits)
        helper.set_model_props(model, {WEIGHT_BITS_KEY: json.dumps(bits)})
    return model


def _check_opset(model: onnx.ModelProto, opset: int) -> None:
    """Refuses a file that the exporter left at another operator set: it warns, and goes on."""
    written = next(entry.version for entry in model.opset_import if not entry.domain)
    if written != opset:
        raise QatTricksError(
            f"opset={opset} cannot be written of this network with this PyTorch, which stayed at "
            f"{written}: give {written}, or take a newer onnxscript"
        )


def _check_hooks(network: nn.Module, simulated: nn.Module, example: Inputs) -> None:
    """Refuses a hook of the user's that changes the output: the exporter follows forward alone.

    Args:
        network: whose hooks they are; the copy of a traced one has none.
        simulated: a copy of it, on the CPU and in evaluation mode.
        example: its inputs.
    """
    hooks = {name: vars(network)[name] for name in _HOOKS}
    if not any(hooks.values()):
        return
    before = {name: vars(simulated)[name] for name in _HOOKS}
    with torch.no_grad():
        vars(simulated).update({name: OrderedDict() for name in _HOOKS})
        alone = tensors_in(call_network(simulated, example))
        vars(simulated).update(hooks)
        values = tensors_in(call_network(simulated, example))
        vars(simulated).update(before)
    if len(values) != len(alone) or not all(map(torch.equal, values, alone)):
        raise QatTricksError(
            "a hook on the network changes its output, which the file would not have: do its work "
            "in forward"
        )


def _put_logits_first(graph: onnx.GraphProto) -> None:
    """Users read the first output."""
    logits_first = sorted(graph.output, key=lambda value: value.name != OUTPUT)
    graph.ClearField("output")
    graph.output.extend(logits_first)


def _bits_of_initializers(graph: onnx.GraphProto, bits: Mapping[str, int]) -> dict[str, int]:
    """The bits of each weight and of its copies, which have its name and a number behind it."""
    weights = {tensor.name: tensor.name.partition(COPY)[0] for tensor in graph.initializer}
    return {name: bits[weight] for name, weight in weights.items() if weight in bits}


def _output_names(output: object) -> list[str]:
    """A name for each output of the network: ``logits``, its key in a mapping, or a number."""
    logits = logits_of(output)
    leaves = [
        (path, leaf) for path, leaf in tree_flatten_with_path(output)[0] if isinstance(leaf, Tensor)
    ]
    # the innermost key of a nested output
    keys = [
        next((key.key for key in reversed(path) if isinstance(key, MappingKey)), None)
        for path, _ in leaves
    ]
    names = [f"output_{i}" if key is None else str(key) for i, key in enumerate(keys)]
    first = next(i for i, (_, leaf) in enumerate(leaves) if leaf is logits)
    taken = {OUTPUT}
    for i, name in enumerate(names):
        # The same key may stand in two places, and a tensor may be yielded twice.
        unique = (name, *(f"{name}_{number}" for number in range(len(names) + 1)))
        names[i] = OUTPUT if i == first else next(n for n in unique if n not in taken)
        taken.add(names[i])
    return names


def _cause(error: BaseException) -> BaseException:
    """The first error of a chain, which says more than the exporter's advice around it.

    An error of ours says most.
    """
    while error.__cause__ is not None and not isinstance(error, QatTricksError):
        error = error.__cause__
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter: its advice is for its developers, and the file is measured anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
