"""A module's forward by itself, as a file and another process run it: without its trainer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qat_tricks.errors import QatTricksError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

Loader = Callable[[int], Iterable[Any]]


class _Absent:
    """Stands in for what a traced forward cannot use, and refuses by name."""

    def __init__(self, owner: str, what: str, remedy: str) -> None:
        self.owner, self.what, self.remedy = owner, what, remedy

    def _refuse(self, what: str) -> Any:
        raise QatTricksError(
            f"{self.owner}.forward uses {what}, which its traced graph would not repeat: "
            f"{self.remedy}"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._refuse(self.what)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse(f"{self.what}.{name}")


class ForwardAlone:
    """Takes the trainer, and the functions that log, from a module, and gives them back."""

    def __init__(self, pl_module: "LightningModule") -> None:
        self.pl_module = pl_module
        owner, remedy = type(pl_module).__name__, "call it in training_step"
        self.names = ("_trainer", "log", "log_dict")
        self.others: dict[str, Any] = {
            "_trainer": _Absent(owner, "self.trainer", "hand the value over as an argument"),
            "log": _Absent(owner, "self.log", remedy),
            "log_dict": _Absent(owner, "self.log_dict", remedy),
        }

    def swap(self) -> None:
        """Puts in what stands in, or what was there before."""
        own = vars(self.pl_module)  # another dictionary once the module is the traced network
        before = {key: own.pop(key) for key in self.names if key in own}
        own.update(self.others)
        self.others = before

    def load(self, load: Loader, num_images: int) -> Iterable[Any]:
        """Batches of ``load``, for which the module has its trainer."""
        self.swap()
        try:
            return list(load(num_images))
        finally:
            self.swap()


@contextmanager
def forward_alone(pl_module: "LightningModule") -> Iterator[ForwardAlone]:
    """Lets the forward of ``pl_module`` refuse to use its trainer or to log, for a block."""
    alone = ForwardAlone(pl_module)
    alone.swap()
    try:
        yield alone
    finally:
        alone.swap()
