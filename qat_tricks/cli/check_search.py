"""Checks a search by Hydra's Optuna sweeper before its first job starts.

Its jobs are not known yet: they follow from results. But every setting that is searched has values,
or an interval with two ends, and a config can be composed and checked with each of them.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from qat_tricks.cli.check_train import check_one_process, check_train
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.objectives import OBJECTIVES, check_objectives
from qat_tricks.jobs.fitted_recipe import fitted_recipe
from qat_tricks.settings.binding import Problems
from qat_tricks.settings.compose import Composer, one_line


def check_search(composer: Composer, config: DictConfig, overrides: Sequence[str]) -> None:
    """Checks a search: its objectives, and jobs with each value of its settings.

    Args:
        composer: of the primary config.
        config: composed, with the hydra node.
        overrides: of the command line.

    Raises:
        QatTricksError: one line with every error.
    """
    problems = Problems()
    names = config.objectives
    check_objectives(OmegaConf.to_container(names) if OmegaConf.is_config(names) else names)
    problems.of(lambda: _check_directions(config))
    problems.of(lambda: _check_counts(config.hydra.sweeper))
    problems.report()  # composing jobs takes seconds
    for job in _sampled_jobs(composer, config, overrides):
        job_config, unapplied = composer.compose(job)
        problems.messages += unapplied
        if unapplied:
            break  # the jobs have the same settings, and the others' errors would be alike
        for check in (check_train, check_one_process, _check_budgets):
            problems.of(lambda check=check, job=job_config: check(job))  # type: ignore[misc]
    problems.report()


def is_search(config: DictConfig) -> bool:
    """Whether the sweeper of a composed config is Optuna's."""
    return "direction" in config.hydra.sweeper


def check_is_job(config: DictConfig, overrides: Sequence[str]) -> None:
    """Checks that a single run with a search's config is one of its jobs, done again.

    Raises:
        QatTricksError: no setting of the search space is given, so that ``--multirun`` was
            forgotten.
    """
    space = {str(key) for key in config.hydra.sweeper.params or ()} if is_search(config) else set()
    if space and not space & _keys(overrides):
        raise QatTricksError(
            "a search needs --multirun: add -m, or give the settings of the one job that you want"
        )


def _check_directions(config: DictConfig) -> None:
    names = list(config.objectives)
    if not names:
        raise QatTricksError(
            "the sweeper decides by results, and objectives=[] tells it none: give a list of "
            f"{', '.join(OBJECTIVES)}, such as objectives=[accuracy,latency]"
        )
    given = config.hydra.sweeper.direction
    given = list(given) if OmegaConf.is_list(given) else [given]
    directions = [str(getattr(direction, "name", direction)) for direction in given]
    expected = [OBJECTIVES[name].direction for name in names]
    if directions != expected:
        raise QatTricksError(
            f"hydra.sweeper.direction=[{','.join(directions)}] does not fit "
            f"objectives=[{','.join(names)}]: give hydra.sweeper.direction=[{','.join(expected)}]"
        )


def _check_counts(sweeper: DictConfig) -> None:
    wrong = [key for key in ("n_trials", "n_jobs") if not sweeper[key] >= 1]
    if wrong:
        raise QatTricksError(
            "; ".join(f"hydra.sweeper.{key}={sweeper[key]}: give 1 or more" for key in wrong)
        )


def _check_budgets(config: DictConfig) -> None:
    """Refuses a budget of a stage, which is kept on the test images."""
    budgets = [stage.name for stage in fitted_recipe(config).stages if stage.max_drop is not None]
    if "accuracy" in config.objectives and budgets:
        raise QatTricksError(
            f'max_drop of stage "{budgets[0]}" is measured on the test images, which must not '
            "decide a search: leave it out, accuracy is an objective already"
        )


def _sampled_jobs(
    composer: Composer, config: DictConfig, overrides: Sequence[str]
) -> Iterator[list[str]]:
    """Yields the overrides of as many jobs as show each value of each setting once.

    Raises:
        QatTricksError: the settings cannot be read, or the sweeper does not know such values.
    """
    of_hydra = [line for line in overrides if line.lstrip("+~").startswith("hydra")]
    given = [line for line in overrides if line not in of_hydra]
    params = config.hydra.sweeper.params or {}
    # A setting on the command line takes the place of the one in the space.
    space = [f"{key}={value}" for key, value in params.items() if str(key) not in _keys(given)]
    problems = Problems()
    found = [problems.of(lambda line=line: _values(composer, line)) for line in [*space, *given]]  # type: ignore[misc]
    problems.report()
    values = [lines for lines in found if lines]
    for index in range(max(map(len, values), default=1)):
        yield [*of_hydra, *(lines[index % len(lines)] for lines in values)]


def _keys(overrides: Sequence[str]) -> set[str]:
    return {line.lstrip("+~").partition("=")[0] for line in overrides}


def _values(composer: Composer, line: str) -> list[str]:
    """Returns a setting with each of its values; of a range or an interval, with both ends.

    Raises:
        QatTricksError: it cannot be read.
    """
    try:
        (override,) = OverridesParser.create(config_loader=composer.loader).parse_overrides([line])
        if not override.is_sweep_override():
            return [line]
        key, value = override.get_key_element(), override.value()
        if isinstance(value, Glob):
            raise QatTricksError(f'"{line}": Optuna knows no glob: name all with choice(A,B)')
        if isinstance(value, IntervalSweep):
            return [f"{key}={end}" for end in _ends(line, value)]
        texts = list(_texts(override, value))
    except (HydraException, ValueError) as error:
        raise QatTricksError(f'"{line}" cannot be read: {one_line(error)}') from error
    if not texts:
        raise QatTricksError(f'"{line}" has no value: give one at least')
    return [f"{key}={text}" for text in texts]


def _ends(line: str, interval: IntervalSweep) -> tuple[Any, Any]:
    low, high = interval.start, interval.end
    if low is None or high is None or low >= high:
        raise QatTricksError(f'"{line}": give the lower end first, and the higher one second')
    if "log" in interval.tags and low <= 0:
        raise QatTricksError(f'"{line}": a logarithmic interval begins above 0')
    return low, high


def _texts(override: Override, value: Any) -> Iterator[str]:
    texts = list(itertools.islice(override.sweep_string_iterator(), 10_000))
    yield from (texts[:1] + texts[-1:] if isinstance(value, RangeSweep) else texts)
