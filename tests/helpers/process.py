"""Functions in processes of their own, forked from one that has imported everything slow.

A fresh interpreter takes seconds to import torch and Lightning. Where a test needs a process, and
not a fresh interpreter, a fork of one that has done so serves as well.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from tests.helpers import ROOT

_CONTEXT = multiprocessing.get_context("forkserver")


class Forked:
    """A running function, whose output goes to files.

    Args:
        function: can be imported by name; what it raises, and ``sys.exit``, set the exit status.
        args: of the function.
        output: folder for the files with its output, made if there is none.
        cwd: folder that it runs in.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *args: Any,
        output: Path,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.name, self.output = getattr(function, "__name__", repr(function)), output
        _ensure_forkserver()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        job = (function, args, str(output), str(cwd), variables)
        self.process = _CONTEXT.Process(target=_run, args=job)
        self.process.start()

    def wait(self, timeout: float = 120) -> CompletedProcess[str]:
        """Waits for the end, as ``subprocess.run`` does, and returns what that would return."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"{self.name} takes longer than {timeout} s: {self._read('stderr')}")
        told = [self._read(stream) for stream in ("stdout", "stderr")]
        return CompletedProcess(self.name, self.process.exitcode, *told)

    def _read(self, stream: str) -> str:
        return (self.output / stream).read_text()


def run_forked(function: Callable[..., Any], *args: Any, **settings: Any) -> CompletedProcess[str]:
    """Runs a function in a process of its own to its end; the arguments are those of ``Forked``."""
    return Forked(function, *args, **settings).wait()


def train_py(*arguments: str) -> None:
    """Does in this process what ``python train.py ARGUMENTS`` does."""
    from qat_tricks.cli.main import train  # in the forked process alone

    sys.argv = [str(ROOT / "train.py"), *arguments]
    train()


def _ensure_forkserver() -> None:
    """Starts the forkserver; it reads these variables when its interpreter starts."""
    needed = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in needed}
    _CONTEXT.set_forkserver_preload(["tests.helpers.preloaded"])
    os.environ.update(needed)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    output: str,
    cwd: str,
    environment: dict[str, str],
) -> None:
    import torch  # imported already by the forkserver

    for number, stream in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(output) / stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update({**environment, "PYTHONPATH": os.pathsep.join(sys.path)})
    os.chdir(cwd)
    torch.set_num_threads(1)
    function(*args)
