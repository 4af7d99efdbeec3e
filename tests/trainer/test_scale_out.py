"""Several processes end as one would; what shards parameters is refused."""

import copy
from functools import partial

import pytest
import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.fold import fold_batchnorm
from tests.helpers.ddp_fit import fit
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, differences, trainer
from tests.helpers.nets import images, small_net
from tests.helpers.process import Forked


def two_processes(folder, recipe, steps, **flags):
    """Fits on two processes, started as a cluster starts them, and returns how each ended.

    They leave their ends in ``folder``.
    """
    folder.mkdir()
    meeting = {
        "NODE_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
    }
    ranks = [
        Forked(
            partial(fit, **flags),
            *(folder, recipe, 2, steps),
            output=folder.with_name(f"rank{rank}"),
            environment={**meeting, "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    return [rank.wait() for rank in ranks]


@pytest.mark.feature("DDP: both ranks end alike, and as one process with the same global batch")
def test_two_processes_end_as_one(tmp_path):
    recipe, folder = "int8_prune50", tmp_path / "ends"
    # A BatchNorm sees the batch of its own process, and on a CPU PyTorch cannot synchronize it.
    prune = "stages.prune_qat.tricks.prune"
    folded = [
        "~stages.prune_qat.tricks.restore_batchnorm",
        # Measured choices are those of the first process.
        *(f"{prune}.{choice}" for choice in ("criterion=obs", "scope=sensitivity")),
        f"{prune}.num_images=16",
    ]
    processes = two_processes(folder, recipe, 8, overrides=folded)
    for done in processes:
        assert done.returncode == 0, done.stderr
    # Both validate before the training, and the first alone tells.
    assert ["val_acc" in done.stdout for done in processes] == [True, False]
    first, second = (torch.load(folder / f"rank{rank}of2.pt") for rank in (0, 1))
    assert differences(first["state"], second["state"]) == []
    assert first["spec"] == second["spec"]
    single = fit(folder, recipe, 1, 8, overrides=folded)
    assert first["spec"] == single["spec"]
    assert differences(first["start"], single["start"]) == []
    for name, end in single["state"].items():
        # what training has moved, scales among it
        way = (end.float() - single["start"][name].float()).norm()
        assert (first["state"][name].float() - end.float()).norm() <= 1e-3 * way, name


@pytest.mark.feature("DDP: calibration reads the images once, on the first rank, in whatever order")
def test_calibration_reads_once(tmp_path):
    folder = tmp_path / "ends"
    for done in two_processes(folder, "w4a8_qat", 1, shuffle=True, sync=False):
        assert done.returncode == 0, done.stderr
    first, second = (torch.load(folder / f"rank{rank}of2.pt") for rank in (0, 1))
    assert first["read_before"] >= 48
    assert second["read_before"] == 0
    assert differences(first["state"], second["state"]) == []


@pytest.mark.feature("DDP: a calibration that fails ends all ranks")
def test_a_calibration_that_fails_ends_both(tmp_path):
    folder = tmp_path / "ends"
    for done in two_processes(folder, "int8_qat", 1, fails=True):
        assert done.returncode != 0
        assert "the disk is gone" in done.stderr
    assert not list(folder.iterdir())


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
        converted = pl.plugins.layer_sync.TorchSyncBatchNorm().apply(lit)
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 4
        assert torch.equal(converted.backbone(x), expected)
        reverted = (
            pl.plugins.layer_sync.TorchSyncBatchNorm().revert(converted).eval()
        )  # as after a fit
        assert torch.equal(reverted.backbone(x), expected)
    assert len(fold_batchnorm(reverted.backbone)) == 4


@pytest.mark.feature("FSDP and other sharding: refused in one line")
@pytest.mark.parametrize(
    "strategy", [pl.strategies.FSDPStrategy, pl.strategies.ModelParallelStrategy]
)
def test_sharding_is_refused(strategy):
    run = trainer(qat_tricks.recipe("int8_qat"))
    # on CPU Lightning itself refuses them as arguments
    run._accelerator_connector.strategy = strategy()
    with pytest.raises(QatTricksError, match=f"{strategy.__name__} shards parameters.*ddp"):
        run.callbacks[0].setup(run, Lit(), "fit")
