"""Small pictures of test images, to be put into a page."""

import base64
import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qat_tricks.data import ImageData

SIDE = 112  # pixels at most: a page holds some dozens


def pictures_of(data: ImageData, places: Iterable[int]) -> dict[int, str]:
    """Returns ``data:`` addresses of PNG images, by their place among the test images.

    Images of other than 1 or 3 channels have no colours, and get no picture.
    """
    if data.in_channels not in (1, 3):
        return {}
    return {place: _address(data.splits.pixels.batch([place])[0][0]) for place in places}


def disagreement_pictures(data: ImageData, report: Mapping[str, Any]) -> dict[int, str]:
    """Pictures of the images on which the networks of ``report`` disagree; see ``pictures_of``."""
    comparison = report.get("comparison") or {"disagreements": []}
    return pictures_of(data, [row["image"] for row in comparison["disagreements"]])


def _address(pixels: Tensor) -> str:
    """The address of an image uint8 ``[C, H, W]``."""
    values = pixels.to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy()
    image = Image.fromarray(values)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
