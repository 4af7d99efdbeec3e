"""Builds the registry of PyTorch's exporter once, and not in each export.

For it the exporter parses the source of some 500 functions, which takes a third of the export of a
small network, and forgets them when it is done.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.onnx._internal.exporter import _registration

_BUILD = "from_torchlib"

_built: dict[tuple[Any, ...], Any] = {}
"""Registries, by the operators and the version of ONNX that they were built for."""


@contextmanager
def kept_registry() -> Iterator[None]:
    """For the length of a block, exports take the registry that the first one has built.

    These are inner parts of PyTorch. A version that has others builds it each time.
    """
    kind: Any = getattr(_registration, "ONNXRegistry", None)
    own = None if kind is None else vars(kind).get(_BUILD)
    if not isinstance(own, classmethod):
        yield
        return

    def build(cls: Any, *args: Any, **options: Any) -> Any:
        # It has the operators that are there, and a library may add some, as torchvision does.
        operators = len(torch._C._dispatch_get_all_op_names())
        key = (cls, operators, *args, *sorted(options.items()))
        if key not in _built:
            _built[key] = own.__func__(cls, *args, **options)
        registry = copy.copy(_built[key])
        # An export may enter functions of its own.
        registry.functions = {target: [*found] for target, found in registry.functions.items()}
        return registry

    setattr(kind, _BUILD, classmethod(build))
    try:
        yield
    finally:
        setattr(kind, _BUILD, own)
