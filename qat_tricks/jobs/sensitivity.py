"""The sensitivity of each part of a checkpoint's network, for an evaluation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qat_tricks.data import ImageData
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.sensitivity import plot_sensitivity, sensitivity_table
from qat_tricks.graph.inputs import Inputs, first_images
from qat_tricks.graph.sensitivity import measure_sensitivity, quantizers_of
from qat_tricks.graph.traced_network import TracedNetwork
from qat_tricks.jobs.artifact import Artifact
from qat_tricks.progress import console

IMAGES = 64


def check_sensitivity(artifact: Artifact) -> None:
    """Raises QatTricksError for an artifact whose layers cannot be taken apart."""
    network = artifact.simulated
    if not isinstance(network, TracedNetwork) or not quantizers_of(network):
        raise QatTricksError(
            f"sensitivity=true needs the checkpoint of a quantized network, and {artifact.path} is "
            "none: give the model.ckpt of a run that quantizes"
        )


def measure_artifact(artifact: Artifact, data: ImageData, folder: Path) -> dict[str, Any]:
    """Measures each part of a checkpoint's network alone, prints a table and draws a picture.

    Args:
        artifact: that ``check_sensitivity`` lets pass.
        data: loaded; the images are calibration images, which the result was not tested on.
        folder: gets ``sensitivity.png``.

    Returns:
        Plain data for the report.
    """
    network: Any = artifact.network
    sensitivity = measure_sensitivity(network, list(_inputs(artifact, data))).as_dict()
    plot_sensitivity(sensitivity, folder / "sensitivity.png")
    console().print(sensitivity_table(sensitivity))
    return sensitivity


def _inputs(artifact: Artifact, data: ImageData) -> Iterator[Inputs]:
    missing = IMAGES
    for batch in data.calibration_loader(IMAGES):
        if missing > 0:
            inputs = batch[0] if artifact.inputs is None else artifact.inputs(batch)
            yield first_images(inputs, missing)
        missing -= len(batch[1])
