"""Files that the version before wrote load, evaluate and resume; tests/artifacts holds them."""

import json
import logging

import pytest
import torch

import qat_tricks
from qat_tricks.cli import main as cli
from qat_tricks.graph import activation_quantizers, features, layers
from qat_tricks.tricks import Calibrate
from tests.helpers.lit import Data, Lit, differences, trainer
from tests.helpers.mid_epoch import ARTIFACTS, arithmetic, fit
from tests.helpers.nets import images


@pytest.fixture
def never_calibrated_again(monkeypatch):
    def never(*args):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(Calibrate, "apply", never)


@pytest.mark.parametrize(
    ("artifact", "stages"),
    [("model.ckpt", ["fp32", "simulated", "onnx"]), ("model.onnx", ["fp32", "onnx"])],
)
def test_a_runs_files_are_evaluated_as_they_were(artifact, stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    quick = ["measure.runs=5", "measure.batch_sizes=[1]", "measure.thread_counts=[1]"]
    quick += ["measure.threads=1", "measure.point_seconds=0.01", "runtimes=[onnxruntime]"]
    floats = ARTIFACTS / "model_fp32.onnx"
    cli.evaluate(
        [f"artifact={ARTIFACTS / artifact}", f"float={floats}", "folder=evaluated", *quick]
    )
    report = json.loads((tmp_path / "evaluated" / "report.json").read_text())
    measured = {stage["name"]: stage for stage in report["stages"]}
    expected = json.loads((ARTIFACTS / "model_expected.json").read_text())
    assert list(measured) == stages
    for name in stages:
        assert measured[name]["accuracy"] == expected[name]["accuracy"]
        assert measured[name]["nll"] == pytest.approx(expected[name]["nll"], rel=1e-4)
    assert report["agreement"] == 1
    assert (report["model"], report["data"]) == ("custom", "fake")


@pytest.mark.usefixtures("never_calibrated_again")
@pytest.mark.parametrize("folds_teacher", [False, True])
def test_a_fit_goes_on_from_the_middle_of_an_epoch_to_the_same_end(folds_teacher, monkeypatch):
    """To the last bit, but for the teacher: it is folded since, and differs by rounding."""
    if not folds_teacher:
        monkeypatch.setattr(features, "fold_batchnorm", lambda traced, skip: [])
    expected = torch.load(ARTIFACTS / "mid_epoch_end.pt", weights_only=True)
    exact = expected.pop("made_with") == arithmetic()
    # other weights, which the checkpoint replaces
    lit = fit(seed=5, ckpt_path=ARTIFACTS / "mid_epoch.ckpt")
    reached = lit.state_dict()
    assert list(reached) == list(expected)
    assert any(key.endswith("weight_mask") for key in reached)
    assert any(key.endswith("scale") for key in reached)
    if exact and not folds_teacher:
        assert differences(expected, dict(reached)) == []
    for key, value in reached.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.usefixtures("never_calibrated_again")
def test_a_checkpoint_of_a_fit_loads_strictly_without_the_recipe():
    saved = torch.load(ARTIFACTS / "mid_epoch.ckpt", weights_only=True)
    assert {"Prune", "Distill"} <= set(saved["callbacks"])
    lit = qat_tricks.load_from_checkpoint(Lit, ARTIFACTS / "mid_epoch.ckpt")
    assert differences(dict(lit.state_dict()), dict(saved["state_dict"])) == []
    learned = [name for name, p in lit.named_parameters() if name.endswith("scale")]
    assert len(learned) >= len(activation_quantizers(lit.backbone))


@pytest.mark.usefixtures("never_calibrated_again")
def test_a_submodule_that_was_not_traced_through_stays_so():
    saved = torch.load(ARTIFACTS / "whole.ckpt", weights_only=True)
    assert saved["qat_tricks"]["spec"]["whole"] == ["block"]
    lit = qat_tricks.load_from_checkpoint(Lit, ARTIFACTS / "whole.ckpt")
    assert "block" in {str(node.target) for node in lit.backbone.graph.nodes}
    assert not any(name.startswith("block") for name in layers(lit.backbone))
    expected = torch.load(ARTIFACTS / "whole_logits.pt", weights_only=True)
    torch.testing.assert_close(lit(images(4)).detach(), expected, rtol=1e-4, atol=1e-5)
    # and a trainer with a recipe finds all done
    fresh = Lit(seed=5)
    trainer(qat_tricks.recipe("int8_ptq", ["whole=[block]"])).test(
        fresh, Data(), ckpt_path=str(ARTIFACTS / "whole.ckpt"), verbose=False
    )
    assert differences(dict(fresh.state_dict()), dict(lit.state_dict())) == []
