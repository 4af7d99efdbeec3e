"""Learn to which side each weight is rounded, block by block, so that the blocks' outputs stay.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv
2004.10568): ``min over V of |f(x; W) - f(x_q; s (floor(W / s) + h(V)))|^2``, layer by layer. Li et
al. 2021, "BRECQ" (arXiv 2102.05426), do so for blocks. Wei et al. 2022, "QDrop" (arXiv 2203.05740),
leave half of the activations unquantized, at random. Ma et al. 2023 (arXiv 2303.11906) join blocks
of unlike capacity. ``numerics.soft_rounding`` has ``h``, ``graph.blocks`` finds the blocks, and
``graph.reconstruct`` learns one; each says where it differs.

Where this differs:

- Blocks are found in the graph, and not by the names of modules.
- A block whose error on the images has not become smaller goes back to what it was.
- Weights of 8 bits, whose scale follows the largest of them, stay as they are.
- Work can be resumed block by block.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.files import write_tensors
from qat_tricks.graph.block_values import BlockInterpreter, KeptTensor, chunks, keep_inputs
from qat_tricks.graph.blocks import GRANULARITIES, Block, Cells, find_blocks
from qat_tricks.graph.float_names import float_names
from qat_tricks.graph.gates import split_gates
from qat_tricks.graph.grids import grid_of
from qat_tricks.graph.inputs import Inputs, as_tensors, batch_size, check_batches, first_images
from qat_tricks.graph.layers import Layer, is_calibrated
from qat_tricks.graph.logits import logits_of
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.reconstruct import (
    FINE_BITS,
    ReconstructSettings,
    Task,
    images_of_a_step,
    put_on_grid,
    reconstruct,
)
from qat_tricks.graph.settle import settle_grids
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.submodules import module_of
from qat_tricks.graph.two_modes import EvaluationInterpreter
from qat_tricks.graph.workbench import Workbench
from qat_tricks.numerics import ActivationQuantizer
from qat_tricks.progress import Bar
from qat_tricks.trainer.trick import Trick, check_num_images
from qat_tricks.tricks.calibrate import Calibrate

JUDGED = 128  # images on which the error of a block is measured


@dataclass(frozen=True, kw_only=True)
class LearnedRoundingSettings(ReconstructSettings):
    """How the rounding is learned.

    Raises:
        QatTricksError: a value that is not allowed.
    """

    granularity: str = "block"  # one of GRANULARITIES
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in GRANULARITIES:
            raise QatTricksError(
                f'granularity="{self.granularity}" is not supported: '
                f"{did_you_mean(self.granularity, GRANULARITIES)}"
            )


def learned_rounding(
    traced: fx.GraphModule,
    reference: fx.GraphModule,
    batches: Sequence[Inputs],
    settings: LearnedRoundingSettings | None = None,
    *,
    cache: str | Path | None = None,
    **changes: Any,
) -> fx.GraphModule:
    """Learns the rounding of all weights of ``traced`` that have scales of their own, in place.

    Args:
        traced: the quantized, calibrated network.
        reference: the float network it was made from, with the same layers.
        batches: the network's inputs, a batch each: images ``[N, C, H, W]``, or a tuple with one
            tensor for each input.
        settings: by default those of ``LearnedRoundingSettings``.
        cache: a folder that keeps blocks once they are done: an interrupted run goes on from there.
        changes: fields of ``LearnedRoundingSettings`` to change in ``settings``.

    Raises:
        QatTricksError: a quantizer without range, no batches, images of several sizes, or
            ``reference`` is another network.
    """
    settings = LearnedRoundingSettings(**{**(asdict(settings) if settings else {}), **changes})
    if not is_calibrated(traced):
        raise QatTricksError(
            "rounding can be learned only with ranges: quantize and calibrate the network first"
        )
    check_batches(batches, "to learn the rounding on")
    split_gates(reference, spec_of(traced).get("gated", ()))  # the walk finds nodes by their names
    # Lightning tests and validates in inference mode, in which nothing has a gradient.
    with evaluating(traced, reference), torch.inference_mode(False), torch.no_grad():
        _Walk(traced, reference, batches, settings, cache).run()
    settle_grids(traced)
    return traced


class _Shapes(EvaluationInterpreter):
    """Notes the shape of each tensor of a network, by the name of its node."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The result of a node."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = value.shape
        return value


def _shapes(traced: fx.GraphModule, inputs: Inputs) -> dict[str, torch.Size]:
    interpreter = _Shapes(traced)
    interpreter.run(*as_tensors(inputs))
    return interpreter.shapes


def _are_rows_of_images(few: torch.Size, more: torch.Size) -> bool:
    """Whether a tensor holds image after image, from its shape for one and for two images."""
    return len(few) > 0 and more[0] == 2 * few[0] and few[1:] == more[1:]


class _Walk:
    """Goes through the blocks of a network and learns each."""

    def __init__(
        self,
        traced: fx.GraphModule,
        reference: fx.GraphModule,
        batches: Sequence[Inputs],
        settings: LearnedRoundingSettings,
        cache: str | Path | None,
    ) -> None:
        self.traced, self.reference, self.settings = traced, reference, settings
        self.images = sum(map(batch_size, batches))
        # In one shape for one image, and in another for two: what is cut there can be put together.
        self.shapes = _shapes(traced, first_images(batches[0], 1))
        both = _twice(first_images(batches[0], 1))
        more = _shapes(traced, both)
        cuts = {
            name: of_float
            for name, of_float in float_names(traced).items()
            if name in more and _are_rows_of_images(self.shapes[name], more[name])
        }
        self.cells = Cells(traced, cuts)
        self.float_cells = Cells(reference, cuts.values())
        self.blocks = find_blocks(self.cells, settings.granularity)
        self.float_name = {
            **cuts,
            **{node.name: node.name for node in self.cells.inputs},
            self.cells.outputs[-1].name: self.float_cells.outputs[-1].name,
        }
        self.quantized = keep_inputs(self.cells.inputs, batches)
        self.exact = dict(self.quantized)
        self.run_block, self.run_float = BlockInterpreter(traced), BlockInterpreter(reference)
        self.done = _Done(cache, [traced, reference], self.quantized.values(), settings)

    def run(self) -> None:
        """Learns every block."""
        parts = [self._parts(block) for block in self.blocks]
        last_use = {
            node.name: place for place, block in enumerate(self.blocks) for node in block.inputs
        }
        bar = Bar("learn rounding", self.settings.iterations * sum(map(any, parts)))
        try:
            for place, (block, (layers, quantizers)) in enumerate(
                zip(self.blocks, parts, strict=True)
            ):
                target = self._target(block)
                if layers or quantizers:
                    self._learn(place, block, layers, quantizers, target, bar)
                if last_use.get(block.output.name, -1) > place:
                    self._keep(block, target)
                for name in [name for name in self.quantized if last_use.get(name, -1) <= place]:
                    del self.quantized[name], self.exact[name]
        finally:
            bar.close()

    def _target(self, block: Block) -> KeptTensor:
        """The output of ``block`` in the float network."""
        of_float = self.float_cells.between(
            [
                self.float_cells.node(self.float_name[node.name])
                for node in block.nodes
                if self.cells.is_cut(node)
            ]
        )
        exact = {self.float_name[name]: kept for name, kept in self.exact.items()}
        outputs = (
            self.run_float.compute(
                of_float, {node.name: exact[node.name].of(part) for node in of_float.inputs}
            )
            for part in chunks(self.images)
        )
        return KeptTensor(map(logits_of, outputs), self.images)

    def _outputs(self, block: Block, images: int) -> Iterator[tuple[slice, Tensor]]:
        """The output of ``block`` as it is deployed, for the first ``images`` images."""
        for part in chunks(images):
            inputs = {node.name: self.quantized[node.name].of(part) for node in block.inputs}
            yield part, logits_of(self.run_block.compute(block, inputs))

    def _keep(self, block: Block, target: KeptTensor) -> None:
        self.quantized[block.output.name] = KeptTensor(
            (output for _, output in self._outputs(block, self.images)),
            self.images,
            grid_of(block.output, self.traced),
            exactly=True,
        )
        self.exact[block.output.name] = target

    def _error(self, block: Block, target: KeptTensor) -> float:
        """The mean squared error of the output on some of the images."""
        judged = min(self.images, JUDGED)
        errors = [
            (output - target.of(part)).square().sum()
            for part, output in self._outputs(block, judged)
        ]
        return float(torch.stack(errors).sum()) / target.of(slice(0, judged)).numel()

    def _learn(
        self,
        place: int,
        block: Block,
        layers: Mapping[str, nn.Module],
        quantizers: Sequence[str],
        target: KeptTensor,
        bar: Bar,
    ) -> None:
        """Learns one block, unless it is done, or there is nothing to gain."""
        values = {
            key: value
            for key, value in self.traced.state_dict().items()
            if key.startswith(tuple(f"{name}." for name in (*layers, *quantizers)))
        }
        if self.done.load(place, values):
            for _ in range(self.settings.iterations):
                bar.advance()
            return
        for name in layers:
            put_on_grid(self._layer(name))
        before, saved = self._error(block, target), {k: v.clone() for k, v in values.items()}
        if before > 0:
            positions = [
                self.shapes[node.name].numel() // _channels(self.traced, node)
                for node in block.layers
            ]
            task = Task(
                block=block,
                layers={self._layer(name): of_float for name, of_float in layers.items()},
                quantizers=[self.traced.get_submodule(name) for name in quantizers],  # type: ignore[misc]
                quantized=self.quantized,
                exact=self.exact,
                target=target,
                error=before,
                images=self.images,
                batch=images_of_a_step(max(positions, default=1), self.images),
                seed=self.settings.seed * 10_000 + place,
            )
            with torch.enable_grad():
                reconstruct(self.traced, task, self.settings, bar.advance)
            # The soft rounding may have been better than what it was rounded to.
            if not self._error(block, target) < before:
                for key, value in values.items():
                    value.copy_(saved[key])
        self.done.save(place, values)

    def _layer(self, name: str) -> Layer:
        layer = self.traced.get_submodule(name)
        assert isinstance(layer, Layer)
        return layer

    def _float_layer(self, name: str) -> nn.Module:
        layer = dict(self.reference.named_modules()).get(name)
        normalizes = getattr(layer, "batchnorm", None) is not None
        if layer is None or normalizes != (self._layer(name).batchnorm is not None):
            raise QatTricksError(
                f'the float reference has no such layer "{name}": give a copy of the network as it '
                "was when quantizers were placed"
            )
        return layer

    def _parts(self, block: Block) -> tuple[dict[str, nn.Module], list[str]]:
        """What is learned of ``block``.

        Returns:
            The layers by name, each with its float counterpart, and the names of quantizers.
        """
        inside = {node.name for node in block.nodes}
        layers = {}
        for node in block.layers:
            name = str(node.target)
            quantizer = self._layer(name).weight_quantizer
            assert quantizer is not None
            uses = {use.name for use in self.cells.uses(node)}
            targets = {use.target for use in self.cells.uses(node)}
            # A weight that is used elsewhere too would change blocks that are done.
            if quantizer.scale is not None and uses <= inside and targets == {node.target}:
                layers[name] = self._float_layer(name)
        quantizers: dict[str, None] = {}
        for node in block.nodes:
            grid = module_of(node, self.traced)
            if isinstance(grid, ActivationQuantizer) and grid.scheme.bits < FINE_BITS:
                calls = {x.name for x in self.cells.graph.nodes if x.target == node.target}
                if self.settings.learn_activation_scales and calls <= inside:
                    quantizers[str(node.target)] = None
        return layers, list(quantizers)


def _twice(inputs: Inputs) -> Inputs:
    """Each image twice."""
    if isinstance(inputs, Tensor):
        return torch.cat([inputs, inputs])
    return tuple(torch.cat([part, part]) for part in inputs)


def _channels(traced: fx.GraphModule, node: fx.Node) -> int:
    layer: Any = module_of(node, traced)
    return int(layer.weight.shape[layer.channel_axis])


class _Done:
    """Blocks that are done, kept in a folder.

    Args:
        folder: None keeps nothing.
        networks: on whose values the result depends.
        images: likewise.
        settings: likewise.
    """

    def __init__(
        self,
        folder: str | Path | None,
        networks: Iterable[nn.Module],
        images: Iterable[KeptTensor],
        settings: LearnedRoundingSettings,
    ) -> None:
        self._folder = None
        if folder is None:
            return
        digest = hashlib.sha256(repr((torch.__version__, asdict(settings))).encode())
        for network in networks:
            for key, value in network.state_dict().items():
                digest.update(key.encode())
                digest.update(_bytes(value))
        for kept in images:
            digest.update(_bytes(kept.of(slice(None))))
        self._folder = Path(folder) / f"learned_rounding-{digest.hexdigest()[:16]}"

    def _path(self, place: int) -> Path:
        assert self._folder is not None
        return self._folder / f"block{place:03}.pt"

    def load(self, place: int, values: Mapping[str, Tensor]) -> bool:
        """Copies a block that is done into ``values``; returns whether it was."""
        if self._folder is None or not self._path(place).is_file():
            return False
        saved = torch.load(self._path(place), map_location="cpu", weights_only=True)
        for key, value in values.items():
            value.copy_(saved[key])
        return True

    def save(self, place: int, values: Mapping[str, Tensor]) -> None:
        """Keeps the values of a block."""
        if self._folder is not None:
            write_tensors(
                {key: value.cpu().clone() for key, value in values.items()}, self._path(place)
            )


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class LearnedRounding(Trick):
    """Callback of ``learned_rounding``; its arguments are ``LearnedRoundingSettings``."""

    requires = (Calibrate,)
    after = ("tune_ranges", "mixed_precision", "correct_weights", "gptq")
    judged = True

    def __init__(
        self,
        granularity: str = "block",
        iterations: int = 500,
        num_images: int = 512,
        drop: float = 0.5,
        learn_activation_scales: bool = True,
        lr: float = 0.05,
        scale_lr: float = 0.005,
        bias_lr: float = 0.002,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.num_images = check_num_images(num_images)
        self._cache = cache  # where it lies does not matter
        # Made now, so that wrong settings are refused before anything is trained.
        self.settings = LearnedRoundingSettings(
            granularity=granularity,
            iterations=iterations,
            drop=drop,
            learn_activation_scales=learn_activation_scales,
            lr=lr,
            scale_lr=scale_lr,
            bias_lr=bias_lr,
            seed=seed,
        )

    def apply(self, work: Workbench) -> None:
        """Learns on the first ``num_images`` training images."""
        batches = work.batches(self.num_images)
        learned_rounding(work.network, work.reference, batches, self.settings, cache=self._cache)
        work.note_change("rounding learned", in_training=False)
