"""The float network as an ONNX file, for the methods that start from one."""

from pathlib import Path

import torch
from torch import Tensor, nn


def export_float(net: nn.Module, images: Tensor, path: Path, opset: int = 18) -> Path:
    """Writes the network with a free batch size.

    Args:
        net: in evaluation mode.
        images: an example, of two images at least.
        path: of the file to write.
        opset: ONNX operator set.
    """
    torch.onnx.export(
        net,
        (images,),
        path,
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    return path
