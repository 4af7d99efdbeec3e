import io

import pytest
from PIL import Image
from rich.console import Console

from qat_tricks.evidence.sensitivity import plot_sensitivity, sensitivity_table

ERROR = {"kl": 0.25, "sqnr_db": 12.34, "agreement": 0.75}
SENSITIVITY = {
    "images": 64,
    "together": {"kl": 0.5, "sqnr_db": 9.0, "agreement": 0.5},
    "parts": [
        {"name": "layer1.conv", "kind": "weights", "bits": 4, **ERROR},
        {"name": "relu", "kind": "activations", "bits": 8, **ERROR, "kl": 0.0},
    ],
}


def test_the_table_has_a_row_a_part_and_one_for_all():
    console = Console(file=io.StringIO(), width=100)
    console.print(sensitivity_table(SENSITIVITY))
    lines = console.file.getvalue().splitlines()
    (worst,) = (line for line in lines if "layer1.conv" in line)
    assert [*worst.split()] == ["layer1.conv", "weights", "4", "0.25", "12.3", "dB", "75.00%"]
    assert any("all together" in line and "0.5" in line for line in lines)
    assert any("64 training images" in line for line in lines)


@pytest.mark.parametrize("parts", [2, 60])
def test_the_picture_grows_with_the_parts(tmp_path, parts):
    many = {**SENSITIVITY, "parts": (SENSITIVITY["parts"] * 30)[:parts]}
    plot_sensitivity(many, tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as picture:
        width, height = picture.size
    assert width > 800
    assert height > 20 * parts
