"""Files that appear whole or not at all."""

import json
import subprocess
import sys

import pytest
import torch
from filelock import FileLock

from qat_tricks.errors import QatTricksError
from qat_tricks.files import (
    LOCK,
    InUseError,
    read_json,
    replacing,
    reserved,
    write_json,
    write_tensors,
    write_text,
)


def test_a_file_whose_writing_fails_is_the_one_before(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "before")

    def write_half():
        with replacing(path) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]  # and no draft beside it


def test_a_file_is_not_in_its_place_before_it_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as draft:
        draft.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(QatTricksError, match=r"cannot be written .*give a path in a folder of"):
        write_text(tmp_path / "file" / "inside.txt", "text")


def test_figures_that_json_has_not_become_null(tmp_path):
    figures = {"rows": [1.5, float("nan"), (float("inf"), 2)], "name": "ä", "count": 3}
    write_json(tmp_path / "f.json", figures)
    expected = {"rows": [1.5, None, [None, 2]], "name": "ä", "count": 3}
    assert read_json(tmp_path / "f.json") == expected
    assert json.loads((tmp_path / "f.json").read_text(encoding="utf-8")) == expected


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path):
    with pytest.raises(QatTricksError, match=r'cannot read ".*none\.json"'):
        read_json(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(QatTricksError, match=r'cut\.json" is not JSON'):
        read_json(tmp_path / "cut.json")


def test_tensors_read_back(tmp_path):
    data = {"weight": torch.randn(3), "step": 4}
    write_tensors(data, tmp_path / "new" / "t.pt")
    again = torch.load(tmp_path / "new" / "t.pt", weights_only=True)
    assert torch.equal(again["weight"], data["weight"])
    assert again["step"] == 4


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with reserved(folder):
        told = r'still going writes into ".*run": wait for its end'
        with pytest.raises(InUseError, match=told), reserved(folder):
            pass
        with reserved(tmp_path / "other"):
            pass
        assert (folder / LOCK).exists(), "the refused one has taken the lock away"
    with reserved(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_folder_of_a_run_that_was_killed_is_free(tmp_path):
    program = (
        "import os, pathlib, signal, sys\n"
        "from qat_tricks.files import reserved\n"
        "with reserved(pathlib.Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert killed.returncode < 0
    assert (tmp_path / LOCK).exists()
    with reserved(tmp_path):
        pass


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    def acquire(lock, timeout):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.warns(UserWarning, match="has no locks"), reserved(tmp_path):
        pass


def test_a_folder_that_cannot_be_reserved_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    told = r"cannot be written .*give a path in a folder of"
    with pytest.raises(QatTricksError, match=told), reserved(tmp_path / "file" / "run"):
        pass
