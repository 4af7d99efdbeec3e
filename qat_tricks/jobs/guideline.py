"""The guideline as a program: tries steps from the cheapest up, until one is within a budget.

Hu, Zeng, Wu 2023 (arXiv 2303.07080) give an order of tricks by hand; here validation images decide.
Test images are never read. Each step is a recipe of its own, so that the one that is kept can be
run again without the guideline.
"""

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from qat_tricks.errors import QatTricksError, one_line
from qat_tricks.evidence.language import ENGLISH
from qat_tricks.evidence.paired import show_change
from qat_tricks.evidence.show import show
from qat_tricks.files import UnwritableError, read_json, reserved, write_json
from qat_tricks.graph.random_state import kept_random_state, seed_all
from qat_tricks.jobs.guideline_data import train_batches, validation_batches
from qat_tricks.jobs.guideline_forecast import IMAGES, Forecaster, Scale, Work, scaled
from qat_tricks.jobs.guideline_judge import Judge, Judgement
from qat_tricks.jobs.guideline_result import FAILED, OVER, WITHIN, Guideline, Outcome
from qat_tricks.jobs.processes import other_processes
from qat_tricks.jobs.sensitive_layers import parts_of, sensitive_layers, without_rounding
from qat_tricks.progress import console, enter, live
from qat_tricks.recipes.guideline_steps import (
    GuidelineSettings,
    Step,
    pruning_steps,
    quality_steps,
    sparing,
)
from qat_tricks.recipes.recipe import StagedRecipe, load_recipe
from qat_tricks.recipes.run_key import plain_settings, run_key, training_fingerprint
from qat_tricks.recipes.stages import check_arguments, run_stages
from qat_tricks.settings.binding import make
from qat_tricks.trainer.checkpoints import load_into, save_checkpoint
from qat_tricks.trainer.framework import PACKAGES
from qat_tricks.trainer.module import has_workbench
from qat_tricks.trainer.reading import DamagedError

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule

FEW = 512  # validation images of the first look
SAME_CONFIDENCE = 0.01  # by which a network's own differ at most from one run to another
QUIET = {
    "logger": False,
    "callbacks": [],
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def guideline(
    module: "LightningModule",
    datamodule: "LightningDataModule | Iterable[Any]",
    *,
    budget: float = 0.5,
    weight_bits: int = 8,
    activation_bits: int = 8,
    sparsity: float | None = None,
    latency: float | None = None,
    val_dataloaders: Any = None,
    trainer: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    prepare: Callable[[StagedRecipe], StagedRecipe] | None = None,
) -> Guideline:
    """Finds the cheapest step that loses no more than ``budget``, then prunes if asked to.

    Args:
        module: a trained LightningModule; it stays as it is, steps run on copies.
        datamodule: training images, and validation images with labels, which decide; or a loader
            of training images, beside ``val_dataloaders``.
        budget: points of accuracy that may be lost.
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
        sparsity: share of zeros to prune to, in steps; the last one within the budget is kept.
        latency: share of the int8 file's latency to remove channels to, likewise.
        val_dataloaders: a loader of validation images, where ``datamodule`` is a loader.
        trainer: arguments of ``Trainer``, as of ``run_stages``; of one process.
        folder: keeps what is done, and an interrupted run with the same arguments goes on there.
        seed: of each step.
        prepare: changes each step's recipe before it runs, such as for a target.

    Raises:
        InUseError: another run has the folder.
        QatTricksError: a setting that is not allowed, no validation images, or no step works.
    """
    aims = {
        "budget": budget,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "sparsity": sparsity,
        "latency": latency,
    }
    settings = make("guideline", GuidelineSettings, aims)
    _check_begin(module, trainer or {})
    run = _Run(
        module=module,
        settings=settings,
        data=datamodule,
        val=val_dataloaders,
        trainer=dict(trainer or {}),
        folder=None if folder is None else Path(folder),
        seed=seed,
        prepare=prepare,
    )
    alone = nullcontext() if run.folder is None else reserved(run.folder)
    with kept_random_state(), live(), alone:
        return run.run()


def _check_begin(module: "LightningModule", trainer: Any) -> None:
    check_arguments(trainer)
    if has_workbench(module):
        raise QatTricksError(
            f"{type(module).__name__} is quantized already: the guideline begins with the float "
            "module"
        )
    if started := other_processes(trainer):
        raise QatTricksError(
            f"the guideline with {started}: it judges and decides in one process; give devices=1 "
            "and no strategy, or train the recipe that it names"
        )


class _Run:
    """One run of the guideline."""

    def __init__(
        self,
        *,
        module: "LightningModule",
        settings: GuidelineSettings,
        data: Any,
        val: Any,
        trainer: dict[str, Any],
        folder: Path | None,
        seed: int,
        prepare: Callable[[StagedRecipe], StagedRecipe] | None,
    ) -> None:
        self.module, self.settings, self.data, self.val = module, settings, data, val
        self.trainer, self.folder, self.seed = trainer, folder, seed
        self.quality, self.pruning = quality_steps(settings), pruning_steps(settings)
        self.prepare = prepare or (lambda recipe: recipe)
        self.started = time.perf_counter()
        self.best: tuple[Outcome, Any] | None = None  # the step to keep, and its module
        self.last: Any = None  # the module of the newest step
        self.state = self._read_state()

    def run(self) -> Guideline:
        """Tries the steps."""
        seed_all(self.seed)
        enter("guideline, float network")
        self.judge = Judge(
            self.module,
            validation_batches(
                self.module, self.data, self.val, {**self.trainer, **QUIET}, self.seed
            ),
            FEW,
            self.data if self.val is None else None,
        )
        if not self._knows_images():
            raise self._other_run()
        self._say_plan()
        self._look()
        foretold = self._foretell([*self.quality, *self.pruning])
        outcomes: list[Outcome] = []
        for step in self.quality:
            outcomes.append(self._try(step, foretold[step.name]))
            if outcomes[-1].within:
                break
        if self.best is None:
            reasons = "; ".join(map(str, outcomes))
            raise QatTricksError(f"no step of the guideline works on this network: {reasons}")
        for step in self.pruning if self.best[0].within else []:
            outcomes.append(self._try(step, foretold[step.name], prunes=True))
            if not outcomes[-1].within:
                break
        return self._result(outcomes)

    def _knows_images(self) -> bool:
        """Whether the state is of these images and this network, by what it makes of a few."""
        few = self.judge.reference_of_few
        seen = {key: getattr(few, key).tolist() for key in ("labels", "predictions", "confidences")}
        data = self.data
        loader = data.train_dataloader() if hasattr(data, "train_dataloader") else data
        seen["training"] = training_fingerprint(loader, self.seed)
        known = self.state.setdefault("seen", seen)
        if any(known.get(key) != seen[key] for key in ("labels", "predictions", "training")):
            return False
        # On other numbers of threads sums differ in their last bits.
        differences = torch.tensor(known["confidences"]) - few.confidences
        return bool(differences.abs().max() < SAME_CONFIDENCE)

    def _try(self, step: Step, foretold: float | None, *, prunes: bool = False) -> Outcome:
        """Runs a step, judges it, and keeps it if it is the best so far."""
        enter(f"guideline, {step.name}")
        done = self.state["outcomes"].get(step.name)
        if done is not None:
            outcome = Outcome(**done)
            self.last = self._restored(outcome)
        else:
            started = time.perf_counter()
            judgement, step, reason = self._judged(step)
            lost = None if judgement is None else -judgement.change["points"]
            over = lost is not None and lost > self.settings.budget
            outcome = Outcome(
                name=step.name,
                does=step.does,
                recipe=step.recipe,
                overrides=list(step.overrides),
                command=step.command,
                foretold_seconds=foretold,
                seconds=time.perf_counter() - started,
                decision=FAILED if judgement is None else OVER if over else WITHIN,
                reason=reason,
                judgement=None if judgement is None else asdict(judgement),
            )
            self._keep_state(outcome)
        if outcome.judgement is not None and self._is_better(outcome, prunes):
            self.best = (outcome, self.last)
        console().print(f"  {outcome}", highlight=False, soft_wrap=True)
        return outcome

    def _judged(self, step: Step) -> tuple[Judgement | None, Step, str]:
        """Runs a step; returns its judgement, the step as it was run, or why it does not work."""
        try:
            if step.spares_sensitive:
                step = sparing(
                    step, sensitive_layers(self._plain(step), self.judge.few, self.judge.data)
                )
            self.last = self._run_step(step)
        except (DamagedError, UnwritableError):  # they say nothing of the step
            raise
        except QatTricksError as error:
            return None, step, one_line(error)
        return self.judge.judge(self.last), step, ""

    def _plain(self, step: Step) -> Any:
        """The module with ranges alone: where its layers' rounding has not been made good."""
        recipe = scaled(self._load(step), Scale(images=IMAGES[1]))
        with _silence():
            return self._on_copy(without_rounding(recipe), {**self.trainer, **QUIET})

    def _is_better(self, outcome: Outcome, prunes: bool) -> bool:
        """Whether a step takes the place of the one that is kept so far."""
        if self.best is None or outcome.within:
            return True
        if prunes:
            return False
        kept = self.best[0].judgement
        assert kept is not None
        assert outcome.judgement is not None
        return outcome.judgement["change"]["points"] > kept["change"]["points"]

    def _run_step(self, step: Step) -> Any:
        """A copy of the module after a step."""
        checkpoints = None if self.folder is None else self.folder / step.name
        return self._on_copy(self._load(step), self.trainer, checkpoints)

    def _on_copy(
        self, recipe: StagedRecipe, trainer: Mapping[str, Any], checkpoints: Path | None = None
    ) -> Any:
        module = copy.deepcopy(self.module)
        seed_all(self.seed)
        # A callback may count, as early stopping does: each step has its own.
        callbacks = copy.deepcopy(trainer.get("callbacks"))
        run_stages(
            module,
            self.data,
            recipe,
            val_dataloaders=self.val,
            trainer={**trainer, "callbacks": callbacks},
            checkpoints=checkpoints,
        )
        return module.cpu().eval()

    def _load(self, step: Step) -> StagedRecipe:
        return self.prepare(load_recipe(step.recipe, step.overrides))

    # Before the steps

    def _say_plan(self) -> None:
        console().print(
            f"guideline: at most {self.settings.budget:g} points on {self.judge.images} validation "
            f"images, with {self.settings.weight_bits}-bit weights and "
            f"{self.settings.activation_bits}-bit activations; until one is within: "
            f"{', '.join(step.name for step in self.quality)}"
            + (f"; then {', '.join(step.name for step in self.pruning)}" if self.pruning else ""),
            highlight=False,
        )

    def _look(self) -> None:
        """A first look: 8 bits without training, with few images."""
        enter("guideline, first look")
        if "potential" not in self.state:
            recipe = scaled(self.prepare(load_recipe("int8_ptq")), Scale(images=IMAGES[1]))
            with _silence():
                module = self._on_copy(recipe, {**self.trainer, **QUIET})
            judgement = self.judge.judge_on_few(module)
            self.state["potential"] = asdict(judgement)
            self.state["pass_seconds"] = self.judge.pass_seconds(module)
        potential = self.state["potential"]
        change = show_change(potential["change"], ENGLISH)
        console().print(
            f"  at first sight, 8 bits without training: {change} on {potential['images']} of them",
            highlight=False,
        )

    def _foretell(self, steps: Sequence[Step]) -> dict[str, float | None]:
        """Foretells each step, and shows the plan."""
        enter("guideline, rehearsals")
        if "foretold" not in self.state:
            pass_seconds = self.state["pass_seconds"]
            work = Work(
                batches=train_batches(self.data, self.trainer),
                pass_seconds=pass_seconds,
                sensitivity_seconds=pass_seconds * parts_of(self.module) / self.judge.images,
            )
            forecaster = Forecaster(self._rehearse, self._load, work)
            self.state["foretold"] = {step.name: _foretold(forecaster, step) for step in steps}
            self._write_state()
        foretold: dict[str, float | None] = self.state["foretold"]
        table = Table(box=None, pad_edge=False)
        for column in ("step", "what it does", "foretold"):
            table.add_column(column, justify="right" if column == "foretold" else "left")
        for step in steps:
            seconds = foretold[step.name]
            table.add_row(step.name, step.does, show(seconds, "seconds", none="?"))
        console().print(table)
        total = sum(seconds or 0 for seconds in foretold.values())
        console().print(f"all of them would take {show(total, 'seconds')}", highlight=False)
        return foretold

    def _rehearse(self, recipe: StagedRecipe, scale: Scale) -> float:
        settings = {**self.trainer, **QUIET, "limit_val_batches": 0}
        if scale.batches is not None:
            settings["limit_train_batches"] = scale.batches
        with _silence():
            started = time.perf_counter()
            self._on_copy(scaled(copy.deepcopy(recipe), scale), settings)
            return time.perf_counter() - started

    # What is kept

    def _result(self, outcomes: Sequence[Outcome]) -> Guideline:
        assert self.best is not None
        tried = [outcome.foretold_seconds for outcome in outcomes]
        result = Guideline(
            module=self.best[1],
            settings=self.settings,
            kept=self.best[0],
            outcomes=outcomes,
            potential=self.state["potential"],
            images=self.judge.images,
            foretold_seconds=None if None in tried else sum(tried),  # type: ignore[arg-type]
            seconds=self.state["seconds"] + time.perf_counter() - self.started,
        )
        console().print(str(result), highlight=False, soft_wrap=True)
        return result

    def _key(self) -> str:
        """A hash of what the outcomes depend on, as far as it is known."""
        recipes = [self._load(step) for step in [*self.quality, *self.pruning]]
        return run_key(
            self.module,
            recipes,
            asdict(self.settings),
            self.seed,
            plain_settings(self.trainer),
        )

    def _read_state(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"seconds": 0.0, "outcomes": {}}
        if self.folder is None:
            return fresh
        key = self._key()
        if not self._state_path().is_file():
            return {"key": key, **fresh}
        state = read_json(self._state_path())
        if not isinstance(state, dict) or state.get("key") != key:
            raise self._other_run()
        try:
            assert {"seconds", "outcomes", "seen"} <= state.keys()
            for done in state["outcomes"].values():
                Outcome(**done)
        except (AssertionError, AttributeError, TypeError) as error:  # of another version, say
            raise self._other_run() from error
        return state

    def _other_run(self) -> QatTricksError:
        return QatTricksError(
            f"{self.folder} holds a guideline of another network, other images, other settings or "
            "another version: give another folder, or delete that one"
        )

    def _state_path(self) -> Path:
        assert self.folder is not None
        return self.folder / "guideline.json"

    def _write_state(self) -> None:
        if self.folder is not None:
            spent = self.state["seconds"] + time.perf_counter() - self.started
            write_json(self._state_path(), {**self.state, "seconds": spent})

    def _keep_state(self, outcome: Outcome) -> None:
        """Notes a step that is done, with its network, so that it need not be done again."""
        self.state["outcomes"][outcome.name] = asdict(outcome)
        if self.folder is not None and outcome.judgement is not None:
            save_checkpoint(self.last, self._module_path(outcome))
        self._write_state()

    def _module_path(self, outcome: Outcome) -> Path:
        assert self.folder is not None
        return self.folder / f"{outcome.name}.ckpt"

    def _restored(self, outcome: Outcome) -> Any:
        """The module of a step that an earlier run has done."""
        if outcome.judgement is None:
            return self.last
        return load_into(copy.deepcopy(self.module), self._module_path(outcome)).eval()


def _foretold(forecaster: Forecaster, step: Step) -> float | None:
    """The seconds of a step; None of one that does not work, which says why when it is tried."""
    try:
        return forecaster.seconds(step)
    except QatTricksError:
        return None


@contextmanager
def _silence() -> Iterator[None]:
    """Rehearsals tell nothing: their trainers' lines and warnings would come for each of them."""
    loggers = [logging.getLogger(package) for package in PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
