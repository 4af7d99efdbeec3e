"""The checklist of a report: what to look at before a network is deployed, filled in by figures.

It is that of ``docs/checklist.md``. A check passes, fails, or was not measured, which is no pass.
The limits are those beyond which people in the field ask for a reason; they decide nothing else.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qat_tricks.evidence.language import ENGLISH, Language
from qat_tricks.evidence.ledger import steps_of
from qat_tricks.evidence.paired import SIGNIFICANT, show_change
from qat_tricks.evidence.show import ratio, show
from qat_tricks.graph.equivalence import LEAST_DB
from qat_tricks.numerics.decibels import LARGEST_SQNR_DB

LARGEST_F1_DROP = 1.0  # points of macro F1
LARGEST_ECE_RISE = 0.02
LARGEST_NLL_RISE = 0.10  # of float's
LEAST_COVERAGE = 0.99  # of the multiplications
LARGEST_SHIFT = 0.1  # of an activation's range, between the means on two sets of images
LARGEST_CLIPPED = 0.01  # of an 8-bit activation's values

PASS, FAIL, OPEN = "pass", "fail", "not measured"

Found = tuple[str, str]  # a state, and the figure it rests on
Check = Callable[[Mapping[str, Any], Language], Found | None]


def checklist(report: Mapping[str, Any], say: Language = ENGLISH) -> list[dict[str, str]]:
    """Fills in the checklist from a report's figures.

    Args:
        report: as of ``write_report``.
        say: the language of the figures' texts.

    Returns:
        A row for each of ``CHECKS``, in that order: ``check``, ``state`` (``pass``, ``fail`` or
        ``not measured``), both in English, and ``figure``, a text.
    """
    rows = []
    for name, check in CHECKS.items():
        state, figure = check(report, say) or (OPEN, "")
        rows.append({"check": name, "state": state, "figure": figure})
    return rows


def _when(passes: bool, figure: str) -> Found:
    return (PASS if passes else FAIL), figure


def _accuracy(report: Mapping[str, Any], say: Language) -> Found | None:
    found = report.get("comparison")
    if not found:
        return None
    figure = say(
        "%(verdict)s: %(change)s",
        verdict=say(found["verdict"]),
        change=show_change(found["change"], say),
    )
    return _when(found["verdict"] != "worse", figure)


def _metrics(report: Mapping[str, Any], say: Language) -> Found | None:
    if len(report["stages"]) < 2:
        return None
    first, last = report["stages"][0], report["stages"][-1]
    if any(stage[key] is None for stage in (first, last) for key in ("f1", "ece", "nll")):
        return None
    f1 = 100 * (last["f1"] - first["f1"])
    ece, nll = last["ece"] - first["ece"], last["nll"] - first["nll"]
    figure = say(
        "macro F1 %(f1)+.2f points, ECE %(ece)+.4f, NLL %(nll)+.4f", f1=f1, ece=ece, nll=nll
    )
    return _when(
        f1 >= -LARGEST_F1_DROP
        and ece <= LARGEST_ECE_RISE
        and nll <= LARGEST_NLL_RISE * first["nll"] + 0.01,  # of a float network that is never wrong
        figure,
    )


def _worst_class(report: Mapping[str, Any], say: Language) -> Found | None:
    found = report.get("comparison")
    if not found:
        return None
    lost = [row for row in found["classes"] if row["points"] < 0 and row["q"] < SIGNIFICANT]
    worst = (lost or found["classes"])[0]  # the worst is the first
    points = show(worst["points"], "points")
    figure = say(
        "%(name)s: %(points)s points, q = %(q).2g", name=worst["name"], points=points, q=worst["q"]
    )
    return _when(not lost, figure)


def _calibration(report: Mapping[str, Any], say: Language) -> Found | None:
    """Whether the test images stay within the ranges of the calibration images, and near them."""
    tensors = (report.get("layers") or {}).get("tensors") or ()
    fine = [
        row
        for row in tensors
        if row["kind"] == "activation" and row["bits"] == 8 and row["clipped"] is not None
    ]
    if not fine:  # below 8 bits, ranges clip on purpose
        return None
    worst = max(fine, key=lambda row: row["clipped"])
    figure = say(
        "at most %(share)s of an activation clipped on test images (%(name)s)",
        share=show(worst["clipped"], "percent"),
        name=worst["name"],
    )
    compared = report.get("calibration") or {"shift": None}
    if compared["shift"] is None:
        return _when(worst["clipped"] <= LARGEST_CLIPPED, figure)
    figure += say(
        "; means apart by at most %(shift)s of a range (%(tensor)s), shares of a class by %(gap)s "
        "(%(class)s)",
        shift=show(compared["shift"], "percent"),
        gap=show(compared["class_gap"], "percent"),
        **{key: compared[key] for key in ("tensor", "class")},
    )
    return _when(worst["clipped"] <= LARGEST_CLIPPED and compared["shift"] <= LARGEST_SHIFT, figure)


def _preprocessing(report: Mapping[str, Any], say: Language) -> Found | None:
    change = report.get("preprocessing_change")
    if change:
        return FAIL, "; ".join(change["differences"])
    known = (report.get("preprocessing") or {}).get("hash")
    return (PASS, f"{known}"[:23]) if known else None


def _stages(report: Mapping[str, Any], say: Language) -> Found | None:
    """A stage that loses more than it may ends the run, so one that has ended has none."""
    drops = ", ".join(
        f"{stage['name']} {show(-stage['drop_points'], 'points')}"
        for stage in report["stages"][1:]
        if stage.get("drop_points") is not None
    )
    if not drops or report.get("interrupted") or "stage_budgets" not in report:
        return None
    limits = report["stage_budgets"]
    if all(limit is None for limit in limits.values()):
        return OPEN, say("no stage has a budget (max_drop); %(drops)s points", drops=drops)
    return PASS, say("%(drops)s points", drops=drops)


def _parity(report: Mapping[str, Any], say: Language) -> Found | None:
    found = report.get("parity") or {}
    if found.get("top1_agreement") is None:
        return None
    tensors = found.get("layers") or ()
    same = sum(not tensor["differing"] for tensor in tensors)
    share = show(found["top1_agreement"], "percent")
    figure = say("%(share)s of the images get the same class", share=share)
    if tensors:
        figure += say(
            ", %(same)s of %(all)s tensors are equal to the last bit", same=same, all=len(tensors)
        )
    return _when(found["top1_agreement"] >= 0.999, figure)


def _equivalence(report: Mapping[str, Any], say: Language) -> Found | None:
    steps = [
        step
        for step in steps_of(report["stages"])
        if not step.get("by_design") and step.get("evaluation_db") is not None
    ]
    if not steps:
        return None
    least = min(steps, key=lambda step: step["evaluation_db"])
    exact = least["evaluation_db"] >= LARGEST_SQNR_DB
    name = say.word(least["name"])
    of_least = say("%(decibels).0f dB (%(name)s)", decibels=least["evaluation_db"], name=name)
    figure = say("to the last bit") if exact else of_least
    return _when(least["evaluation_db"] >= LEAST_DB, figure)


def _coverage(report: Mapping[str, Any], say: Language) -> Found | None:
    share = report.get("int8_coverage")
    if share is None:
        return None
    figure = say("%(share)s of the multiplications", share=show(share, "percent"))
    return _when(share >= LEAST_COVERAGE, figure)


def _latency(report: Mapping[str, Any], say: Language) -> Found | None:
    both = report.get("latency_ms") or {}
    first, second = ((both.get(kind) or {}).get("p50") for kind in ("fp32", "int8"))
    times = ratio(first, second)
    if times is None:
        return None
    return _when(times > 1, against(show(second, "ms"), show(first, "ms"), say))


def _memory(report: Mapping[str, Any], say: Language) -> Found | None:
    both = report.get("memory_mib") or {}
    if both.get("fp32") is None or both.get("int8") is None:
        return None
    figure = against(show(both["int8"], "mib"), show(both["fp32"], "mib"), say)
    # A process of its own has some 50 MiB before it opens a network.
    return _when(both["int8"] <= both["fp32"] + 1, figure)


def _seeds(report: Mapping[str, Any], say: Language) -> Found | None:
    return OPEN, say("one seed; repeat with seed=1, 2 (python train.py -m seed=0,1,2 …)")


def against(int8: str, fp32: str, say: Language) -> str:
    """What the int8 file needs, and what the float one."""
    return say("%(int8)s against %(fp32)s in float", int8=int8, fp32=fp32)


CHECKS: dict[str, Check] = {
    "accuracy is no worse, beyond chance": _accuracy,
    "other metrics agree: macro F1, ECE, NLL": _metrics,
    "no class got worse, beyond chance": _worst_class,
    "calibration images are like the test images": _calibration,
    "preprocessing is that of the float network": _preprocessing,
    "every stage kept within its budget": _stages,
    "the file computes what was trained": _parity,
    "preparing the network changed nothing": _equivalence,
    "it runs in integers": _coverage,
    "it is faster on this device": _latency,
    "it needs no more memory on this device": _memory,
    "other seeds give the same": _seeds,
}
"""What is checked, in the order of ``docs/checklist.md``."""
