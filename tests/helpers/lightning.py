"""The Lightning package that a test run uses: ``pytorch_lightning``, or as LIGHTNING_PACKAGE says."""

import os
from importlib import import_module

NAME = os.environ.get("LIGHTNING_PACKAGE", "pytorch_lightning")
pl = import_module(NAME)
