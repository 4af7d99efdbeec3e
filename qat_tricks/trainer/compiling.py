"""Compiles the network that is trained (``torch.compile``), and leaves its evaluation as it is.

Evaluation computes what the exported file computes, to the last bit. A compiled kernel may round
otherwise; so only steps of training run compiled, and nothing that is measured depends on it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.trainer.framework import Callback
from qat_tricks.trainer.module import (
    find_network,
    has_workbench,
    is_whole,
    network_of,
    workbench_of,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class CompileNetwork(Callback):
    """Callback that compiles the network for the training steps of a fit.

    Give it after the recipe, which changes the network first. The first step of each fit compiles,
    which takes a minute or two; so does one in which a trick changes what is computed, and the
    first batch of another size. Of more than eight sizes, torch computes the others eagerly.

    Args:
        network: attribute of the LightningModule that holds the network; None finds it.
        backend: as of ``torch.compile``.
    """

    def __init__(self, *, network: str | None = None, backend: str = "inductor") -> None:
        self.network, self.backend = network, backend
        self._compiled: nn.Module | None = None

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Compiles the network, once its first batch comes.

        Raises:
            QatTricksError: the network is the module itself, or is compiled already.
        """
        name = (
            workbench_of(pl_module).network_name
            if has_workbench(pl_module)
            else find_network(pl_module, self.network)
        )
        if is_whole(pl_module, name):
            raise QatTricksError(
                f"{type(pl_module).__name__} is the network itself, and its steps cannot be "
                "compiled apart from its evaluation: leave CompileNetwork out"
            )
        network = network_of(pl_module, name)
        if getattr(pl_module, "_compiler_ctx", None) or network._compiled_call_impl is not None:
            raise QatTricksError(
                f"{name} is compiled already: leave out CompileNetwork, or torch.compile"
            )
        # where ``nn.Module.compile`` keeps it too: copies and checkpoints of a module leave it out
        network._compiled_call_impl = _CompiledSteps(network, self.backend)
        self._compiled = network

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Leaves the network as it was."""
        if self._compiled is not None:
            self._compiled._compiled_call_impl = None
            # torch compiles the same code eight times at most: a sweep's next fit begins anew.
            code = getattr(self._compiled.forward, "__code__", None)
            if code is not None:
                torch._dynamo.reset_code(code)
            self._compiled = None

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Leaves the network as it was."""
        self.on_fit_end(trainer, pl_module)


class _CompiledSteps:
    """What a call of the network does: in training mode, its compiled forward.

    Hooks of the network itself, such as that of ``distill``, stay outside of what is compiled.
    """

    def __init__(self, network: nn.Module, backend: str) -> None:
        self.network = network
        # Sizes are compiled one by one: the kernels that a batch meets then do not depend on the
        # size of the first one, and a resumed fit meets the same ones.
        self.forward = torch.compile(network.forward, backend=backend, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network = self.network
        if not network.training:
            return network._call_impl(*args, **kwargs)
        # The class's forward has nothing on the object; a patched one has, and so has a call of the
        # network within its own call.
        own, before = vars(network), vars(network).get("forward")
        own["forward"] = self.forward
        try:
            return network._call_impl(*args, **kwargs)
        # loaded by torch.compile, and slow to load without it
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error.inner_exception).strip().partition("\n")[0]
            raise QatTricksError(
                f"torch.compile cannot compile the network here ({reason}): install what it asks "
                "for, a C++ compiler in most cases, or train without (trainer.compile=false)"
            ) from error
        finally:
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before
