"""The page of a run: ``report.html``, one file that needs nothing beside it.

It shows what ``report.json`` holds, and pictures of the images on which both networks disagree.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qat_tricks.evidence import page_plots as plots
from qat_tricks.evidence.checklist import against, checklist
from qat_tricks.evidence.language import ENGLISH, Language, language_named
from qat_tricks.evidence.ledger import proofs_of, rates_of, steps_of
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
    """Returns the page as HTML, in the language that ``report["language"]`` names."""
    say = language_named(report.get("language", "en"))
    report = printable(report)
    stages = report["stages"]
    steps, proofs = steps_of(stages), proofs_of(stages)
    # the template is strict: keys that a report may lack get a value here
    optional = ("comparison", "profile", "command", "layers", "guideline")
    mappings = ("size_bytes", "latency_ms", "memory_mib", "parity", "load_ms", "compressed_bytes")
    fields: dict[str, Any] = {key: report.get(key) for key in optional}
    fields |= {key: report.get(key) or {} for key in mappings}
    fields |= {"steps": steps, "proofs": proofs, "pictures": pictures, "ratio": ratio}
    fields |= {"title": title(report, say), "language": say.code, "rates": rates_of(stages)}
    fields["checklist"] = checklist(report, say) if report.get("checklist") else None
    fields["answers"] = answers(report, say)
    fields["figures"] = _figures(report, steps, proofs, say)
    return fill_in("report.html.j2", {**report, **fields}, say)


def title(report: Mapping[str, Any], say: Language) -> str:
    """What the report is of: recipe, model and data."""
    names = {key: report[key] for key in ("model", "data")}
    if not report["recipe"]:
        return say("%(model)s on %(data)s", **names)
    return say("%(recipe)s of %(model)s on %(data)s", recipe=report["recipe"], **names)


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


def answers(report: Mapping[str, Any], say: Language) -> list[dict[str, str]]:
    """The three questions that the page opens with: each with an answer, its figures and a mark.

    A mark is ``good``, ``bad``, or ``open`` where nothing can be said.
    """
    medians = {k: (v or {}).get("p50") for k, v in (report.get("latency_ms") or {}).items()}
    return [
        _as_good(report.get("comparison"), say),
        _times(
            say("How much smaller?"),
            say.sentence("%(times).2f times smaller"),
            say.sentence("%(times).2f times larger"),
            report.get("size_bytes") or {},
            "bytes",
            say,
        ),
        _times(
            say("How much faster?"),
            say.sentence("%(times).2f times faster"),
            say.sentence("%(times).2f times slower"),
            medians,
            "ms",
            say,
        ),
    ]


def answer_lines(report: Mapping[str, Any]) -> str:
    """The answers that the page opens with, as text: a line each."""
    lines = []
    for row in answers(report, ENGLISH):
        detail = f": {row['detail']}" if row["detail"] else ""
        lines.append(f"{row['question']} {row['answer']}{detail}")
    return "\n".join(lines)


def _as_good(comparison: Mapping[str, Any] | None, say: Language) -> dict[str, str]:
    question = say("Is it as good?")
    if comparison is None:
        return {"question": question, "answer": say("not compared"), "detail": "", "mark": "open"}
    change, images = comparison["change"], comparison["images"]
    interval = say(
        "%(change)s on %(images)s test images",
        change=show_change(change, say),
        images=f"{images:,}",
    )
    told = comparison["verdict"]
    answer = {
        "worse": say("No: it is worse"),
        "better": say("Yes: it is better"),
        "no difference shown": say("Yes, as far as these images tell"),
    }[told]
    # Few images show no difference either: what could be hidden is said, not praised.
    if told == "no difference shown" and change["low"] < -1:
        answer = say("Too few images to tell")
    marks = {"worse": "bad", "better": "good"}
    mark = marks.get(told, "open" if change["low"] < -1 else "good")
    return {"question": question, "answer": answer, "detail": interval, "mark": mark}


def _times(
    question: str, more: str, less: str, values: Mapping[str, Any], unit: str, say: Language
) -> dict[str, str]:
    first, second = values.get("fp32"), values.get("int8")
    times = ratio(first, second)
    if times is None:
        return {"question": question, "answer": say("not measured"), "detail": "", "mark": "open"}
    return {
        "question": question,
        "answer": more % {"times": times} if times >= 1 else less % {"times": 1 / times},
        "detail": against(show(second, unit), show(first, unit), say),
        "mark": "good" if times > 1.02 else "open" if times > 0.98 else "bad",
    }


def _figures(
    report: Mapping[str, Any],
    steps: list[dict[str, Any]],
    proofs: list[dict[str, Any]],
    say: Language,
) -> dict[str, Markup | None]:
    stages, comparison = report["stages"], report.get("comparison")
    known = [stage for stage in stages if stage["accuracy"] is not None]
    figures = {
        "stages": plots.stages_plot(known, say) if known else None,
        "tradeoff": plots.tradeoff_plot(known, say),
        "latency": plots.latency_plot(report.get("latency_ms") or {}, say),
        "steps": plots.steps_plot(steps, say),
        "proofs": plots.proofs_plot(proofs, say),
        "operators": plots.operators_plot(report.get("profile") or {}, say),
    }
    if report.get("layers"):
        figures["layers"] = plots.layers_plot(report["layers"]["tensors"], say)
    if comparison is not None:
        figures["classes"] = plots.classes_plot(comparison["classes"], say)
        figures["reliability"] = plots.reliability_plot(comparison["reliability"], say)
        if comparison["confusions"]:
            figures["confusions"] = plots.confusions_plot(comparison["confusions"], say)
    return figures
