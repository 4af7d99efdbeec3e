"""Sweeps by Hydra's launchers: one job a process, here or on a cluster. Tested where the plugin is
installed.
"""

import os
import subprocess
import sys

import pytest

from qat_tricks.settings.compose import Composer
from tests.helpers import ROOT
from tests.helpers.process import run_forked, train_py

SWEEP = (
    "-m recipe=fp32 seed=0,1 data=fake model=custom model.factory=tests.helpers.nets.SmallNet "
    "logger=none hydra.sweep.dir=sweep baseline.epochs=1 measure.runs=5 measure.threads=1 "
    "measure.min_top1_agreement=0 trainer.accelerator=cpu trainer.enable_progress_bar=false "
    "hydra/launcher=joblib hydra.launcher.n_jobs=2"
)


@pytest.mark.feature("a sweep by hydra-joblib-launcher: jobs side by side, a comparison at the end")
def test_joblib_runs_jobs_side_by_side_and_compares_them(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    # joblib starts its processes from a fresh interpreter, and waits for ever in a forked one
    command = [sys.executable, str(ROOT / "train.py"), *SWEEP.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    settings = {"capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.parent.name for path in tmp_path.glob("sweep/*/report.json")} == {
        "0_fp32",
        "1_fp32",
    }
    assert (tmp_path / "sweep" / "comparison.csv").read_text().count("\n") == 3


@pytest.mark.feature("several processes inside a job of a sweep are refused in one line")
def test_several_processes_inside_a_job_are_refused(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    several = ["trainer=ddp_cpu", "trainer.accelerator=cpu"]
    done = run_forked(train_py, *SWEEP.split(), *several, cwd=tmp_path, output=tmp_path / "output")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "without --multirun" in done.stderr


@pytest.mark.feature("submitit and ray launchers compose (not run: no cluster)")
@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [("submitit", "submitit_slurm"), ("submitit", "submitit_local"), ("ray", "ray")],
    ids=lambda value: value,
)
def test_cluster_launchers_compose(plugin, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    config, problems = Composer("train").compose(
        ["recipe=int8_ptq,int8_qat", f"hydra/launcher={launcher}"], sweep=True
    )
    assert problems == []
    assert config.hydra.launcher["_target_"].startswith(f"hydra_plugins.hydra_{plugin}_launcher")
