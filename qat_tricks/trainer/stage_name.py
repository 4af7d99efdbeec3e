"""Lets a trainer's progress bar say which stage of a recipe it is of."""

from collections.abc import Callable
from functools import partial
from typing import Any


def name_stage(trainer: Any, stage: str) -> Any:
    """Shows ``stage`` beside the figures of the trainer's progress bar, if it has one.

    Args:
        trainer: of one fit; bars of either kind, rich or tqdm, have their figures from one method.
        stage: its name.

    Returns:
        The trainer.
    """
    bar = trainer.progress_bar_callback
    if bar is not None:
        # Not the object's own: a bar serves several stages.
        bar.get_metrics = partial(_with_stage, partial(type(bar).get_metrics, bar), stage)
    return trainer


def _with_stage(own: Callable[..., dict[str, Any]], stage: str, *args: Any) -> dict[str, Any]:
    return {"stage": stage, **own(*args)}
