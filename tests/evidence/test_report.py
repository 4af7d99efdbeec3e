"""Reports: whole, readable, and honest about what was not measured."""

import json
import math

import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.checklist import checklist
from qat_tricks.evidence.report import REQUIRED_KEYS, SCHEMA, environment, read_report, write_report
from tests.evidence.test_language import everything
from tests.helpers import ROOT
from tests.helpers.samples import report


def test_what_is_written_reads_back_with_the_environment(tmp_path):
    folder = tmp_path / "run"
    write_report(folder, report())
    made = {"environment": environment(), "schema": SCHEMA}
    expected = report() | made | {"language": "en", "checklist": checklist(report() | made)}
    assert read_report(folder) == read_report(folder / "report.json") == expected
    names = ["report.html", "report.json", "report.md"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_every_figure_reaches_the_reader(tmp_path):
    write_report(tmp_path, report(packed_bytes=205_000))
    text = (tmp_path / "report.md").read_text()
    shown = [
        "int8_ptq",
        "resnet20",
        "digits",
        "98.00%",
        "-0.50 points",
        "99.10%",
        "41.5 dB",
        "1.10 MB",
        "310.0 kB",
    ]
    shown += [
        "205.0 kB",
        "0.600 ms",
        "2.00x",
        "71 MiB",
        "2 thread(s)",
        "batch of 1",
        "sha256:abc",
        '"resize": 32',
    ]
    for part in [*shown, environment()["cpu"], environment()["torch"], "x64quantprecision"]:
        assert part in text, part


def test_what_was_not_measured_is_never_zero(tmp_path):
    unknown = dict.fromkeys(REQUIRED_KEYS) | {
        "recipe": "int8_ptq",
        "model": "resnet20",
        "data": "digits",
    }
    keys = ("accuracy", "top5", "f1", "ece", "nll", "seconds")
    unknown["stages"] = [{"name": "onnx", **dict.fromkeys(keys)}]
    write_report(tmp_path, unknown)
    text = (tmp_path / "report.md").read_text()
    assert text.count("not measured") > 20
    assert "None" not in text
    tables = [line for line in text.splitlines() if line.startswith("|") and "not measured" in line]
    assert not any(
        character.isdigit()
        for line in tables
        for character in line.replace("top-5", "")
        .replace("top-1", "")
        .replace("p50", "")
        .replace("p95", "")
        .replace("p99", "")
    )


def test_figures_that_are_not_finite_stay_json(tmp_path):
    write_report(
        tmp_path, report(parity={"top1_agreement": 1.0, "max_abs_error": 0.0, "sqnr_db": math.inf})
    )
    assert json.loads((tmp_path / "report.json").read_text())["parity"]["sqnr_db"] is None


def test_a_pipe_in_a_name_does_not_break_the_table(tmp_path):
    stages = report()["stages"]
    stages[0]["name"] = "a|b"
    write_report(tmp_path, report(stages=stages))
    assert "| a\\|b |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_a_missing_key_is_named(tmp_path, key):
    incomplete = report()
    del incomplete[key]
    with pytest.raises(QatTricksError, match=key):
        write_report(tmp_path / "run", incomplete)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "message"), [([], r"stages\[0\]"), ([{"name": "fp32"}], r"stages\[0\]\.accuracy")]
)
def test_stages_without_figures_are_named(tmp_path, stages, message):
    with pytest.raises(QatTricksError, match=message):
        write_report(tmp_path, report(stages=stages))


def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    write_report(tmp_path, report())
    before = (tmp_path / "report.json").read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(QatTricksError, match="No space left"):
        write_report(tmp_path, report("other"))
    assert (tmp_path / "report.json").read_text() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(QatTricksError, match="cannot be written") as caught:
        write_report(tmp_path / "file" / "run", report())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"recipe": "x"}'])
def test_a_file_that_is_no_report_is_refused(tmp_path, content):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(QatTricksError, match=r"report\.json"):
        read_report(path)


def step(name, evaluation_db, **facts):
    return {
        "name": name,
        "evaluation_db": evaluation_db,
        "training_db": None,
        "by_design": False,
        "undone": [],
        **facts,
    }


def test_each_step_stands_against_the_users_own_network(tmp_path):
    written = report()
    written["stages"][-1]["equivalence"] = [
        step("traced", 141.2),
        step("folded", 138.9, training_db=137.4, undone=["bn1"]),
        step("caps filled", 52.0, by_design=True),
    ]
    write_report(tmp_path, written)
    text = (tmp_path / "report.md").read_text()
    assert "| traced | 141.2 dB | not measured |  |" in text
    assert "| folded | 138.9 dB | 137.4 dB | left out: bn1 |" in text
    assert "| caps filled | 52.0 dB | not measured | changes the function by design |" in text
    assert "your network → traced → folded → caps filled: 141, 139, 52 by design dB." in text
    write_report(tmp_path, report())
    assert "your network" not in (tmp_path / "report.md").read_text()


def test_chosen_bits_stand_in_the_report(tmp_path):
    part = {"name": "conv|1", "kind": "weights", "bits": 3, "kl": 0.0125}
    chosen = {"share": 0.5, "unit": "bits of the weights", "reached": 0.49, "images": 64}
    chosen |= {"kl": 0.02, "together": 0.03, "parts": [part]}
    write_report(tmp_path, report(mixed_precision=chosen))
    text = (tmp_path / "report.md").read_text()
    assert "50.00% of the bits of the weights with 8 bits everywhere; reached: 49.00%" in text
    assert "sum to 0.02" in text
    assert "| conv\\|1 | weights | 3 | 0.0125 |" in text


def test_removed_channels_stand_in_the_report(tmp_path):
    removed = {
        "macs": [4e6, 1e6],
        "parameters": [2e6, 5e5],
        "latency_ms": [3.0, 1.5],
        "groups": [{"name": "conv|1", "channels": [64, 24]}],
        "fixed": {"fc": "it is an output of the network"},
    }
    write_report(tmp_path, report(channels=removed))
    text = (tmp_path / "report.md").read_text()
    assert "| million MACs an image | 4.0000 | 1.0000 | 25.00% |" in text
    assert "| ms a batch in int8, when it was chosen | 3.00 ms | 1.50 ms | 50.00% |" in text
    assert "| channels of conv\\|1 | 64 | 24 | 37.50% |" in text
    assert "These keep all: fc (it is an output of the network)." in text
    del removed["latency_ms"]
    write_report(tmp_path, report(channels=removed))
    assert "ms a batch" not in (tmp_path / "report.md").read_text()
    write_report(tmp_path, report())
    assert "Channels removed" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (None, "No kernel of ONNX Runtime's on CPUs gets faster by them"),
        ("onnxruntime_cpu", "No kernel of ONNX Runtime's on CPUs gets faster by them"),
        ("openvino_cpu", "Neither its kernels nor its sparse weights got faster"),
        ("tensorrt", "TensorRT has kernels for two zeros in each four weights"),
    ],
)
def test_what_sparsity_brings_is_told_of_the_target(tmp_path, target, told):
    write_report(tmp_path, report(target=target))
    (line,) = [x for x in (tmp_path / "report.md").read_text().splitlines() if "Zeros among" in x]
    assert told in line
    assert line.endswith("the compressed file gets smaller.")


def test_the_docs_list_every_key(tmp_path):
    """Of every report that the samples and the jobs' code can make."""
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    write_report(tmp_path, everything())
    for key in (*read_report(tmp_path), *REQUIRED_KEYS):
        assert f"`{key}`" in text, key
