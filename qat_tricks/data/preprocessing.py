"""The preprocessing of images, as data: the one source for evaluation, reports and exports."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2

from qat_tricks.errors import QatTricksError, did_you_mean

MAX_SIDE = 4096  # pixels; much larger images exhaust the memory
SCALES = ("0..1", "0..255")
INTERPOLATIONS = tuple(mode.value for mode in InterpolationMode)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The evaluation transform: channels, resize, centre crop, scale, then ``(x - mean) / std``.

    Lists become tuples and numbers floats, so that equal settings have an equal ``hash`` wherever
    they were written.

    Raises:
        QatTricksError: settings contradict one another.
    """

    image_size: tuple[int, int]  # height and width that the network sees, in pixels
    channels: int = 3  # 1 (grey) or 3 (RGB)
    # short side, or exact (height, width); None: as stored
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None  # centre crop (height, width) after the resize; None: none
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # one a channel, in units of `scale`
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: str = "0..1"  # the range of a pixel before mean and std: "0..1" or "0..255"

    def __post_init__(self) -> None:
        for name in ("image_size", "crop"):
            object.__setattr__(self, name, pair(name, getattr(self, name)))
        if not isinstance(self.resize, int):
            object.__setattr__(self, "resize", pair("resize", self.resize))
        for name in ("mean", "std"):
            values = getattr(self, name)
            values = (values,) if isinstance(values, int | float) else values
            object.__setattr__(self, name, tuple(float(value) for value in values))
        self._check()

    def _check(self) -> None:
        if self.channels not in (1, 3):
            raise QatTricksError(f"channels={self.channels}: images are grey (1) or RGB (3)")
        if self.scale not in SCALES:
            raise QatTricksError(
                f'unknown scale "{self.scale}": {did_you_mean(self.scale, SCALES)}'
            )
        if self.interpolation not in INTERPOLATIONS:
            hint = did_you_mean(self.interpolation, INTERPOLATIONS)
            raise QatTricksError(f'unknown interpolation "{self.interpolation}": {hint}')
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise QatTricksError(
                    f"{name}={list(getattr(self, name))} has {len(getattr(self, name))} values for "
                    f"{self.channels} channels: give one a channel"
                )
        if min(self.std) <= 0:
            raise QatTricksError(f"std={list(self.std)}: every value must be greater than 0")
        # The size is stated and computed: a wrong crop shows here, and not in the network.
        expected = input_size(self.resize, self.crop, stored=self.image_size)
        if self.image_size != expected:
            raise QatTricksError(
                f"image_size={list(self.image_size)}, but resize={self.resize} and "
                f"crop={self.crop} give {list(expected)}: make them agree"
            )

    def geometry(self) -> v2.Transform:
        """Returns the part that moves pixels.

        It maps a PIL image or uint8 ``[..., C, H, W]`` to uint8 ``[..., channels, *image_size]``.
        """
        mode = InterpolationMode(self.interpolation)
        resize = list(self.resize) if isinstance(self.resize, tuple) else self.resize
        steps: list[torch.nn.Module] = [v2.RGB() if self.channels == 3 else v2.Grayscale(1)]
        steps += (
            [v2.Resize(resize, interpolation=mode, antialias=True)] if resize is not None else []
        )
        steps += [v2.CenterCrop(list(self.crop))] if self.crop is not None else []
        return v2.Compose([*steps, v2.PILToTensor()])

    def normalize(self) -> v2.Transform:
        """Returns the part that maps values: uint8 ``[..., C, H, W]`` to float32 of that shape."""
        to_float = v2.ToDtype(torch.float32, scale=self.scale == "0..1")
        return v2.Compose([to_float, v2.Normalize(list(self.mean), list(self.std))])

    def transform(self) -> v2.Transform:
        """Returns the whole transform: ``geometry``, then ``normalize``."""
        return v2.Compose([self.geometry(), self.normalize()])

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings as plain JSON data; ``from_dict`` reads it back."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Preprocessing":
        """Reads the data of ``as_dict``.

        Raises:
            QatTricksError: a key is unknown or missing.
        """
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise QatTricksError(
                    f'unknown preprocessing key "{key}": {did_you_mean(key, known)}'
                )
        if "image_size" not in settings:
            raise QatTricksError('preprocessing lacks its "image_size"')
        return cls(**settings)

    def described(self) -> dict[str, Any]:
        """Returns the settings and their hash, for files and reports; see ``from_described``."""
        return {**self.as_dict(), "hash": self.hash}

    @classmethod
    def from_described(cls, described: Mapping[str, Any]) -> "Preprocessing":
        """Reads the data of ``described``.

        Raises:
            QatTricksError: a key is unknown or missing, or the hash is not that of the settings.
        """
        preprocessing = cls.from_dict(
            {key: value for key, value in described.items() if key != "hash"}
        )
        # Settings edited by hand no longer describe the network that was trained.
        if described.get("hash") != preprocessing.hash:
            raise QatTricksError(
                f"the preprocessing's hash is {described.get('hash')} and its settings have "
                f"{preprocessing.hash}: one of them was changed by hand; export the network again"
            )
        return preprocessing

    @property
    def hash(self) -> str:
        """Sixteen hex digits of the SHA-256 of the settings as canonical JSON."""
        # Sorted and without spaces, so that equal settings give equal text.
        canonical = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def differences(self, other: "Preprocessing") -> list[str]:
        """Returns each setting that differs in ``other``, as ``"mean: [0.5] → [0.4]"``."""
        ours, theirs = self.as_dict(), other.as_dict()
        return [f"{key}: {ours[key]} → {theirs[key]}" for key in ours if ours[key] != theirs[key]]


def pair(name: str, size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Returns ``size`` as (height, width); an int is the side of a square.

    Args:
        name: of the setting, for the error.
        size: None stays None.

    Raises:
        QatTricksError: it is neither a size nor None.
    """
    if size is None:
        return None
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in sides):
        raise QatTricksError(
            f"{name}={size}: give a number of pixels from 1 to {MAX_SIDE}, or [height, width]"
        )
    return sides[0], sides[1]


def input_size(
    resize: int | Sequence[int] | None,
    crop: int | Sequence[int] | None,
    stored: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Returns (height, width) after a resize and a crop.

    Args:
        resize: short side, or exact (height, width); None: as stored.
        crop: centre crop, a side or (height, width); None: none.
        stored: the size of the stored images, if all have one.

    Raises:
        QatTricksError: images of different shapes would come out, or the crop is larger than the
            image.
    """
    cropped = pair("crop", crop)
    resized = pair("resize", resize)
    if cropped is not None:
        if resized is not None and (cropped[0] > resized[0] or cropped[1] > resized[1]):
            raise QatTricksError(
                f"crop={list(cropped)} is larger than resize={resize}: make the crop smaller"
            )
        return cropped
    if isinstance(resize, int):  # of the short side only
        raise QatTricksError(
            f"resize={resize} keeps each image's shape, so images would differ in size: "
            f"give a crop as well, or resize=[{resize}, {resize}]"
        )
    if resized is None and stored is None:
        raise QatTricksError(
            "neither resize nor crop is given, so images may differ in size: give one of them"
        )
    size = resized or stored
    assert size is not None
    return size
