"""Two processes that Lightning starts: both train; the first measures, writes and tells."""

import csv
import json
from functools import partial

import pytest

from tests.helpers.process import run_forked, train_py

SETTINGS = (
    "recipe=int8_qat data=fake model=custom model.factory=tests.helpers.nets.SmallNet "
    "trainer=ddp_cpu logger=csv hydra.run.dir=run stage.epochs=1 baseline.epochs=2 measure.runs=5 "
    "measure.threads=1 measure.min_top1_agreement=0.9 trainer.enable_progress_bar=false"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(tmp_path, cache):
    """Runs ``train.py`` in ``tmp_path``; Lightning starts the second process."""
    settings = {"cwd": tmp_path, "output": tmp_path / "output"}
    environment = {"QAT_TRICKS_CACHE": str(cache)}
    return partial(run_forked, train_py, *SETTINGS.split(), environment=environment, **settings)


@pytest.mark.feature("DDP in train.py: both train, the first alone measures, writes and tells")
def test_both_train_and_the_first_alone_measures_and_writes(tmp_path, train):
    done = train()
    assert (done.returncode, done.stderr) == (0, "")
    assert [done.stdout.count(told) for told in ("into run", "ledger", "the run is in run")] == [
        1,
        1,
        1,
    ]
    written = {
        str(path.relative_to(tmp_path / "run"))
        for path in tmp_path.rglob("run/**/*")
        if path.is_file()
    }
    models = {"model.onnx", "model_fp32.onnx", "model.ckpt", "stages/ptq.onnx"}
    texts = {
        "report.json",
        "report.md",
        "report.html",
        "ledger.json",
        "config.yaml",
        "csv/metrics.csv",
        "csv/hparams.yaml",
    }
    assert written == models | texts | {
        f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")
    }
    with (tmp_path / "run" / "csv" / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    steps = [int(row["step"]) for row in rows if row["val/loss"]]
    assert steps == [3, 7, 3]  # of 256 images: 32 for each process and step
    assert [row["step"] for row in rows if row["layer/x/clip_rate"]] == ["0"]


@pytest.mark.feature("DDP: both processes remove the same channels")
def test_both_remove_the_same_channels(tmp_path, train):
    done = train("recipe=int8_channels50", "recipe.prove=false")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    before, after = report["channels"]["macs"]
    assert after <= 0.5 * before
    assert report["parity"]["max_abs_error"] == 0


def test_a_failure_of_the_first_ends_the_other_in_silence(tmp_path, train):
    (tmp_path / "run" / "model_fp32.onnx").mkdir(parents=True)  # in the way of the file
    done = train()
    assert done.returncode == 2
    assert done.stderr.startswith('error: "')
    assert "model_fp32.onnx" in done.stderr
    assert done.stderr.count("\n") == 1
