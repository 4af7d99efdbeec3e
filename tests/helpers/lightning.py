"""The Lightning package of a test run: LIGHTNING_PACKAGE, by default ``pytorch_lightning``."""

import os
from importlib import import_module

NAME = os.environ.get("LIGHTNING_PACKAGE", "pytorch_lightning")
pl = import_module(NAME)
