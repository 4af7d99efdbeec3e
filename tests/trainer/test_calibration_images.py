"""The images that tricks see: those of the training, as training feeds them to the network."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers
from qat_tricks.recipes.recipe import load_recipe
from tests.helpers.lightning import pl
from tests.helpers.lit import Data, Lit, dataset, trainer

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
# No image is held out: all of them show in the range.
MINMAX = ["stages.ptq.tricks.calibrate.estimator=minmax", "prove=false"]


def pixels(count=64):
    """Raw images of 0 to 255, and their labels."""
    images, labels = dataset(count).tensors
    return ((images - images.min()) / (images.max() - images.min()) * 255).round(), labels


def seen(x):
    """What the network is to see of raw images."""
    return (x.float() - 128) / 30


class Raw(pl.LightningDataModule):
    """Raw images, as ``as_batch`` gives them."""

    def __init__(self, as_batch=lambda x, y: (x, y)):
        super().__init__()
        x, y = pixels()
        self.batches = [as_batch(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    test_dataloader = val_dataloader = train_dataloader


class Bare(Lit):
    """A module whose ``forward`` is the network."""

    def forward(self, x):
        return self.backbone(x)

    def test_step(self, batch, batch_idx):
        pass

    validation_step = test_step


class InStep(Bare):
    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self(seen(x)), y)


class InForward(Bare):
    def forward(self, x):
        return self.backbone(seen(x))


class InHook(Bare):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        # as augmentations on a GPU are written
        return (seen(batch[0]) if self.trainer.training else batch[0], batch[1])


class BeforeTransfer(Bare):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return seen(batch[0]), batch[1]


class WithoutForward(Lit):
    forward = pl.LightningModule.forward

    def training_step(self, batch):
        return F.cross_entropy(self.backbone(seen(batch[0])), batch[1])

    def test_step(self, batch, batch_idx):
        pass

    validation_step = test_step


class Mappings(Bare):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(seen(batch["image"])), batch["label"])


class FromSetup(Bare):
    """Has what its step needs from ``setup``."""

    def setup(self, stage):
        self.mean = 128

    def training_step(self, batch, _):
        return F.cross_entropy(self((batch[0] - self.mean) / 30), batch[1])


class Manual(Bare):
    """Asks for its optimizer and schedule before it calls the network."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] > 0

        def closure():
            loss = F.cross_entropy(self(seen(batch[0])), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        schedule.step()
        self.untoggle_optimizer(optimizer)


class AsksTheTrainer(Bare):
    """Reads the rate from the trainer's optimizers, as for a log."""

    def training_step(self, batch, _):
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        assert rate == self.trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0] > 0
        return F.cross_entropy(self(seen(batch[0])), batch[1])


class Twice(Bare):
    def training_step(self, batch, _):
        return F.cross_entropy(self(seen(batch[0])) + self(1000 * batch[0]), batch[1])


class Guarded(Bare):
    """Tries again whatever has happened."""

    def training_step(self, batch, _):
        try:
            logits = self(seen(batch[0]))
        except BaseException:
            logits = self(1000 * batch[0])
        return F.cross_entropy(logits, batch[1])


class EverySecond(Bare):
    def training_step(self, batch, index):
        return F.cross_entropy(self(seen(batch[0])), batch[1]) if index % 2 else None


def first_range(lit):
    """The range of the quantizer of the network's input."""
    return activation_quantizers(lit.backbone)["activation_quantizers.x"].range


def fitted(lit, data):
    trainer(qat_tricks.recipe("int8_ptq", MINMAX), limit_train_batches=0).fit(lit.train(), data)


def validated(lit, data):
    trainer(qat_tricks.recipe("int8_ptq", MINMAX)).validate(lit, data, verbose=False)


def evaluated(lit, data):
    trainer(qat_tricks.recipe("int8_ptq", MINMAX)).test(lit, data, verbose=False)


def staged(lit, data):
    qat_tricks.run_stages(lit, data, load_recipe("int8_ptq", MINMAX), trainer=QUIET)


RUNS = [fitted, validated, evaluated, staged]


def as_mapping(x, y):
    return {"label": y, "weight": torch.rand(len(x)) * 1e4, "image": x}


def as_bytes(x, y):
    return x.to(torch.uint8), y


@pytest.mark.feature("calibration sees what training_step feeds the network")
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (InStep, Raw()),
        (InForward, Raw()),
        (InHook, Raw()),
        (BeforeTransfer, Raw()),
        (WithoutForward, Raw()),
        (FromSetup, Raw()),
        (Manual, Raw()),
        (AsksTheTrainer, Raw()),
        (Twice, Raw()),
        (Guarded, Raw()),
        (Mappings, Raw(as_mapping)),
        (InStep, Raw(as_bytes)),
        (InForward, Raw(as_bytes)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_calibration_sees_what_training_feeds_the_network(kind, data, run):
    lit = kind()
    run(lit, data)
    x = seen(pixels()[0])
    assert first_range(lit) == pytest.approx((float(x.min()), float(x.max())), rel=0.01)


def test_raw_pixels_and_a_step_that_normalizes_them_keep_the_predictions():
    lit = InStep()
    before = lit.backbone(seen(pixels()[0])).argmax(1)
    staged(lit, Raw())
    assert (lit.backbone.eval()(seen(pixels()[0])).argmax(1) == before).float().mean() > 0.95


def test_steps_that_leave_the_network_out_are_passed_over():
    lit = EverySecond()
    fitted(lit, Raw())
    x = seen(torch.cat([pixels()[0][16:32], pixels()[0][48:]]))
    assert first_range(lit) == pytest.approx((float(x.min()), float(x.max())), rel=0.01)


def test_several_loaders_give_a_batch_of_each():
    class Two(Bare):
        def training_step(self, batch, _):
            x, y = batch["raw"]
            return F.cross_entropy(self(seen(x)), y) + 0 * batch["other"].sum()

    lit = Two()
    loaders = {"raw": Raw().train_dataloader(), "other": DataLoader(torch.ones(64), batch_size=8)}
    run = trainer(qat_tricks.recipe("int8_ptq", MINMAX), limit_train_batches=0)
    run.fit(lit.train(), loaders)
    x = seen(pixels()[0])
    assert first_range(lit) == pytest.approx((float(x.min()), float(x.max())), rel=0.01)


@pytest.mark.parametrize("run", RUNS)
def test_a_module_without_a_step_is_called_itself(run):
    class Only(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = Lit().backbone

        def forward(self, x):
            return self.backbone(seen(x))

        def test_step(self, batch, batch_idx):
            pass

        validation_step = test_step

    if run is fitted:
        pytest.skip("Lightning does not fit such a module")
    lit = Only()
    run(lit, Raw())
    x = seen(pixels()[0])
    assert first_range(lit) == pytest.approx((float(x.min()), float(x.max())), rel=0.01)


def test_a_module_with_neither_has_batches_of_the_networks_inputs():
    class Holder(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = Lit().backbone

    lit = Holder()
    staged(lit, Data())
    assert layers(lit.backbone)["head"].weight_quantizer is not None


class TakesBatch(pl.LightningModule):
    """Unpacks a batch in ``forward``, and has no training step."""

    def __init__(self):
        super().__init__()
        self.backbone = Lit().backbone

    def forward(self, batch):
        x, y = batch
        return F.cross_entropy(self.backbone(seen(x)), y)

    def test_step(self, batch, batch_idx):
        self(batch)

    validation_step = test_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class TakesItByAnotherName(TakesBatch):
    def forward(self, example):
        return super().forward(example)


class TakesMapping(TakesBatch):
    def forward(self, batch):
        return F.cross_entropy(self.backbone(seen(batch["image"])), batch["label"])


class TakesImagesCalledBatch(TakesBatch):
    def forward(self, batch):
        return self.backbone(seen(batch))

    def test_step(self, batch, batch_idx):
        self(batch[0])

    validation_step = test_step


def with_step(kind):
    """The same with a training step, which gives ``forward`` the batch."""
    return type(kind.__name__, (kind,), {"training_step": lambda self, batch, _: self(batch)})


@pytest.mark.feature("forward(batch) of a module")
@pytest.mark.parametrize("run", [fitted, evaluated])
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (TakesBatch, Raw()),
        (with_step(TakesBatch), Raw()),
        (TakesItByAnotherName, Raw()),
        (TakesMapping, Raw(as_mapping)),
        (with_step(TakesMapping), Raw(as_mapping)),
        (TakesImagesCalledBatch, Raw()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_forward_may_take_the_whole_batch(kind, data, run):
    if run is fitted and "training_step" not in vars(kind):
        pytest.skip("Lightning does not fit such a module")
    lit = kind()
    run(lit, data)
    x = seen(pixels()[0])
    assert first_range(lit) == pytest.approx((float(x.min()), float(x.max())), rel=0.01)


class Unpacks(torch.nn.Module):
    """A network that takes a batch itself."""

    def __init__(self):
        super().__init__()
        self.net = Lit().backbone

    def forward(self, batch):
        return self.net(batch[0])


class HoldsUnpacks(Bare):
    def __init__(self):
        super().__init__()
        self.backbone = Unpacks()

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch), batch[1])


class NoCall(Lit):
    def training_step(self, batch, _):
        return sum(p.square().sum() for p in self.parameters())


class InParts(Lit):
    def training_step(self, batch, _):
        x = batch[0]
        for part in self.backbone.stem:
            x = part(x)
        return F.cross_entropy(self.backbone.head(x.mean([2, 3]).repeat(1, 2)), batch[1])


class OnePart(Lit):
    def training_step(self, batch, _):
        try:
            noise = self.backbone.left(batch[0]).mean()
        except Exception:
            noise = 0
        return super().training_step(batch, _) + noise


class Iterates(Lit):
    def training_step(self, dataloader_iter):
        batch, *_ = next(dataloader_iter)
        return super().training_step(batch, 0)


class Failing(Lit):
    def training_step(self, batch, _):
        return self(batch["image"]).sum()


class Unready(Manual):
    def configure_optimizers(self):
        raise KeyError("made by hand")


@pytest.mark.feature("a training_step that tricks cannot follow is refused in one line")
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NoCall, r"NoCall\.training_step does not call its network backbone"),
        (InParts, r'InParts\.training_step calls the part "backbone\.stem\.0" of its network'),
        (OnePart, r'OnePart\.training_step calls the part "backbone\.left" of its network'),
        (Iterates, r"Iterates\.training_step takes dataloader_iter"),
        (Failing, r"Failing\.training_step fails on a training batch .*backbone \(TypeError: "),
        (HoldsUnpacks, r"Unpacks\.forward takes a whole batch, batch: let it take images"),
        (Unready, r"Unready\.training_step asks for its optimizers .* fails \('made by hand'\)"),
    ],
)
def test_a_step_that_tricks_cannot_follow_is_refused(kind, message, run):
    lit = kind()
    with pytest.raises(QatTricksError, match=message) as error:
        run(lit, Data())
    assert "\n" not in str(error.value)
    assert not layers(lit.backbone)  # nothing was changed
    assert not lit.backbone._forward_pre_hooks
    assert "log" not in vars(lit)


class WithCalibration(Data):
    """Images for calibration that are brighter than those for training."""

    def calibration_loader(self, num_images):
        images, labels = dataset().tensors
        return DataLoader(TensorDataset(3 * images, labels), batch_size=16)


@pytest.mark.parametrize("run", RUNS)
def test_calibration_reads_the_loader_made_for_it_else_the_one_for_training(run):
    def range_of_images(data):
        lit = Bare()
        run(lit, data)
        low, high = first_range(lit)
        return high - low

    assert range_of_images(WithCalibration()) == pytest.approx(
        3 * range_of_images(Data()), rel=0.01
    )


class Cached(pl.LightningDataModule):
    """Keeps its loader, which has a generator of its own."""

    def __init__(self, combines=False):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.kept = DataLoader(dataset(), batch_size=16, shuffle=True, generator=generator)
        if combines:
            self.kept = pl.utilities.CombinedLoader([self.kept, self.kept], "min_size")

    def train_dataloader(self):
        return self.kept


class Watch(pl.Callback):
    """Keeps the labels of each step's images."""

    def __init__(self):
        self.labels = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pair = batch[0] if isinstance(batch[0], (list, tuple)) else batch
        self.labels.append(pair[1].tolist())


class FirstOfTwo(Lit):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)


@pytest.mark.parametrize(("kind", "combines"), [(Lit, False), (FirstOfTwo, True)])
def test_a_loader_of_its_own_generator_gives_training_the_same_images(kind, combines):
    found = []
    for recipe in ([], qat_tricks.recipe("int8_qat", report=False)):
        watch = Watch()
        run = trainer([*recipe, watch], max_epochs=2, limit_val_batches=0)
        run.fit(kind().train(), datamodule=Cached(combines))
        found.append(watch.labels)
    assert len(found[0]) == 8
    assert found[0] == found[1]
