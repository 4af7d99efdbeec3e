import json
import logging
import os
import subprocess
import sys

import pytest

import qat_tricks.jobs.train
from qat_tricks.cli import main as cli
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.report import write_report
from qat_tricks.files import LOCK, reserved
from tests.helpers import ROOT
from tests.helpers.samples import report


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Stands in for ``run_job``; holds the configs that it was given."""
    configs = []

    def run_job(config, folder, logger):
        configs.append(config)
        write_report(folder, report(config.recipe.name))

    monkeypatch.setattr(qat_tricks.jobs.train, "run_job", run_job)
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield configs
    root.handlers[:] = handlers  # --info adds one, to this test's stdout
    root.setLevel(level)


def status(run, *arguments):
    try:
        run(list(arguments))
    except SystemExit as error:
        return error.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("recipe=int8_prun50", 'unknown recipe "int8_prun50": did you mean "int8_prune50"'),
        ("model=mobilnet_v2", 'unknown model "mobilnet_v2": did you mean "mobilenet_v2"'),
        ("data=digit", 'unknown data "digit": did you mean "digits"?'),
        ("trainer=gpus", 'unknown trainer "gpus": did you mean "gpu"?'),
        ("logger=wndb", 'unknown logger "wndb": did you mean "wandb"?'),
        ("modle=resnet20", 'the config has no setting "modle": did you mean "model"?'),
        ("estimator=kl", "did you mean recipe.stages.ptq.tricks.calibrate.estimator?"),
        (
            "recipe.stages.ptq.tricks.calibrat.estimator=kl",
            'has no setting "calibrat": did you mean "calibrate"?',
        ),
        ("recipe.name.x=1", "recipe.name is a value"),
        ("trainer.fast_dev_run=true", "+trainer.fast_dev_run="),
        (
            "trainer=ddp_cpu trainer.strategy=ddp_spawn",
            "trainer.strategy=ddp_spawn trains in processes",
        ),
        ("~recipe.stages.ptq.tricks.equalise", 'did you mean "equalize"'),
        ("+trick@recipe.stages.ptq.tricks=prun", 'unknown trick "prun": did you mean "prune"?'),
        (
            "+trick@recipe.stages.prune_qat.tricks=freeze_batchnorm "
            "+trick@recipe.stages.prune_qat.tricks=dampen_oscillations",
            "give all in one list, +trick@recipe.stages.prune_qat.tricks=[OTHER,",
        ),
        ("recipe.stages.ptq.tricks.quantize.weight_bits=9", "bits=9"),
        ("recipe.stages.prune_qat.tricks.prune.sparsity=1", "sparsity=1 "),
        ("~recipe.stages.ptq.tricks.quantize", "an order that works: "),
        ("recipe==", '"recipe==" cannot be read'),
        ("data.root=a/lr=0.1", """such as 'data.root="a/lr=0.1"'"""),
        ("seed", '"seed" cannot be read'),
        ("seed=[1", "cannot be read"),
        ("recipe=int8_ptq,int8_qat", "add --multirun"),
        ("+recipe=int8_qat", "leave out the +"),
        ("data=3", "chooses nothing"),
        ("hydra.run.dirr=x", 'hydra.run has no setting "dirr": did you mean "dir"?'),
        ("hydra.run.dir=file/run", "cannot be written"),
        ("--multirn recipe=fp32", "--multirn"),
        ("--config-dir none", "--config-dir none is not a folder"),
        ("--config-path x", "--config-dir"),
        ("-m --cfg job", "exclude each other"),
        (
            "target=tensorrt recipe.stages.ptq.tricks.quantize.activations=unsigned_affine",
            "quantize.activations=unsigned_affine is not for this target",
        ),
        ("target=tensorrt export.opset=25", "export.opset=25 is too new for target=tensorrt"),
        ("target=onnxruntime", 'unknown target "onnxruntime": did you mean "onnxruntime_cpu"'),
        ("export.normalize=3", "export.normalize=3 is not allowed: give true or false"),
        ("--resolve", "--resolve belongs to --cfg"),
        (
            "recipe.stages.ptq.tricks=[calibrate,quantize]",
            "gives a list, and recipe.stages.ptq.tricks holds settings by name (fold_batchnorm, ",
        ),
        ("budget=0.5", "budget belongs to recipe=guideline: give that, or leave budget out"),
        ("recipe=int8_ptq ~recipe.stages.ptq", "recipe int8_ptq has no stage"),
        ("recipe=guideline ~recipe.stages model.weights=no.pt", "model.weights=no.pt is not a"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_run_or_written(tmp_path, ran, capfd, arguments, told):
    (tmp_path / "file").touch()
    assert status(cli.train, *arguments.split()) == 2
    printed = capfd.readouterr()
    assert told in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert ran == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_everything_wrong_is_told_at_once(ran, capsys):
    assert (
        status(cli.train, "modle=x", "data.shft=1", "seed=x", "recipe==", "+foo=1", "trainer=gpux")
        == 2
    )
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for part in ('"modle"', '"shft"', "seed='x'", '"recipe=="', '"foo"', '"gpux"'):
        assert part in told


def test_a_lost_choice_is_not_blamed_on_what_is_set_inside_it(ran, capsys):
    assert status(cli.train, "recipe=int8_qet", "recipe.stages.qat.epochs=1") == 2
    assert "stages" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "artifact is missing: give artifact=PATH"),
        ("artifct=x", 'did you mean "artifact"?'),
        ("artifact=x data=digit", 'did you mean "digits"?'),
        ("artifact=x measure.runs=0", "runs=0"),
        ("artifact=file folder=file/x", "cannot be written"),
        ("artifact=none.onnx", "artifact=none.onnx is not a file"),
        ("artifact=lr=0.1/x.onnx", """such as 'artifact="lr=0.1/x.onnx"'\n"""),
        ('artifact="lr=0.1/x.onnx"', "artifact=lr=0.1/x.onnx is not a file"),
        ("-m artifact=x,y", "one artifact at a time"),
        ("artifact=x runtimes=[onnxrt]", 'unknown runtime "onnxrt": did you mean "onnxruntime"?'),
        ("artifact=x runtimes=onnxruntime", "give a list such as [onnxruntime,openvino]"),
        (
            "artifact=x measure.batch_sizes=[]",
            "batch_sizes=[] is not allowed: give a list of whole numbers",
        ),
        ("artifact=x measure.thread_counts=[0]", "thread_counts=[0] is not allowed"),
        (
            "artifact=x measure.batch_sizes=8",
            "measure.batch_sizes=8 is not allowed: give a list of a whole number",
        ),
        ("artifact=x allow_preprocessing_change=maybe", "give true or false"),
    ],
)
def test_bad_input_of_evaluate_is_one_line(tmp_path, monkeypatch, capfd, arguments, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert status(cli.evaluate, *arguments.split()) == 2
    printed = capfd.readouterr()
    assert told in printed.err
    assert printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_everything_wrong_with_an_evaluation_is_told_at_once(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments = (
        "artifact=a.onnx float=b.onnx measure.threads=100000000000 measure.batch_sizes=[] "
        "measure.runs=x folder=/dev/null/x"
    )
    assert status(cli.evaluate, *arguments.split()) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    for part in (
        "artifact=a.onnx is not a file",
        "float=b.onnx is not a file",
        "threads=100000000000 is not allowed: give 1 to 1024",
        "batch_sizes=[] is not allowed",
        "measure.runs='x'",
        "cannot be written",
    ):
        assert part in told


def test_a_run_says_what_and_where_and_keeps_its_config(tmp_path, ran, capsys):
    arguments = [
        "recipe=int8_ptq",
        "hydra.run.dir=run",
        "logger=csv",
        "model=mobilenet_v2",
        "--config-dir",
        ".",
    ]
    assert status(cli.train, *arguments) == 0
    assert [(config.recipe.name, config.model.name) for config in ran] == [
        ("int8_ptq", "mobilenet_v2")
    ]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "int8_ptq: mobilenet_v2 on digits, into run",
        "the run is in run: open run/report.html, deploy run/model.onnx",
    ]
    assert printed.err == ""
    assert "mobilenet_v2" in (tmp_path / "run" / ".hydra" / "config.yaml").read_text()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["recipe"] == "int8_ptq"


@pytest.mark.parametrize(("set_before", "expected"), [(None, "1"), ("0", "0")])
def test_memory_comes_in_large_pages_unless_the_user_has_decided(
    ran, monkeypatch, set_before, expected
):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")  # so that the test's own change is undone
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    if set_before is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", set_before)
    assert status(cli.train, "recipe=int8_ptq", "hydra.run.dir=run", "logger=none") == 0
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected


def test_a_recipe_of_ones_own_is_found_and_checked(tmp_path, ran, capsys):
    mine = tmp_path / "mine" / "recipe"
    mine.mkdir(parents=True)
    text = (
        "defaults: [int8_ptq, _self_]\n"
        "name: kl\n"
        "stages: {ptq: {tricks: {calibrate: {estimator: kl}}}}\n"
    )
    (mine / "kl.yaml").write_text(text)
    (mine / "misspelt.yaml").write_text(text.replace("estimator", "estimater"))
    (mine / "orphan.yaml").write_text(text.replace("int8_ptq", "int8_pqt"))
    (mine / "broken.yaml").write_text("a: [")
    own = ["--config-dir", "mine", "logger=none"]
    assert status(cli.train, *own, "recipe=kl") == 0
    assert ran[0].recipe.stages.ptq.tricks.calibrate.estimator == "kl"
    for name, told in (
        ("misspelt", 'calibrate has no setting "estimater": did you mean "estimator"?'),
        ("orphan", 'in recipe/orphan: unknown recipe "int8_pqt": did you mean'),
        ("broken", "broken"),
    ):
        capsys.readouterr()
        assert status(cli.train, *own, f"recipe={name}") == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "recipe: fp32"),
        (["--cfg", "job", "recipe=int8_ptq"], "name: int8_ptq"),
        (["--cfg", "job", "--package", "data"], "name: digits"),
        (["--info", "defaults"], "recipe/int8_prune50"),
        (["--hydra-help"], "hydra"),
    ],
)
def test_hydras_own_flags_work(ran, capsys, arguments, shown):
    assert status(cli.train, *arguments) == 0
    assert shown in capsys.readouterr().out
    assert ran == []


@pytest.mark.parametrize(
    ("failure", "expected", "told"),
    [
        (QatTricksError("the loader\nis empty"), 2, "error: the loader is empty\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(7), 7, ""),
    ],
)
def test_what_ends_a_job_decides_the_exit_status(ran, monkeypatch, capsys, failure, expected, told):
    def run_job(config, folder, logger):
        raise failure

    monkeypatch.setattr(qat_tricks.jobs.train, "run_job", run_job)
    assert status(cli.train, "logger=none") == expected
    assert capsys.readouterr().err == told


def test_lightnings_own_exit_when_interrupted_is_an_interrupt(ran, monkeypatch, capsys):
    def run_job(config, folder, logger):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(qat_tricks.jobs.train, "run_job", run_job)
    assert status(cli.train, "logger=none") == 130


def test_a_bug_keeps_its_traceback(ran, monkeypatch, capsys):
    def run_job(config, folder, logger):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(qat_tricks.jobs.train, "run_job", run_job)
    assert status(cli.train, "logger=none") == 1
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "ZeroDivisionError: a bug" in told


def test_a_folder_in_use_is_refused_before_anything_is_written(ran, tmp_path, capfd):
    folder = tmp_path / "run"
    with reserved(folder):
        assert status(cli.train, "recipe=int8_ptq", f"hydra.run.dir={folder}") == 2
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert "another run that is still going writes into" in capfd.readouterr().err
    assert not ran


def test_a_job_whose_folder_is_in_use_leaves_it_as_it_is(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sweep" / "0_int8_ptq"
    with reserved(folder):
        status(cli.train, "-m", "recipe=int8_ptq", "data=fake", "hydra.sweep.dir=sweep")
        assert not (folder / "error.json").exists()
    told = "job 0_int8_ptq: another run that is still going writes into"
    assert told in capfd.readouterr().err


def test_the_script_works_from_any_folder(tmp_path):
    # A misspelt recipe alone is told before torch is loaded; beside other errors, with them.
    alone, with_others = ["recipe=int8_prun50"], ["recipe=int8_prun50", "seed=-1"]
    loading = "train.py: loading PyTorch and Lightning\n"
    for arguments, said in ((alone, ""), (with_others, loading)):
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert 'did you mean "int8_prune50"' in done.stderr
        assert done.stderr.count("\n") == 1
        assert ("seed=-1" in done.stderr) == bool(said)
        assert done.stdout == said
    assert not list(tmp_path.iterdir())


def test_the_first_line_comes_before_the_imports_that_take_long(tmp_path):
    # A module of this name in the way ends the program where it would load PyTorch.
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for arguments, told in (([], "evaluate.py: loading PyTorch\n"), (["--cfg", "job"], "")):
        done = subprocess.run(
            [sys.executable, str(ROOT / "evaluate.py"), *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stdout) == (7, told)
