"""Compares the jobs of a sweep, from their files, after the last job."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.comparison import comparison_rows, comparison_table, write_comparison
from qat_tricks.evidence.search import RESULT, search_text, trials, write_search

WIDTH = 160  # columns of the table when it is printed to a file


class CompareJobs(Callback):
    """Hydra's callback that compares the jobs of a sweep; ``conf/train.yaml`` names it.

    It ends the program with status 2 if a job failed; of a search, if all have.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra calls this once all jobs are done."""
        if not compare_jobs(Path(config.hydra.sweep.dir), list(config.objectives)):
            sys.exit(2)


def compare_jobs(folder: Path, objectives: Sequence[str] = ()) -> bool:
    """Writes ``comparison.html``, ``.csv`` and ``.png`` of a sweep, and prints the table.

    Args:
        folder: the sweep's.
        objectives: of a search, whose Pareto front is printed and in ``search.json`` then.

    Returns:
        Whether no job failed; of a search, whether any did not.
    """
    try:
        write_comparison(folder)
        # From files, so that jobs may have run in other processes or on other machines.
        rows = comparison_rows(folder)
        found = trials(folder, rows, objectives) if objectives else []
        if objectives:
            write_search(folder, found, objectives)
    except QatTricksError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(comparison_table(rows, console.width))
    files = ["comparison.html", "comparison.csv", "comparison.png"]
    if objectives:
        console.print(search_text(found, objectives), soft_wrap=True, highlight=False, markup=False)
        files.append(RESULT)
    console.print(f"the sweep is in {folder}: {', '.join(files)}", soft_wrap=True, highlight=False)
    if objectives:
        return any(trial.values is not None for trial in found)
    return not any(row["error"] for row in rows)
