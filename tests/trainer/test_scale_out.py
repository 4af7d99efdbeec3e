"""Several processes end as one would; what shards parameters is refused."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.fold import fold_batchnorm
from tests.helpers import ROOT
from tests.helpers.ddp_fit import fit
from tests.helpers.lit import Data, Lit, differences, trainer
from tests.helpers.nets import images, small_net


def two_processes(folder, recipe, steps, *flags):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "tests/helpers/ddp_fit.py"),
        str(folder),
        recipe,
        "2",
        str(steps),
        *flags,
    ]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.feature("DDP: both ranks end alike, and as one process with the same global batch")
def test_two_processes_end_as_one(tmp_path):
    recipe = "int8_prune50"
    done = two_processes(tmp_path, recipe, 8)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}of2.pt") for rank in (0, 1))
    assert differences(first["state"], second["state"]) == []
    assert first["spec"] == second["spec"]
    single = fit(tmp_path, recipe, 1, 8)
    assert first["spec"] == single["spec"]
    assert differences(first["start"], single["start"]) == []
    for name, end in single["state"].items():
        # what training has moved, scales among it
        way = (end.float() - single["start"][name].float()).norm()
        assert (first["state"][name].float() - end.float()).norm() <= 1e-3 * way, name


@pytest.mark.feature("DDP: calibration reads the images once, on the first rank, in whatever order")
def test_calibration_reads_once(tmp_path):
    done = two_processes(tmp_path, "w4a8_qat", 1, "shuffle")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}of2.pt") for rank in (0, 1))
    assert first["read_before"] >= 48
    assert second["read_before"] == 0
    assert differences(first["state"], second["state"]) == []


@pytest.mark.feature("DDP: a calibration that fails ends all ranks")
def test_a_calibration_that_fails_ends_both(tmp_path):
    done = two_processes(tmp_path, "int8_qat", 1, "fail")
    assert done.returncode != 0
    assert "the disk is gone" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.feature("SyncBatchNorm: folded, and converted where it is not folded")
def test_synchronized_batchnorms_fold_and_convert():
    x = images(8)
    net = small_net(num_classes=4)
    expected = net(x)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    traced = trace(synchronized)
    assert len(fold_batchnorm(traced)) == 4
    assert torch.allclose(traced(x), expected, atol=1e-5)
    overrides = [
        "~stages.ptq.tricks.fold_batchnorm",
        "~stages.ptq.tricks.equalize",
        "~stages.ptq.tricks.correct_bias",
    ]
    lit = Lit()
    trainer(qat_tricks.recipe("int8_qat", overrides)).test(lit, Data(), verbose=False)
    assert len(fold_batchnorm(copy.deepcopy(lit.backbone))) == 4
    with torch.no_grad():
        expected = lit.eval().backbone(x)
        converted = TorchSyncBatchNorm().apply(lit)
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 4
        assert torch.equal(converted.backbone(x), expected)
        reverted = TorchSyncBatchNorm().revert(converted).eval()  # as after a fit
        assert torch.equal(reverted.backbone(x), expected)
    assert len(fold_batchnorm(reverted.backbone)) == 4


@pytest.mark.feature("FSDP and other sharding: refused in one line")
@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_sharding_is_refused(strategy):
    run = trainer(qat_tricks.recipe("int8_qat"))
    # on CPU Lightning itself refuses them as arguments
    run._accelerator_connector.strategy = strategy()
    with pytest.raises(QatTricksError, match=f"{strategy.__name__} shards parameters.*ddp"):
        run.callbacks[0].setup(run, Lit(), "fit")
