"""Images in class folders: the user's own, and ImageNet's with its fixed class indices."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from qat_tricks.data.images import FolderImages, Splits
from qat_tricks.data.module import ImageData
from qat_tricks.data.preprocessing import Preprocessing, input_size
from qat_tricks.data.splits import stratified_split
from qat_tricks.errors import QatTricksError, did_you_mean

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
VAL_NAMES = ("val", "valid", "validation")
SPLIT_NAMES = (*VAL_NAMES, "train", "training", "dev", "eval", "evaluation", "test", "testing")
"""Names of folders, in lower case, that hold a part of the images rather than a class."""

Files = tuple[list[str], Tensor]  # paths and their labels, int64 [N]


def imagefolder(
    *,
    root: str | None = None,
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    split_seed: int = 0,
    channels: int = 3,
    resize: int | Sequence[int] | None = 256,
    crop: int | Sequence[int] | None = 224,
    interpolation: str = "bilinear",
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    scale: str = "0..1",
    min_area: float = 0.25,
    flip: bool = True,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> ImageData:
    """Builds the user's own images.

    They are ``root/CLASS/*.jpg``, which are split here, or ``root/train/CLASS/*.jpg`` beside
    ``root/val`` and, if any, ``root/test``. Without ``val`` it is a part of ``train``; without
    ``test`` it is ``val``. Classes are the sorted names of the (train) folders.

    Args:
        root: the folder.
        val_fraction: share for validation where there is no ``val`` folder.
        test_fraction: share for the test where there is no ``train`` folder.
        split_seed: decides these stratified splits.
        channels: 1 (grey) or 3 (RGB).
        resize: short side in pixels, or exact (height, width); None: as stored.
        crop: centre crop, a side in pixels or (height, width); None: none.
        interpolation: of the resize.
        mean: one a channel, in units of ``scale``.
        std: one a channel, in units of ``scale``.
        scale: range of a pixel before mean and std, "0..1" or "0..255".
        min_area: train images are random crops of at least this share of the image.
        flip: half of the train images are mirrored.
        batch_size: images in a batch.
        num_workers: processes that load; 0 means this one.
        seed: decides the order of the train images, their augmentation and the calibration images.

    Raises:
        QatTricksError: ``root`` is missing or settings contradict one another; later, in ``setup``,
            folders have no images or unknown classes, or bear the name of a split that is not read.
    """
    folder = existing_root(root, "imagefolder")
    preprocessing = _preprocessing(channels, resize, crop, interpolation, mean, std, scale)
    files = partial(_user_files, folder, val_fraction, test_fraction, split_seed)
    load = partial(_load, files, min_area, flip)
    return ImageData(
        load,
        preprocessing=preprocessing,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        tests_on_val=(folder / "train").is_dir() and not (folder / "test").is_dir(),
    )


def imagenet(
    *,
    root: str | None = None,
    train_dir: str = "train",
    val_dir: str = "val",
    num_classes: int = 1000,
    resize: int | Sequence[int] | None = 256,
    crop: int | Sequence[int] | None = 224,
    interpolation: str = "bilinear",
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    scale: str = "0..1",
    min_area: float = 0.25,
    flip: bool = True,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> ImageData:
    """Builds ImageNet, or a part of it, from one folder a class, named by its WordNet id.

    The index of a class is the place of its folder among the sorted ones of ``train_dir``.

    Args:
        root: holds the two folders.
        train_dir: of the train images, in ``root``.
        val_dir: of the validation images, which are the test images too; may hold fewer classes.
        num_classes: folders that ``train_dir`` must have.
        resize: short side in pixels, or exact (height, width); None: as stored.
        crop: centre crop, a side in pixels or (height, width); None: none.
        interpolation: of the resize.
        mean: of R, G, B, in units of ``scale``.
        std: of R, G, B, in units of ``scale``.
        scale: range of a pixel before mean and std, "0..1" or "0..255".
        min_area: train images are random crops of at least this share of the image.
        flip: half of the train images are mirrored.
        batch_size: images in a batch.
        num_workers: processes that load; 0 means this one.
        seed: decides the order of the train images, their augmentation and the calibration images.

    Raises:
        QatTricksError: ``root`` is missing or settings contradict one another; later, in ``setup``,
            a folder is missing, or the classes are not those of ``train_dir``.
    """
    folder = existing_root(root, "imagenet")
    preprocessing = _preprocessing(3, resize, crop, interpolation, mean, std, scale)
    files = partial(_imagenet_files, folder / train_dir, folder / val_dir, num_classes)
    load = partial(_load, files, min_area, flip)
    return ImageData(
        load,
        preprocessing=preprocessing,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        tests_on_val=True,
    )


def existing_root(root: str | None, name: str, *, may_be_made: bool = False) -> Path:
    """Returns ``data.root`` as a path.

    Args:
        root: the setting.
        name: of the data set, for the error.
        may_be_made: the folder may be missing.

    Raises:
        QatTricksError: it is not set, or not a folder.
    """
    if not root:
        raise QatTricksError(f"data={name} needs the folder of its images: set data.root=PATH")
    folder = Path(root).expanduser()
    if not may_be_made and not folder.is_dir():
        raise QatTricksError(
            f"data.root={root} is not a folder: point it at the images of data={name}"
        )
    return folder


def scan(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[str], list[str], Tensor]:
    """Lists the images under ``folder``, one folder a class.

    Args:
        folder: holds the class folders.
        classes: labels are indices into these; ``folder`` may hold only some of them. None means
            the sorted names of the class folders.

    Returns:
        The class names, the paths, and the labels int64 ``[N]``.

    Raises:
        QatTricksError: the folder is missing or empty, or a class has no images or is not among
            ``classes``.
    """
    if not folder.is_dir():
        raise QatTricksError(f"{folder} is missing: it should hold one folder of images a class")
    folder_names = _folder_names(folder)
    if not folder_names:
        raise QatTricksError(
            f"{folder} has no class folders: put each class's images into a folder of its own"
        )
    names = folder_names if classes is None else list(classes)
    index = {name: place for place, name in enumerate(names)}
    paths: list[str] = []
    labels: list[int] = []
    for name in folder_names:
        if name not in index:
            raise QatTricksError(
                f'{folder}: class "{name}" is not among the train classes: '
                f"{did_you_mean(name, names)}"
            )
        images = _image_files(folder / name)
        if not images:
            raise QatTricksError(
                f"{folder / name} has no images ({', '.join(SUFFIXES)}): add some, or delete it"
            )
        paths += images
        labels += [index[name]] * len(images)
    return names, paths, torch.tensor(labels)


def _folder_names(folder: Path) -> list[str]:
    # Sorted, because the order on disk differs from machine to machine.
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        # hidden folders are caches of tools
        if entry.is_dir() and not entry.name.startswith(".")
    )


def _image_files(folder: Path) -> list[str]:
    return sorted(
        os.path.join(parent, name)
        # data sets are often links to files elsewhere
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


def _user_files(
    root: Path, val_fraction: float, test_fraction: float, split_seed: int
) -> tuple[list[str], list[Files]]:
    """Returns the class names, and the files of train, val and test."""
    if not (root / "train").is_dir():
        _check_classes(root)
        names, paths, labels = scan(root)
        # No split is given, so all three are made.
        shares = (1 - val_fraction - test_fraction, val_fraction, test_fraction)
        return names, _pick(paths, labels, stratified_split(labels, shares, split_seed))
    # The train folder decides the classes and their order.
    names, paths, labels = scan(root / "train")
    # folders that are there are used as they are
    val_folder = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    _check_all_read(root, val_folder)
    train: Files = (paths, labels)
    if val_folder is not None:
        val: Files = scan(val_folder, names)[1:]
    else:
        parts = stratified_split(labels, (1 - val_fraction, val_fraction), split_seed)
        train, val = _pick(paths, labels, parts)
    test = scan(root / "test", names)[1:] if (root / "test").is_dir() else val
    return names, [train, val, test]


def _check_classes(root: Path) -> None:
    """Refuses a root without ``train`` whose folders are splits, which would become classes."""
    names = _folder_names(root)
    if len(names) > 1 and all(name.lower() in SPLIT_NAMES for name in names):
        raise QatTricksError(
            f"{root} has the folders {', '.join(names)}, which are named as splits and not as "
            'classes: call the train folder "train", beside "val" or "validation" and "test"'
        )


def _check_all_read(root: Path, val_folder: Path | None) -> None:
    """Refuses a split beside ``train`` that would be left out."""
    places = (root / "train", val_folder, root / "test")
    read = [folder for folder in places if folder is not None and folder.is_dir()]
    unread = [
        name
        for name in _folder_names(root)
        # A link to a folder that is read holds nothing new.
        if name.lower() in SPLIT_NAMES and not any((root / name).samefile(one) for one in read)
    ]
    if unread:
        raise QatTricksError(
            f"{root} has {', '.join(unread)} beside {', '.join(one.name for one in read)}, and "
            'would not read it: of "train", "val" (or "valid", "validation") and "test" there may '
            "be one each; rename it to one that is missing, or move it elsewhere"
        )


def _imagenet_files(
    train_dir: Path, val_dir: Path, num_classes: int
) -> tuple[list[str], list[Files]]:
    names, paths, labels = scan(train_dir)
    # A missing folder would shift the index of every class behind it.
    if len(names) != num_classes:
        raise QatTricksError(
            f"{train_dir} has {len(names)} class folders, {num_classes} are expected: "
            f"add the missing ones (one image each will do), or set data.num_classes={len(names)}"
        )
    # ImageNet's own test images have no labels
    val = scan(val_dir, names)[1:]
    return names, [(paths, labels), val, val]


def _pick(paths: Sequence[str], labels: Tensor, parts: Sequence[Tensor]) -> list[Files]:
    return [([paths[index] for index in part.tolist()], labels[part]) for part in parts]


def _preprocessing(
    channels: int,
    resize: int | Sequence[int] | None,
    crop: int | Sequence[int] | None,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
    scale: str,
) -> Preprocessing:
    return Preprocessing(
        image_size=input_size(resize, crop),
        channels=channels,
        resize=resize,  # type: ignore[arg-type]  # lists become tuples there
        crop=crop,  # type: ignore[arg-type]
        interpolation=interpolation,
        mean=tuple(mean),
        std=tuple(std),
        scale=scale,
    )


def _load(
    files: partial[tuple[list[str], list[Files]]],
    min_area: float,
    flip: bool,
    preprocessing: Preprocessing,
) -> Splits:
    if not 0 < min_area <= 1:
        raise QatTricksError(f"min_area={min_area}: give a share of the image in (0, 1]")
    names, (train, val, test) = files()
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(
                list(preprocessing.image_size),
                scale=(min_area, 1),
                interpolation=InterpolationMode(preprocessing.interpolation),
            ),
            v2.RandomHorizontalFlip(0.5 if flip else 0),
            v2.PILToTensor(),
            preprocessing.normalize(),
        ]
    )
    unaugmented = preprocessing.transform()
    channels = preprocessing.channels
    return Splits(
        train=FolderImages(*train, channels, augment),
        calibration=FolderImages(*train, channels, unaugmented),
        val=FolderImages(*val, channels, unaugmented),
        test=FolderImages(*test, channels, unaugmented),
        pixels=FolderImages(*test, channels, preprocessing.geometry()),
        val_pixels=FolderImages(*val, channels, preprocessing.geometry()),
        class_names=tuple(names),
    )
