"""The processes of one run: all of them train, and rank zero does everything else."""

import atexit
import signal
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, distributed

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, batch_size, map_tensors
from qat_tricks.graph.processes import has_others

PATIENCE = timedelta(days=1000)  # with which the others wait while rank zero measures

P = ParamSpec("P")
T = TypeVar("T")


class Ranks:
    """The processes that a trainer trains with, started when this is made.

    Lightning would start them in the first fit, and each then runs the whole program from its
    beginning. Here they start before any long work, so that rank zero can tell them its results,
    such as a float baseline from its cache, and whether it failed.

    Args:
        strategy: a trainer's, made as all trainers of the run will be.
    """

    def __init__(self, strategy: Any) -> None:
        self._group: Any = None  # with one process there is none
        if strategy.launcher is not None:
            # none outlives rank zero, whatever ended it
            atexit.register(strategy.launcher.kill, signal.SIGKILL)
            strategy.launcher.launch(strategy.setup_environment)
            # Gloo, because those who wait on NCCL keep a GPU busy; and the group of the fits gives
            # up after half an hour.
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def on_zero(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls ``work`` on rank zero and returns its result, which can be pickled, on every rank.

        The others wait for it, and end quietly if it raises. Call it on every rank.
        """
        if self._group is None:
            return work(*args, **kwargs)
        # In a tuple, so that None as a result differs from a failure.
        told: list[tuple[T] | None] = [None]
        try:
            if distributed.get_rank() == 0:
                told = [(work(*args, **kwargs),)]
        finally:
            # Also after an error: the others would wait for ever.
            distributed.broadcast_object_list(told, group=self._group)
        if told[0] is None:
            # after any other status Lightning kills rank zero, which may still be telling why
            sys.exit(0)
        return told[0][0]


def loaded_once(load: Callable[[int], Iterable[Inputs]], num_images: int) -> Iterable[Inputs]:
    """The batches of ``load(num_images)``, the same for every process.

    The first process loads them and gives them to the others. So all calibrate on the same images,
    although each would have drawn another order.

    Raises:
        QatTricksError: on the others, where the first has failed.
    """
    if not has_others():
        return load(num_images)
    failure: Exception | None = None
    told: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            told[0] = _first(load(num_images), num_images)
        except Exception as error:  # whatever it is: the others are waiting
            failure, told[1] = error, str(error)
    distributed.broadcast_object_list(told)
    batches, reason = told
    if failure is not None:
        raise failure
    if reason is not None:
        raise QatTricksError(reason)
    return batches


def _first(batches: Iterable[Inputs], num_images: int) -> list[Inputs]:
    taken: list[Inputs] = []
    for inputs in batches:
        # The other ranks have other devices.
        taken.append(map_tensors(inputs, Tensor.cpu))
        if sum(map(batch_size, taken)) >= num_images:
            break
    return taken
