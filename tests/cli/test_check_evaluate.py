"""An evaluation's config: checked before any file is opened."""

from qat_tricks.cli.check_evaluate import check_evaluate
from qat_tricks.jobs.config import evaluation_folder
from tests.helpers import configs
from tests.helpers.configs import composed


def refusal(*settings):
    return configs.refusal(check_evaluate, *settings, name="evaluate")


def test_evaluate_needs_an_artifact_and_knows_where_to_write():
    told = refusal("measure.runs=0")
    assert "artifact is missing" in told
    assert "runs=0" in told
    assert "float=3" in refusal("artifact=a.onnx", "float=3")
    assert "data.shift" in refusal("artifact=a", "data.name=digits", "data.shift=x")
    config = composed("artifact=runs/a.onnx", "data=digits", name="evaluate")
    check_evaluate(config)
    assert str(evaluation_folder(config)) == "runs/evaluation"


def test_all_wrong_settings_are_told_at_once():
    told = refusal(
        "artifact=3",
        "float=",
        "runtimes=[]",
        "data=3",
        "measure.runs=0",
        "foo=1",
        "report.language=fr",
    )
    for part in (
        "artifact=3 is",
        "runtimes=[] is",
        "data=3 is",
        "runs=0",
        '"foo"',
        "language=fr is not allowed: give en or ja",
    ):
        assert part in told
    assert "float=" not in told  # null: the one beside the artifact


def test_sensitivity_is_of_a_checkpoint():
    assert "sensitivity='x'" in refusal("artifact=a.ckpt", "sensitivity=x")
    told = refusal("artifact=a.onnx", "sensitivity=true")
    assert "needs a .ckpt" in told
    assert "give artifact=model.ckpt" in told
    check_evaluate(composed("artifact=a.ckpt", "data=digits", "sensitivity=true", name="evaluate"))
