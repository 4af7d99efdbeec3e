import copy
import functools
import gc
import importlib
import os
import sys

import pytest
import torch

# First of all: what follows takes the package that is imported already.
from tests.helpers.lightning import NAME as LIGHTNING

from qat_tricks.progress import enter  # isort: skip

os.environ["WANDB_MODE"] = "offline"

# Modules whose single tests take longest come first, so that no process has one left at the end.
LONGEST = (
    "trainer/test_launchers.py",
    "trainer/test_ddp.py",
    "trainer/test_scale_out.py",
    "deploy/test_awkward.py",
    "deploy/test_export.py",
    "deploy/test_signed.py",
    "jobs/test_evaluate.py",
    "tests/test_site.py",
    "jobs/test_guideline.py",
    "cli/test_search.py",
)
NAMES_BEFORE = pytest.StashKey()  # of what lies in the repository


def pytest_report_header():
    return f"Lightning: {LIGHTNING}"


def visible_names(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def pytest_sessionstart(session):
    session.config.stash[NAMES_BEFORE] = visible_names(session.config.rootpath)


def pytest_sessionfinish(session):
    """Fails a session that leaves files in the repository: they would be committed."""
    left = visible_names(session.config.rootpath) - session.config.stash[NAMES_BEFORE]
    if left and not hasattr(session.config, "workerinput"):
        raise pytest.UsageError(f"tests left {sorted(left)} in the repository")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "feature(name): a row of docs/results/lightning.md that the test proves"
    )
    _read_translations_once()
    _compose_recipes_once()
    _keep_standard_error()


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.as_posix()
        return next((i for i, end in enumerate(LONGEST) if path.endswith(end)), len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish():
    """Collects garbage less often: an export makes so many objects that a tenth of its time went
    into looking again through those of PyTorch and of this suite, which stay.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def _read_translations_once():
    """PyTorch's exporter parses the sources of its 500 translations to ONNX at every export: a
    quarter of the time that a small network takes. They are the same each time.
    """
    try:
        lazy = importlib.import_module("torch.onnx._internal._lazy_import").onnxscript_apis
    except (ImportError, AttributeError):
        return  # another PyTorch, which is only slower

    @functools.cache
    def parsed():
        return importlib.import_module(lazy._name).get_torchlib_ops()

    lazy.get_torchlib_ops = lambda: list(parsed())


def _compose_recipes_once():
    """Hydra reads its files anew for each recipe: an eighth of the time of a small training."""
    # Only now: what is imported here must come behind the package of Lightning's that is tested.
    recipe = importlib.import_module("qat_tricks.recipes.recipe")
    compose, composed = recipe._compose, {}

    def once(name, overrides, problems):
        key = (str(recipe.config_dir()), name, *overrides)
        if key not in composed:
            config = compose(name, overrides, problems)
            if problems.messages:  # they are told each time
                return config
            composed[key] = config
        return copy.deepcopy(composed[key])

    recipe._compose = once


def _keep_standard_error():
    """Lets absl, which comes with TensorBoard, write to the process's own standard error.

    Its handler closes the stream that it found at its import unless that is ``sys.stderr`` at the
    end, and Hydra ends all handlers: pytest's own file was closed, and every later test failed.
    """
    try:
        absl = importlib.import_module("absl.logging")
    except ImportError:
        return
    absl.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    """Each test has its own cache and a fixed seed."""
    monkeypatch.setenv("QAT_TRICKS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    torch.set_num_threads(1)  # these networks are too small to share


@pytest.fixture
def terminal(capsys, monkeypatch):
    """Standard error is a terminal, and what is drawn on it can be read."""
    # Of the class: capsys replaces the object from one phase of a test to the next.
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda file: file is not sys.stdout)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    yield
    enter("")
