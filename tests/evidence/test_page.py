import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from qat_tricks.evidence.checklist import checklist
from qat_tricks.evidence.comparison import write_comparison
from qat_tricks.evidence.language import ENGLISH
from qat_tricks.evidence.metrics import Metrics
from qat_tricks.evidence.page import answer_lines, answers, render_page
from qat_tricks.evidence.paired import compare
from qat_tricks.evidence.report import read_report, write_report
from tests.helpers.samples import report

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9Q"
    "DwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def answered(right, classes=10, count=600, seed=0):
    """The metrics of a classifier that has ``right`` of the images right."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    wrong = torch.randperm(count, generator=random)[: count - right]
    predictions = labels.clone()
    predictions[wrong] = (labels[wrong] + 1) % classes
    sure = 0.5 + 0.5 * torch.rand(count, generator=random)
    figures = {"accuracy": right / count, "top5": 0.99, "f1": right / count, "ece": 0.01}
    return Metrics(
        **figures, nll=0.1, seconds=1.0, predictions=predictions, confidences=sure, labels=labels
    )


def whole(int8=580, **changes):
    """A report with everything that a page may show."""
    names = [f"<class {i}> & more" for i in range(10)]
    comparison = compare(answered(585), answered(int8, seed=1), names)
    made = report(comparison=comparison, **changes)
    made["stages"][1] |= {
        "size_bytes": 310_000, "sparsity": 0.5, "latency_ms": {"p50": 0.6, "p95": 0.9},
        "equivalence": [{"name": "traced", "evaluation_db": 200.0, "training_db": None,
                         "by_design": False, "undone": []}],
        "proofs": {"equalize": {"trick": "equalize", "kl_before": 0.2, "kl_after": 0.1,
                                "change": None, "sqnr_before_db": 1.0, "sqnr_after_db": 2.0,
                                "images": 64, "verdict": "kept", "undone": []}},
    }  # fmt: skip
    made["stages"][0] |= {"size_bytes": 1_100_000, "latency_ms": {"p50": 1.2, "p95": 1.9}}
    row = {"bits": 8, "low": -1.0, "high": 1.0, "clipped": 0.01, "zeros": 0.5}
    tensors = [
        {"name": "conv", "kind": "weight", "sqnr_db": 40.0, **row},
        {"name": "relu", "kind": "activation", "sqnr_db": None, **row},
    ]
    operators = [{"name": "conv", "op_type": "Conv", "ms": 0.3, "share": 0.5}]
    return made | {
        "environment": {"cpu": "a processor", "onnxruntime": "1.32.0"},
        "command": "python train.py recipe=int8_ptq 'model.name=<x>'",
        "layers": {"images": 256, "tensors": tensors},
        "profile": {"fp32": operators, "int8": operators},
    }


class Page(HTMLParser):
    """Collects what a page holds, and what it would fetch."""

    ALONE = {"meta", "img", "br", "link", "path", "use", "rect", "line", "circle"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.ids, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.ALONE:
            self.open.append(tag)
        named = dict(attributes)
        self.ids += [named["id"]] if "id" in named else []
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.ALONE:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone():
    text = render_page(whole(), {0: PICTURE})
    page = Page(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids) > 20
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "script" not in page.tags
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)  # clip paths are within
    assert len(text) < 3_000_000


def test_every_figure_of_the_sample_is_drawn_and_no_stand_in_colour_is_left():
    text = render_page(whole(), {})
    assert text.count("<figure aria-label") == 10
    assert "var(--float)" in text
    assert "var(--int8)" in text
    assert not re.findall(r"#0[1-5]0[1-5]0[1-5]", text)


def test_figures_leave_their_font_to_the_page_and_their_numbers_are_text():
    text = render_page(whole(), {})
    assert ">0.15</text>" in text  # on the logarithmic axis of the proofs
    assert "mathdefault" not in text
    assert "font-family" not in text.partition("</style>")[2]


def test_what_comes_from_outside_is_escaped():
    page = Page(render_page(whole(recipe='<script>alert("x")</script>'), {}))
    assert "script" not in page.tags
    assert "<class 3> & more" in page.text
    assert "model.name=<x>" in page.text


def test_names_may_be_of_any_letters(recwarn):
    names = [
        "猫",
        "$5 and $6",
        "a_b^c",
        "{x}",
        "50 %",
        "two\nlines",
        "x" * 300,
        "猫" * 40,
        "\x00\x1b",
        "a\udcff",
    ]
    names[2] = "$x_$ \\foo"
    comparison = compare(answered(585), answered(500, seed=1), names)
    page = Page(render_page(whole() | {"comparison": comparison}, {}))
    assert "猫" in page.text
    assert "$5 and $6" in page.text
    assert "two lines" in page.text
    assert not re.findall("[\x00-\x08\x0b-\x1f]", page.text)
    assert not recwarn.list


def test_the_same_report_gives_the_same_page():
    assert render_page(whole(), {0: PICTURE}) == render_page(whole(), {0: PICTURE})


@pytest.mark.parametrize(
    ("int8", "answer", "mark"),
    [(500, "No: it is worse", "bad"), (585, "Too few images to tell", "open")],
)
def test_the_first_answer_is_no_better_than_the_images_allow(int8, answer, mark):
    first, *_ = answers(whole(int8), ENGLISH)
    assert (first["answer"], first["mark"]) == (answer, mark)
    assert "600 test images" in first["detail"]


def test_the_same_network_on_many_images_is_as_good():
    same = answered(9000, count=10_000)
    (first, *_) = answers(report(comparison=compare(same, same, [])), ENGLISH)
    assert first["answer"] == "Yes, as far as these images tell"
    assert first["mark"] == "good"


def test_size_and_latency_say_times_and_what_they_were():
    _, size, latency = answers(report(), ENGLISH)
    assert size["answer"] == "3.55 times smaller"
    assert latency["answer"] == "2.00 times faster"
    assert latency["detail"] == "0.600 ms against 1.20 ms in float"
    _, _, slower = answers(report(scale=4.0), ENGLISH)
    assert (slower["answer"], slower["mark"]) == ("2.00 times slower", "bad")


def test_a_report_without_measurements_has_a_page():
    keys = ("agreement", "parity", "size_bytes", "sparsity", "int8_coverage", "latency_ms")
    empty = report() | dict.fromkeys((*keys, "batch_size", "threads", "memory_mib"))
    page = Page(render_page(empty | {"environment": {"cpu": "x", "onnxruntime": None}}, {}))
    assert page.text.count("not measured") > 5
    assert "not compared" in page.text


def test_figures_that_are_no_numbers_are_told_as_missing(tmp_path):
    made = whole(latency_ms={"fp32": {"p50": float("nan")}, "int8": {"p50": 0.5}})
    for row in made["layers"]["tensors"]:
        row |= {"sqnr_db": None, "clipped": float("nan")}
    write_report(tmp_path, made)
    page = Page((tmp_path / "report.html").read_text())
    assert "not measured" in page.text


def test_it_lies_beside_the_report(tmp_path):
    write_report(tmp_path, whole(), {3: PICTURE})
    assert "int8_ptq of resnet20 on digits" in (tmp_path / "report.html").read_text()
    read = read_report(tmp_path)
    assert read["schema"] == 2
    assert read["comparison"]["change"]["lost"] == whole()["comparison"]["change"]["lost"]


def chromium(folder, page, *arguments):
    """Draws a page in Chromium, and returns what it and its console said."""
    run = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
            "--proxy-server=http://127.0.0.1:9",  # whatever is fetched fails, and is told
            *arguments, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return run.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("name", ["report.html", "comparison.html"])
def test_chromium_draws_it_without_an_error_and_fetches_nothing(tmp_path, name):
    write_report(tmp_path / "job", whole(), {0: PICTURE})
    write_comparison(tmp_path)
    (page,) = tmp_path.rglob(name)
    picture = tmp_path / "page.png"
    said = chromium(tmp_path, page, "--window-size=1200,900", f"--screenshot={picture}")
    assert picture.stat().st_size > 10_000
    assert "CONSOLE" not in said
    assert "ERR_" not in said


LOOK = """<script>addEventListener("load", () => requestAnimationFrame(() => setTimeout(() => {
  const right = e => e.getBoundingClientRect().right;
  const tables = [...document.querySelectorAll("table")];
  console.log("found " + JSON.stringify({
    seconds: performance.now() / 1000,
    tables: tables.length,
    hidden: tables.filter(e => !e.checkVisibility()).length,
    cut: tables.filter(e => right(e) > right(e.closest("section")) + 1).length,
    wider: document.documentElement.scrollWidth - innerWidth,
  }) + " end");
})))</script>"""


def found_in(folder, text, width):
    """What a script finds on a page of so many pixels, once it is drawn."""
    path = folder / "looked_at.html"
    path.write_text(text.replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    picture = folder / "page.png"
    said = chromium(folder, path, f"--window-size={width},900", f"--screenshot={picture}")
    (found,) = re.findall(r"found (\{.*?\}) end", said)
    return json.loads(found)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("language", ["en", "ja"])
def test_chromium_draws_it_at_once_and_paper_has_all_of_it(tmp_path, language):
    made = whole(language=language)
    text = render_page(made | {"checklist": checklist(made)}, {0: PICTURE})
    screen = found_in(tmp_path, text, 500)
    assert screen["seconds"] < 2
    assert screen["hidden"] == 2  # all classes, and all tensors: they open
    assert screen["wider"] <= 0  # wide tables scroll by themselves
    paper = found_in(tmp_path, text.replace("@media print", "@media all"), 718)  # A4
    assert paper["tables"] == screen["tables"]
    assert (paper["hidden"], paper["cut"]) == (0, 0)


def test_a_terminal_gets_the_answers_of_the_page():
    made = whole()
    lines = answer_lines(made).splitlines()
    assert len(lines) == len(answers(made, ENGLISH)) == 3
    for line, row in zip(lines, answers(made, ENGLISH), strict=True):
        assert line == f"{row['question']} {row['answer']}: {row['detail']}"
    assert answer_lines(report()).splitlines()[0] == "Is it as good? not compared"
