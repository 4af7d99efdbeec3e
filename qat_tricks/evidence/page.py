"""The page of a run: ``report.html``, one file that needs nothing beside it.

It shows what ``report.json`` holds, and pictures of the images on which both networks disagree.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qat_tricks.evidence import page_plots as plots
from qat_tricks.evidence.ledger import proofs_of, steps_of
from qat_tricks.evidence.paired import show_change
from qat_tricks.evidence.show import ratio, show
from qat_tricks.evidence.templates import fill_in
from qat_tricks.files import write_text

PAGE = "report.html"


def write_page(folder: Path, report: Mapping[str, Any], pictures: Mapping[int, str]) -> None:
    """Writes ``report.html`` into a folder, whole or not at all.

    Args:
        folder: the run's.
        report: as of ``write_report``.
        pictures: of test images, by their place, as ``data:`` addresses.

    Raises:
        QatTricksError: the folder cannot be written.
    """
    write_text(Path(folder) / PAGE, render_page(report, pictures))


def render_page(report: Mapping[str, Any], pictures: Mapping[int, str]) -> str:
    """Returns the page as HTML."""
    report = printable(report)
    stages = report["stages"]
    steps, proofs = steps_of(stages), proofs_of(stages)
    # the template is strict: keys that a report may lack get a value here
    optional = ("comparison", "profile", "command", "layers", "checklist")
    mappings = ("size_bytes", "latency_ms", "memory_mib", "parity", "load_ms", "compressed_bytes")
    fields: dict[str, Any] = {key: report.get(key) for key in optional}
    fields |= {key: report.get(key) or {} for key in mappings}
    fields |= {"steps": steps, "proofs": proofs, "pictures": pictures, "ratio": ratio}
    fields["answers"] = answers(report)
    fields["figures"] = _figures(report, steps, proofs)
    return fill_in("report.html.j2", {**report, **fields})


def printable(value: Any) -> Any:
    """Plain data without what no page may hold: control characters, and halves of letters.

    A folder of images, which names a class, may have any bytes in its name.
    """
    if isinstance(value, str):
        text = value.encode("utf-8", "replace").decode("utf-8")
        return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
    if isinstance(value, Mapping):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(item) for item in value]
    return value


def answers(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The three questions that the page opens with: each with an answer, its figures and a mark.

    A mark is ``good``, ``bad``, or ``open`` where nothing can be said.
    """
    return [
        _as_good(report.get("comparison")),
        _times("How much smaller?", "smaller", "larger", report.get("size_bytes"), "bytes"),
        _times(
            "How much faster?",
            "faster",
            "slower",
            {k: (v or {}).get("p50") for k, v in (report.get("latency_ms") or {}).items()},
            "ms",
        ),
    ]


def answer_lines(report: Mapping[str, Any]) -> str:
    """The answers that the page opens with, as text: a line each."""
    lines = []
    for row in answers(report):
        detail = f": {row['detail']}" if row["detail"] else ""
        lines.append(f"{row['question']} {row['answer']}{detail}")
    return "\n".join(lines)


def _as_good(comparison: Mapping[str, Any] | None) -> dict[str, str]:
    question = "Is it as good?"
    if comparison is None:
        return {"question": question, "answer": "not compared", "detail": "", "mark": "open"}
    change, images = comparison["change"], comparison["images"]
    interval = f"{show_change(change)} on {images:,} test images"
    told = comparison["verdict"]
    answer = {
        "worse": "No: it is worse",
        "better": "Yes: it is better",
        "no difference shown": "Yes, as far as these images tell",
    }[told]
    # Few images show no difference either: what could be hidden is said, not praised.
    if told == "no difference shown" and change["low"] < -1:
        answer = "Too few images to tell"
    marks = {"worse": "bad", "better": "good"}
    mark = marks.get(told, "open" if change["low"] < -1 else "good")
    return {"question": question, "answer": answer, "detail": interval, "mark": mark}


def _times(
    question: str, more: str, less: str, values: Mapping[str, Any] | None, unit: str
) -> dict[str, str]:
    first, second = ((values or {}).get(kind) for kind in ("fp32", "int8"))
    times = ratio(first, second)
    if times is None:
        return {"question": question, "answer": "not measured", "detail": "", "mark": "open"}
    is_more = times >= 1
    shown = times if is_more else 1 / times
    return {
        "question": question,
        "answer": f"{shown:.2f} times {more if is_more else less}",
        "detail": f"{show(second, unit)} against {show(first, unit)} in float",
        "mark": "good" if times > 1.02 else "open" if times > 0.98 else "bad",
    }


def _figures(
    report: Mapping[str, Any], steps: list[dict[str, Any]], proofs: list[dict[str, Any]]
) -> dict[str, Markup | None]:
    stages, comparison = report["stages"], report.get("comparison")
    known = [stage for stage in stages if stage["accuracy"] is not None]
    figures = {
        "stages": plots.stages_plot(known) if known else None,
        "tradeoff": plots.tradeoff_plot(known),
        "latency": plots.latency_plot(report.get("latency_ms") or {}),
        "steps": plots.steps_plot(steps),
        "proofs": plots.proofs_plot(proofs),
        "operators": plots.operators_plot(report.get("profile") or {}),
    }
    if report.get("layers"):
        figures["layers"] = plots.layers_plot(report["layers"]["tensors"])
    if comparison is not None:
        figures["classes"] = plots.classes_plot(comparison["classes"])
        figures["reliability"] = plots.reliability_plot(comparison["reliability"])
        if comparison["confusions"]:
            figures["confusions"] = plots.confusions_plot(comparison["confusions"])
    return figures
