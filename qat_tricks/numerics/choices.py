"""Chooses one option in each of several places, so that the errors sum to least under a budget.

This is the multiple-choice knapsack problem, which HAWQ-V3 (Yao et al. 2021, arXiv 2011.10680,
section 3.3) solves for bits a layer, and "Optimal Brain Compression" (Frantar and Alistarh 2022,
arXiv 2208.11580, section 6) for sparsity a layer. ``scipy.optimize.milp`` solves it exactly.

Where this differs: a cost may belong to the options of two places together, as the bits of a weight
times those of the activation that it meets. For each such product there is a variable more, whose
sums are those of its two places; so the program stays linear.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from qat_tricks.errors import QatTricksError

INFEASIBLE = 2  # the solver's status
SLACK = 1e-6  # of a budget: sums of floats, and the solver's own tolerance


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A cost that two places have together."""

    places: tuple[int, int]
    costs: Sequence[Sequence[float]]  # of each option of the first, with each of the second


@dataclass(frozen=True, kw_only=True)
class _Term:
    """One variable: a place's option, or the options of a pair of places."""

    error: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class _Equation:
    """A sum of variables, each with a sign, that has to be ``total``."""

    variables: list[int]
    signs: list[int]
    total: int


def choose(
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    budget: float,
    pairs: Sequence[Pair] = (),
) -> list[int] | None:
    """The option of each place: the errors sum to least, and the costs to at most ``budget``.

    Args:
        errors: of each place, of each of its options; finite, and at least 0.
        costs: likewise.
        budget: above 0.
        pairs: costs of two places together.

    Returns:
        The index of an option for each place; None where every choice costs more.
    """
    # It takes longer to load than most networks to quantize, which do without.
    from scipy.optimize import LinearConstraint, milp

    terms, equations = _program(errors, costs, pairs)
    matrix = np.zeros((len(equations), len(terms)))
    for row, equation in zip(matrix, equations, strict=True):
        row[equation.variables] = equation.signs
    totals = [equation.total for equation in equations]
    # The solver's tolerances are absolute, so both sums are brought near to one.
    known = [term.error for term in terms if term.error > 0]
    unit = float(np.median(known)) if known else 1.0
    prices = np.array([[term.cost for term in terms]]) / budget
    with _without_c_output():
        solution = milp(
            c=np.array([term.error for term in terms]) / unit * 1e3,
            integrality=np.ones(len(terms)),
            bounds=(0, 1),
            constraints=[
                LinearConstraint(matrix, lb=totals, ub=totals),
                LinearConstraint(prices, ub=1 + SLACK),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if solution.x is None:
        if solution.status == INFEASIBLE:
            return None
        raise QatTricksError(f"the integer program was not solved ({solution.message.strip()})")
    chosen, place = [], 0
    for options in errors:
        chosen.append(int(np.argmax(solution.x[place : place + len(options)])))
        place += len(options)
    return chosen


@contextmanager
def _without_c_output() -> Iterator[None]:
    """Keeps off the terminal what the solver prints for its own developers, asked or not."""
    try:
        flush = ctypes.CDLL(None).fflush
        stdout = os.dup(1)
    except (OSError, TypeError):  # Windows, or a process that has no output
        yield
        return
    if sys.stdout is not None:
        sys.stdout.flush()
    flush(None)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


def cost_of(
    chosen: Sequence[int], costs: Sequence[Sequence[float]], pairs: Sequence[Pair] = ()
) -> float:
    """What a choice costs."""
    alone = sum(options[index] for options, index in zip(costs, chosen, strict=True))
    return alone + sum(pair.costs[chosen[pair.places[0]]][chosen[pair.places[1]]] for pair in pairs)


def _program(
    errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], pairs: Sequence[Pair]
) -> tuple[list[_Term], list[_Equation]]:
    """The variables, and the equations that make them a choice."""
    terms: list[_Term] = []
    first_of: list[int] = []  # the first variable of each place
    equations: list[_Equation] = []
    for of_place, priced in zip(errors, costs, strict=True):
        first_of.append(len(terms))
        terms += [_Term(error=e, cost=c) for e, c in zip(of_place, priced, strict=True)]
        members = list(range(first_of[-1], len(terms)))
        equations.append(_Equation(variables=members, signs=[1] * len(members), total=1))
    for pair in pairs:
        first, second = (first_of[place] for place in pair.places)
        start, width = len(terms), len(pair.costs[0])
        terms += [_Term(error=0.0, cost=c) for row in pair.costs for c in row]
        # The variables of a row sum to the first place's option, those of a column to the second's.
        table = [[start + i * width + j for j in range(width)] for i in range(len(pair.costs))]
        sums = [(row, first + i) for i, row in enumerate(table)]
        sums += [(list(column), second + j) for j, column in enumerate(zip(*table, strict=True))]
        for variables, option in sums:
            signs = [*[1] * len(variables), -1]
            equations.append(_Equation(variables=[*variables, option], signs=signs, total=0))
    return terms, equations
