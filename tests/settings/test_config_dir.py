"""The folder of the YAML files."""

from qat_tricks.settings import config_dir as module
from qat_tricks.settings.config_dir import config_dir


def test_the_configs_are_found():
    assert (config_dir() / "train.yaml").is_file()


def test_the_folder_inside_the_package_comes_before_the_one_beside_it(tmp_path, monkeypatch):
    package = tmp_path / "package"
    monkeypatch.setattr(module, "__file__", str(package / "settings" / "config_dir.py"))
    (tmp_path / "conf").mkdir()
    assert config_dir() == tmp_path / "conf"  # as in a checkout
    (package / "conf").mkdir(parents=True)
    assert config_dir() == package / "conf"  # as in a wheel
