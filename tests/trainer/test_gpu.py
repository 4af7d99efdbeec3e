"""The same promises on a GPU; skipped where there is none."""

import os

import pytest
import torch

import qat_tricks
from qat_tricks.graph import activation_quantizers, layers
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, differences, trainer
from tests.helpers.nets import images

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = {"accelerator": "gpu", "devices": 1}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """The order of sums is fixed, so that two runs can be compared to the last bit."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def fit(recipe, lit=None, *, callbacks=(), ckpt_path=None, **settings):
    pl.seed_everything(0, verbose=False)
    lit = lit or Lit().train()
    run = trainer([*qat_tricks.recipe(recipe), *callbacks], **ON_GPU, **settings)
    run.fit(lit, datamodule=Data(), ckpt_path=ckpt_path)
    return run, lit


@pytest.mark.feature("on a GPU: 32-true, 16-mixed and bf16-mixed; the file runs as trained")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("recipe", ["int8_qat", "int8_prune50", "w4a4_qat"])
def test_a_fit_on_a_gpu_exports_as_it_was_trained(recipe, precision, tmp_path):
    run, lit = fit(recipe, precision=precision)
    assert {p.dtype for p in lit.parameters()} == {torch.float32}
    scales = [float(q.scale) for q in activation_quantizers(lit.backbone).values()]
    assert all(scale > 0 for scale in scales)
    report = qat_tricks.export_onnx(lit.backbone, tmp_path / "a.onnx", images(32))
    assert report.top1_agreement == 1.0
    assert report.sqnr_db > 100
    if recipe == "int8_prune50":
        weights = [layer.effective_weight().flatten() for layer in layers(lit.backbone).values()]
        assert (torch.cat(weights) == 0).float().mean() >= 0.5
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = qat_tricks.load_from_checkpoint(Lit, tmp_path / "a.ckpt")
    assert differences(loaded.state_dict(), lit.cpu().state_dict()) == []


@pytest.mark.feature("on a GPU: evaluation gives the logits of the CPU")
def test_evaluation_on_a_gpu_gives_the_logits_of_the_cpu():
    _, lit = fit("int8_qat")
    x = images(64)
    with torch.no_grad():
        on_gpu = lit.cuda().eval().backbone(x.cuda()).cpu()
        on_cpu = lit.cpu().backbone(x)
    assert torch.equal(on_gpu.argmax(1), on_cpu.argmax(1))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-5, atol=1e-5)


@pytest.mark.feature("on a GPU: resume in 16-mixed ends as a run that was not stopped")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_run_on_a_gpu_ends_as_one_that_was_not_stopped(precision, tmp_path):
    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    settings = {"precision": precision, "enable_checkpointing": True, "max_epochs": 3}
    _, whole = fit("int8_prune50", callbacks=[keep], **settings)
    _, resumed = fit(
        "int8_prune50", Lit(seed=5).train(), ckpt_path=tmp_path / "epoch=0.ckpt", **settings
    )
    assert differences(whole.cpu().state_dict(), resumed.cpu().state_dict()) == []


@pytest.mark.feature("on a GPU: torch.compile(module) trains, with the compiled kernels")
def test_a_compiled_module_trains_on_a_gpu(tmp_path):
    torch._dynamo.reset()
    pl.seed_everything(0, verbose=False)
    lit = Lit().train()
    run = trainer(qat_tricks.recipe("int8_qat"), **ON_GPU, precision="16-mixed")
    run.fit(torch.compile(lit), datamodule=Data())
    report = qat_tricks.export_onnx(lit.backbone, tmp_path / "a.onnx", images(32))
    assert report.top1_agreement == 1.0
