"""A trainer whose fit ends with the set-up, in which tricks do all that needs no training."""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any


@cache
def set_up_trainer(package: ModuleType) -> type[Any]:
    """The class of such a trainer, of one of Lightning's packages.

    Its ``fit`` begins as any other: it starts the processes, prepares the data, and sets up the
    data, the callbacks and the module. Nothing is trained, so that the module needs no optimizer
    and no ``training_step``.
    """
    call = import_module(f"{package.__name__}.trainer.call")

    class SetUpTrainer(package.Trainer):  # type: ignore[name-defined]
        """See ``set_up_trainer``."""

        # The arguments are Lightning's; ``trainer.resume`` reads the path here.
        def _run(self, model: Any, ckpt_path: Any = None, *args: Any, **kwargs: Any) -> None:
            self.strategy.connect(model)
            self._callback_connector._attach_model_logging_functions()
            self.strategy.setup_environment()
            self._data_connector.prepare_data()
            call._call_setup_hook(self)
            self._teardown()
            call._call_teardown_hook(self)
            self.state.status = type(self.state.status)("finished")
            self.state.stage = None

    return SetUpTrainer
