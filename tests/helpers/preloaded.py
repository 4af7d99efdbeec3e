"""What the forkserver of ``tests.helpers.process`` imports before it forks: all that is slow."""

import tests.helpers.lightning  # isort: skip - the package that is imported first is used
import tests.helpers.ddp_fit
import tests.helpers.lit
from qat_tricks.cli import check_train, command_line
from qat_tricks.jobs import train

__all__ = ["check_train", "command_line", "tests", "train"]
