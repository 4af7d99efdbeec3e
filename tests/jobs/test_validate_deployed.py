import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs import validate_deployed
from qat_tricks.jobs.validate_deployed import ACCURACY, AGREEMENT, SQNR, ValidateDeployed
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, trainer


class Seen(pl.Callback):
    """Notes what is logged after each validation."""

    def __init__(self):
        self.figures = []

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            assert ACCURACY not in trainer.callback_metrics
            return
        found = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.figures.append({key: found[key] for key in (ACCURACY, AGREEMENT, SQNR)})


def fit(*extra, recipe="int8_qat", every_n_epochs=1, **settings):
    lit, seen = Lit().train(), Seen()
    callbacks = [*qat_tricks.recipe(recipe), ValidateDeployed(every_n_epochs), seen, *extra]
    trainer(callbacks, **settings).fit(lit, datamodule=Data())
    return lit, seen.figures


def test_the_file_is_as_good_as_qat_tricks_evaluate_says(tmp_path):
    lit, figures = fit()
    assert len(figures) == 2
    lit.backbone.cpu().eval()
    path = tmp_path / "model.onnx"
    x = next(iter(Data().val_dataloader()))[0]
    qat_tricks.export_onnx(lit.backbone, path, x * 0.5)
    # the module halves the images before its network, which the file does not know
    halved = [(images * 0.5, labels) for images, labels in Data().val_dataloader()]
    assert figures[-1][ACCURACY] == pytest.approx(qat_tricks.evaluate(path, halved).accuracy)
    assert figures[-1][AGREEMENT] == 1.0
    assert figures[-1][SQNR] == 200.0


def test_the_training_is_the_one_without_it():
    lit, _ = fit()
    alone = Lit().train()
    trainer(qat_tricks.recipe("int8_qat")).fit(alone, datamodule=Data())
    for name, value in alone.state_dict().items():
        assert torch.equal(value, lit.state_dict()[name]), name
    assert not lit.backbone._forward_hooks


def test_a_checkpoint_keeps_the_best_deployed_network(tmp_path):
    keep = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, monitor=ACCURACY, mode="max")
    _, figures = fit(keep, max_epochs=3, enable_checkpointing=True)
    assert float(keep.best_model_score) == pytest.approx(max(f[ACCURACY] for f in figures))
    loaded = qat_tricks.load_from_checkpoint(Lit, keep.best_model_path)
    assert loaded.eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


def test_skipped_epochs_export_nothing_and_repeat_the_figures(monkeypatch):
    exports = []
    real = validate_deployed.export_onnx
    monkeypatch.setattr(
        validate_deployed, "export_onnx", lambda *a, **k: (exports.append(1), real(*a, **k))[1]
    )
    _, figures = fit(every_n_epochs=2, max_epochs=4)
    assert len(exports) == 2
    assert figures[1] == figures[0]
    assert figures[3] == figures[2]


def test_epochs_are_skipped_in_which_it_would_take_more_than_its_share(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(validate_deployed.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(validate_deployed, "FIRST_SECONDS", 0.5)
    exports = []
    real = validate_deployed.export_onnx

    def export_once(network, path, *arguments, **settings):
        """How often it exports is counted here, and the first file does for all."""
        if exports:
            path.write_bytes(exports[0])
        else:
            real(network, path, *arguments, **settings)
        exports.append(path.read_bytes())

    monkeypatch.setattr(validate_deployed, "export_onnx", export_once)

    def fit_with(max_share):
        del exports[1:]
        before = len(exports)
        lit, callback = Lit().train(), ValidateDeployed(max_share=max_share)
        callbacks = [*qat_tricks.recipe("int8_qat", report=False), callback]
        trainer(callbacks, max_epochs=6).fit(lit, datamodule=Data())
        return len(exports) - before, callback._last

    always, _ = fit_with(1.0)
    some, figures = fit_with(0.3)
    none, nothing = fit_with(1e-9)
    assert always > some > none == 0
    assert figures.keys() == {ACCURACY, AGREEMENT, SQNR}
    assert nothing == {}


def test_a_share_leaves_a_network_in_float_alone():
    trainer([ValidateDeployed(max_share=1.0)]).fit(Lit().train(), datamodule=Data())
    with pytest.raises(QatTricksError, match="max_share=2 is not allowed"):
        ValidateDeployed(max_share=2)


def test_a_sanity_check_exports_nothing():
    _, figures = fit(num_sanity_val_steps=1, max_epochs=1)
    assert figures[-1].keys() == {ACCURACY, AGREEMENT, SQNR}


def test_without_a_quantized_network_it_is_refused_in_one_line():
    with pytest.raises(QatTricksError, match="finds no quantized network in Lit: give"):
        trainer([ValidateDeployed()]).fit(Lit().train(), datamodule=Data())
    with pytest.raises(QatTricksError, match="every_n_epochs=0 is not allowed"):
        ValidateDeployed(0)


@pytest.mark.parametrize("extra", ["mixed", "average", "compiled"])
def test_beside_what_changes_a_training(extra):
    callbacks, settings = [], {}
    if extra == "mixed":
        settings = {"precision": "bf16-mixed"}
    elif extra == "average":
        callbacks = [pl.callbacks.EMAWeightAveraging(decay=0.5)]
    else:
        torch._dynamo.reset()
        callbacks = [qat_tricks.CompileNetwork(backend="aot_eager")]
    _, figures = fit(*callbacks, recipe="int8_prune50", **settings)
    assert figures[-1][AGREEMENT] > 0.9
