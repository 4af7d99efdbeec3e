"""The folder of the YAML files."""

from qat_tricks.settings.config_dir import config_dir


def test_the_configs_are_found():
    assert (config_dir() / "train.yaml").is_file()
