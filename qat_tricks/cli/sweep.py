"""Compares the jobs of a sweep, from their files, after the last job."""

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.comparison import comparison_rows, comparison_table, write_comparison

WIDTH = 160  # columns of the table when it is printed to a file


class CompareJobs(Callback):
    """Hydra's callback that compares the jobs of a sweep; ``conf/train.yaml`` names it.

    It ends the program with status 2 if a job failed.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra calls this once all jobs are done."""
        if not compare_jobs(Path(config.hydra.sweep.dir)):
            sys.exit(2)


def compare_jobs(folder: Path) -> bool:
    """Writes ``comparison.html``, ``.csv`` and ``.png`` of a sweep, and prints the table.

    Returns:
        Whether no job failed.
    """
    try:
        write_comparison(folder)
        # From files, so that jobs may have run in other processes or on other machines.
        rows = comparison_rows(folder)
    except QatTricksError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(comparison_table(rows, console.width))
    console.print(
        f"the sweep is in {folder}: comparison.html, comparison.csv, comparison.png",
        soft_wrap=True,
        highlight=False,
    )
    return not any(row["error"] for row in rows)
