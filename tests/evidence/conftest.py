"""A sweep on disk, for the tests of its comparison and of the comparison's picture."""

import json

import pytest

from qat_tricks.evidence.report import write_report
from tests.helpers.samples import report


@pytest.fixture
def sweep(tmp_path):
    write_report(tmp_path / "0", report("int8_ptq", accuracy=0.975))
    write_report(tmp_path / "1", report("int8_qat", accuracy=0.982))
    write_report(tmp_path / "10" / "nested", report("int8_prune50", accuracy=0.98, scale=0.9))
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "error.json").write_text(json.dumps({"error": "the loader is empty"}))
    return tmp_path
