"""Files that appear whole or not at all."""

import json

import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.files import read_json, replacing, write_json, write_tensors, write_text


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
