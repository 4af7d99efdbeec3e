"""Checkpoints of compiled modules, and of modules that other trainers load them into."""

import pytest
import torch

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.trainer.checkpoints import save_checkpoint
from tests.helpers.lit import Data, Lit, differences, loader, trainer
from tests.helpers.nets import images


class Compiled(Lit):
    """Compiles its network, as many do at the end of ``__init__``."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        self.backbone = torch.compile(self.backbone, backend="eager")


def quantized(path, recipe="int8_qat"):
    run = trainer(qat_tricks.recipe(recipe), max_epochs=1, limit_train_batches=2)
    run.fit(lit := Lit().train(), datamodule=Data())
    run.save_checkpoint(path)
    return lit


def with_keys(path, change):
    """Writes the checkpoint once more, with other keys."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {change(k): v for k, v in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)


def of_the_network(key):
    return key.replace("backbone.", "backbone._orig_mod.")


def of_the_module(key):
    return f"_orig_mod.{key}"


@pytest.mark.feature("checkpoints of compiled modules and networks (_orig_mod.)")
@pytest.mark.parametrize("change", [of_the_network, of_the_module])
@pytest.mark.parametrize("kind", ["quantized", "float"])
def test_keys_of_compiled_modules_are_loaded(tmp_path, change, kind):
    path = tmp_path / "a.ckpt"
    if kind == "float":
        save_checkpoint(lit := Lit(seed=3), path)
    else:
        lit = quantized(path)
    with_keys(path, change)
    assert all("_orig_mod." in key for key in torch.load(path, weights_only=True)["state_dict"])
    loaded = qat_tricks.load_from_checkpoint(Lit, path)
    assert differences(loaded.state_dict(), lit.state_dict()) == []
    assert torch.equal(loaded(images(2)), lit.eval()(images(2)))
    # a class that compiles its network gets it without, if it is quantized
    loaded = qat_tricks.load_from_checkpoint(Compiled, path)
    assert torch.equal(loaded(images(2)), lit.eval()(images(2)))
    run = trainer(qat_tricks.recipe("int8_ptq" if kind == "float" else "int8_qat"))
    run.validate(fresh := Lit(seed=5), datamodule=Data(), ckpt_path=path, verbose=False)
    weights = [state["backbone.stem.0.weight"] for state in (fresh.state_dict(), lit.state_dict())]
    assert kind == "float" or torch.equal(*weights)
    assert kind == "quantized" or _same_network(fresh, lit)


def _same_network(ptq, lit):
    """Whether a quantized network came from the float one of ``lit``."""
    with torch.no_grad():
        return (ptq.eval()(images(8)) - lit.eval()(images(8))).abs().max() < 0.1


def test_a_compiled_networks_own_keys_match(tmp_path):
    save_checkpoint(lit := Compiled(seed=3), path := tmp_path / "a.ckpt")
    for kind in (Lit, Compiled):
        loaded = qat_tricks.load_from_checkpoint(kind, path)
        assert torch.equal(loaded(images(2)), lit.eval()(images(2)))
    save_checkpoint(plain := Lit(seed=4), path)
    loaded = qat_tricks.load_from_checkpoint(Compiled, path)
    assert torch.equal(loaded(images(2)), plain.eval()(images(2)))


@pytest.mark.feature("a quantized module in a trainer without callbacks: its own file loads")
def test_a_quantized_module_in_a_plain_trainer(tmp_path):
    lit = quantized(tmp_path / "a.ckpt")
    expected = {key: value.clone() for key, value in lit.state_dict().items()}
    other = quantized(tmp_path / "b.ckpt")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    for change in (str, of_the_network):
        with_keys(tmp_path / "a.ckpt", change)
        trainer().test(other, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        assert differences(other.state_dict(), expected) == []
        assert torch.equal(other.eval()(images(2)), lit.eval()(images(2)))


def test_a_file_of_other_steps_is_refused_in_one_line(tmp_path):
    quantized(tmp_path / "pruned.ckpt", "int8_prune50")
    save_checkpoint(Lit(), tmp_path / "float.ckpt")
    lit = quantized(tmp_path / "a.ckpt")
    before = {key: value.clone() for key, value in lit.state_dict().items()}
    for path, said in (
        (
            "pruned.ckpt",
            r"of other steps than this Lit has been through \(it has besides "
            r"backbone\.\S+weight_mask.*qat_tricks\.load_from_checkpoint\(Lit, path\)",
        ),
        ("float.ckpt", "holds a float network and this Lit is quantized already"),
    ):
        with pytest.raises(QatTricksError, match=said) as error:
            trainer().test(lit, loader(), ckpt_path=tmp_path / path, verbose=False)
        assert "\n" not in str(error.value)
    assert differences(lit.state_dict(), before) == []
