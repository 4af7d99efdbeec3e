"""Calls the module's own ``setup`` and ``configure_model`` before the tricks, and once a run.

Lightning calls them after the callbacks' ``setup``, in which tricks work on the network. They may
be what makes the network, or what its ``training_step`` needs. So the session calls them first, and
Lightning's own call does nothing. One that makes the network anew, in a later run, does not replace
the one that is under work.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.overrides import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from qat_tricks.errors import QatTricksError, one_line
from qat_tricks.trainer.framework import package_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

HOOKS = ("setup", "configure_model")


class OwnHook:
    """Stands in for a hook on the object, and calls the module's own.

    Attributes:
        skip: whether the module's own was called in this run already.
    """

    def __init__(self, pl_module: "LightningModule", name: str) -> None:
        self.pl_module, self.name, self.skip = pl_module, name, False
        # A hook that the user has put on the object itself.
        self.on_object = vars(pl_module).get(name)
        self.kept: dict[str, nn.Module] = {}

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's own hook, by which Lightning tells whether there is one."""
        return self.on_object or getattr(type(self.pl_module), self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.skip:
            return
        if self.on_object is not None:
            self.on_object(*args, **kwargs)
        else:
            getattr(type(self.pl_module), self.name)(self.pl_module, *args, **kwargs)
        self._keep_network()

    def _keep_network(self) -> None:
        """Puts what is under work back where the hook has made it anew."""
        for name, network in self.kept.items():
            parent_name, _, attribute = name.rpartition(".")
            parent = self.pl_module.get_submodule(parent_name)
            if getattr(parent, attribute, None) is not network:
                setattr(parent, attribute, network)
                rank_zero_warn(
                    f"{type(self.pl_module).__name__}.{self.name} has made {name} anew, and the "
                    "one that is quantized or pruned stays: make a new module to begin from the "
                    "beginning"
                )


def _stand_in(pl_module: "LightningModule", name: str) -> OwnHook | None:
    """The stand-in for a hook, put there now if the module has one; else None."""
    hook = vars(pl_module).get(name)
    if isinstance(hook, OwnHook):
        return hook
    if not is_overridden(name, pl_module, package_of(pl_module).LightningModule):
        return None
    hook = OwnHook(pl_module, name)
    setattr(pl_module, name, hook)
    return hook


def call_hooks_early(trainer: "Trainer", pl_module: "LightningModule") -> None:
    """Calls the hooks now, and lets Lightning's own calls in this run do nothing."""
    call = import_module(f"{package_of(trainer).__name__}.trainer.call")
    for name in HOOKS:
        hook = _stand_in(pl_module, name)
        if hook is None:
            continue
        hook.skip = False  # of a run that broke off
        if name == "setup":
            call._call_lightning_module_hook(trainer, "setup", stage=trainer.state.fn)
        else:
            call._call_configure_model(trainer)
        hook.skip = True


def end_run(pl_module: "LightningModule") -> None:
    """Lets the hooks be called again, in the next run."""
    for name in HOOKS:
        hook = vars(pl_module).get(name)
        if isinstance(hook, OwnHook):
            hook.skip = False


def keep_networks(pl_module: "LightningModule", networks: Mapping[str, nn.Module]) -> None:
    """Lets no hook of ``pl_module`` replace its ``networks``, by name, which are under work."""
    for hook_name in HOOKS:
        hook = _stand_in(pl_module, hook_name)
        if hook is not None:
            hook.kept = dict(networks)


def make_network(pl_module: "LightningModule", keys: Any) -> None:
    """Calls, without a trainer, the hooks that make what a checkpoint holds values for.

    Args:
        pl_module: made by its class, and nothing more.
        keys: of the checkpoint's state dict.

    Raises:
        QatTricksError: ``setup`` would have to make it, and does not work without a trainer.
    """
    lightning_module = package_of(pl_module).LightningModule
    if is_overridden("configure_model", pl_module, lightning_module):
        pl_module.configure_model()  # as Lightning does
    tops = {key.partition(".")[0] for key in keys}
    own = {key.partition(".")[0] for key in pl_module.state_dict()}
    if tops <= own or not is_overridden("setup", pl_module, lightning_module):
        return
    try:
        pl_module.setup("fit")
    except Exception as error:  # whatever the user's code raises
        raise QatTricksError(
            f"{type(pl_module).__name__} makes {', '.join(sorted(tops - own))} in setup, which "
            f"fails without a trainer ({type(error).__name__}: {one_line(error)}): make it in "
            "__init__ or configure_model"
        ) from error
