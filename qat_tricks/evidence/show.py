"""Writes figures with their units, in one way in every table and report."""

from collections.abc import Callable

_UNITS: dict[str, Callable[[float], str]] = {
    "percent": lambda value: f"{value:.2%}",
    "drop": lambda value: _change(value).removeprefix("drop "),  # below a title that says drop
    "change": lambda value: _change(value),
    "points": lambda value: f"{value:+.2f}",
    "ratio": lambda value: f"{value:.4f}",
    "error": lambda value: f"{value:.3g}",
    "bytes": lambda value: f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB",
    "ms": lambda value: f"{value:.2f} ms" if value >= 1 else f"{value:.3f} ms",
    "rate": lambda value: f"{value:,.0f}",
    "mib": lambda value: f"{value:.0f} MiB",
    "db": lambda value: f"{value:.1f} dB",
    "seconds": lambda value: f"{value:.0f} s" if value >= 100 else f"{value:.1f} s",
    "times": lambda value: f"{value:.2f}x",
}


def _change(drop: float) -> str:
    """``drop 0.56``, or ``gain 1.11``: of a minus sign nobody knows which way it counts."""
    text = f"{abs(drop):.2f}"
    return f"gain {text}" if drop < 0 and float(text) else f"drop {text}"


def show(value: float | None, unit: str, *, none: str = "not measured") -> str:
    """Returns a figure with its unit, or ``none`` for one that was not measured; it is never 0."""
    return none if value is None else _UNITS[unit](value)


def ratio(first: float | None, second: float | None) -> float | None:
    """Returns first / second, or None if either was not measured."""
    return None if first is None or not second else first / second
