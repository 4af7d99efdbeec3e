"""Options, the command that repeats a run, and the Markdown report: shared by all benchmarks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def argument_parser(description: str | None, threads: int | None = None) -> argparse.ArgumentParser:
    """A parser with ``--out``.

    Args:
        description: the benchmark's docstring.
        threads: default of ``--threads``; None leaves that option out.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--out", type=Path, help="Markdown file to write, as in docs/results")
    return parser


def command(args: argparse.Namespace, *options: str) -> str:
    """The line that repeats a run, as Markdown, with the values of the options named."""
    script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).parent.resolve()).as_posix()
    values = []
    for option in options:
        value = getattr(args, option)
        text = f"{value:g}" if isinstance(value, float) else str(value)
        values.append(f"--{option.replace('_', '-')} {text}")
    return "`" + " ".join([f"python benchmarks/{script}", *values]) + "`"


class Report:
    """A Markdown file with a title, a few lines and a table.

    It is printed and written as it grows, so that an interrupted run leaves its rows.

    Args:
        title: of the file.
        about: lines above the table: the command, versions, units.
        columns: headings of the table; one that ends with ``:`` is aligned to the right.
        out: the file to write; None only prints.
    """

    def __init__(
        self, title: str, about: Sequence[str], columns: Sequence[str], out: Path | None
    ) -> None:
        self.out = out
        self.lines: list[str] = []
        rules = ["--:" if column.endswith(":") else "---" for column in columns]
        headings = [column.removesuffix(":") for column in columns]
        self._extend([f"# {title}", "", *about, "", table_row(*headings), f"|{'|'.join(rules)}|"])

    def add(self, *cells: object) -> None:
        """Adds a row to the table."""
        self._extend([table_row(*cells)])

    def add_lines(self, *lines: str) -> None:
        """Adds lines as they are: rows made elsewhere, or text below the table."""
        self._extend(lines)

    def _extend(self, lines: Sequence[str]) -> None:
        self.lines += lines
        print("\n".join(lines), flush=True)
        if self.out:
            self.out.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def table_row(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"
