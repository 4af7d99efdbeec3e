"""Every text of ours on the page is in the catalogue, and no English of ours is left on it."""

import ast
import json
import re

import pytest

from qat_tricks.deploy.targets import TARGETS
from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.checklist import CHECKS, FAIL, OPEN, PASS, checklist
from qat_tricks.evidence.language import ENGLISH, LANGUAGES, check_language, language_named
from qat_tricks.evidence.page import render_page
from qat_tricks.evidence.report import read_report, render, write_report
from qat_tricks.evidence.templates import environment
from qat_tricks.graph.bit_options import UNITS
from qat_tricks.graph.channel_check import DEPENDS
from qat_tricks.graph.trace_kept import TRACED
from qat_tricks.jobs.guideline_result import FAILED, OVER, WITHIN
from qat_tricks.recipes.guideline_steps import (
    GuidelineSettings,
    pruning_steps,
    quality_steps,
)
from tests.evidence.test_page import PICTURE, Page, whole
from tests.helpers import ROOT

JAPANESE = language_named("ja")
PACKAGE = ROOT / "qat_tricks"
# Looked up by a variable, not by a text in the code.
LOOKED_UP = {*CHECKS, PASS, FAIL, OPEN, "worse", "better", "no difference shown"}
# What is called so in Japanese too, and what a user calls so in the report of these tests.
NAMES = set(
    re.findall(
        r"\S+",
        """
    BatchNorm CPU ECE KL MAC MiB NLL ONNX Runtime SQNR VNNI Zstandard float fp32 int8 uint8 macro
    model_fp32 nat onnx onnxruntime p50 p95 p99 seed max_drop top json html report md session x86
    x64quantprecision model.onnx report.json report.md python train.py
    int8_ptq resnet20 digits Prozessor conv relu Conv equalize Klasse recipe model.name mean
    onnxruntime_cpu Reorder sha256 abc conv2
    session.x64quantprecision ptq qat sparsity_0.2 latency_0.5 train.py int8_ptq
""",
    )
)


def tried(name, does, decision):
    """A step of the guideline."""
    change = {"points": -1.0, "low": -2.0, "high": 0.0}
    judgement = None if decision == "does not work here" else {"change": change, "agreement": 0.9}
    return {
        "name": name,
        "does": does,
        "decision": decision,
        "judgement": judgement,
        "reason": "",
        "command": "recipe=int8_ptq",
        "foretold_seconds": None,
        "seconds": 2.0,
    }


def everything(**changes):
    """A report with all that the page and ``report.md`` may show, and no English names in it."""
    made = json.loads(json.dumps(whole()).replace("<class", "<Klasse").replace(" & more", ""))
    made["environment"] = {"cpu": "Prozessor", "onnxruntime": None, "system": "x86", "cores": 2}
    step = {"training_db": 90.0, "undone": [], "evaluation_db": 90.0}
    made["stages"][1]["equivalence"] = [
        {"name": "folded", "by_design": False, **step},
        {"name": "equalized", "by_design": False, **step, "undone": ["conv"]},
        {"name": "weights corrected", "by_design": True, **step},
    ]
    made["stages"][1]["proofs"]["equalize"] |= {"change": [0.1, 0.2], "verdict": "rolled back"}
    made["stages"][1]["drop_points"] = 0.5
    layers = [
        {"name": "conv", "place": place, "sqnr_db": 30.0, "differing": differing}
        for place, differing in enumerate([0.0, 0.1])
    ]
    part = {"name": "conv", "kind": "weights", "bits": 4, "kl": 0.1}
    error = {"kl": 0.1, "sqnr_db": 20.0, "agreement": 0.9}
    both = {"fp32": {"p50": 1.0}, "int8": {"p50": 0.5}}
    runtime = {"version": "1", "accuracy": 0.9, "latency_ms": both, "load_ms": {"int8": 1.0}}
    runtime |= {"parity": {**error, "top1_agreement": 1.0, "against": "simulated"}}
    mixed = {"share": 0.5, "unit": "bits of the weights", "reached": 0.4, "images": 64}
    made |= {
        "language": "ja",
        "stage_budgets": {"ptq": None},
        "parity": made["parity"] | {"layers": layers},
        "channels": {
            "macs": [4e6, 1e6], "parameters": [2e6, 5e5], "latency_ms": [3.0, 1.5],
            "groups": [{"name": "conv", "channels": [64, 24]}],
            "fixed": {"conv": DEPENDS, "relu": "conv2 mixes its channels"},
        },
        "mixed_precision": {**mixed, "kl": 0.1, "together": 0.2, "parts": [part]},
        "sensitivity": {"images": 64, "parts": [{**part, **error}], "together": error},
        "guideline": {
            "budget": 0.5, "images": 100, "kept": "qat", "within": False, "foretold_seconds": 9.0,
            "seconds": 8.0, "steps": [
                tried("ptq", "quantize without training", "over the budget"),
                tried("sparsity_0.2", "prune 0.2 of the weights while fine-tuning", WITHIN),
                tried("latency_0.5", "remove channels until 0.5 of the latency is left", FAILED),
            ],
        },
        "throughput": [{"runtime": "onnxruntime", "threads": 1, "batch_size": 1, "int8": 9.0}],
        "runtimes": {"onnxruntime": {**runtime, "int8_layers": 1.0}},
        "conversions": {"int8": {"count": 3, "share": 0.1, "by_type": {"Reorder": 3}}},
        "preprocessing_change": {"differences": ["mean: 0 → 1"], "accuracy": 0.9, "agreement": 0.9},
        "normalization": "built in",
        "target": "onnxruntime_cpu",
        "calibration": {"images": 64, "class_gap": 0.1, "class": "Klasse",
                        "shift": 0.2, "tensor": "relu"},
    }  # fmt: skip
    made |= changes
    return made | {"checklist": checklist(made)}


def english_in(text):
    """The words in Latin letters that are no names."""
    words = re.findall(r"[A-Za-z][A-Za-z0-9_.]*[A-Za-z0-9]", text)
    return {word for word in words if len(word) > 2 and word not in NAMES}


def shown(page):
    """The text of a page, also that for people who cannot see it; without its style and command."""
    page = re.sub(r"<(style|pre)\b.*?</\1>", "", page, flags=re.DOTALL).replace("<", " <")
    attributes = re.findall(r'(?:alt|aria-label|title)="([^"]*)"', page)
    return "\n".join([Page(page).text, *attributes])


def test_the_catalogue_has_each_sentence_of_the_templates_and_the_code_and_no_other():
    used = set(LOOKED_UP)
    for path in (PACKAGE / "evidence").glob("report.*.j2"):
        found = environment().extract_translations(path.read_text(encoding="utf-8"))
        used |= {text for _, _, text in found if text is not None}  # None: a variable's
    for path in (PACKAGE / "evidence").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("say", "say.sentence"):
                used |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    assert len(used) > 150
    assert used - set(JAPANESE.sentences) == set()
    assert set(JAPANESE.sentences) - used == set()


@pytest.mark.parametrize("aims", [{"sparsity": 0.5}, {"latency": 0.5}, {"weight_bits": 4}], ids=str)
def test_the_catalogue_has_the_words_of_the_guideline(aims):
    settings = GuidelineSettings(**aims)
    for step in [*quality_steps(settings), *pruning_steps(settings)]:
        assert JAPANESE.word(step.does) != step.does
    for decision in (WITHIN, OVER, FAILED):
        assert JAPANESE.word(decision) != decision


def test_the_catalogue_has_the_words_of_the_other_rooms():
    calls = ("keep_function", "check_function", "note_change")
    steps = {
        node.args[0].value
        for path in (PACKAGE / "tricks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in calls
    }
    assert len(steps) > 10
    targets = {text for t in TARGETS.values() for text in (t.about, t.sparsity)}
    verdicts = {"kept", "rolled back", "rolled back in part", "not judged"}
    for text in {TRACED, *steps, *targets, *verdicts, *UNITS.values(), DEPENDS}:
        assert text in JAPANESE.words, text


def test_reasons_are_known_by_their_pattern():
    text = (PACKAGE / "graph" / "channel_labels.py").read_text(encoding="utf-8")
    reasons = [
        "".join(
            part.value if isinstance(part, ast.Constant) else "layer1.conv" for part in node.values
        )
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.JoinedStr)
    ]
    assert len(reasons) > 15
    for reason in reasons:
        assert "layer1.conv" in JAPANESE.word(reason)
        assert JAPANESE.word(reason) != reason, reason


@pytest.mark.parametrize("table", ["sentences", "words"])
def test_a_translation_has_the_fields_of_its_text(table):
    for english, japanese in getattr(JAPANESE, table).items():
        fields = [sorted(re.findall(r"%\(\w+\)[^a-z]*[a-z]", text)) for text in (english, japanese)]
        assert fields[0] == fields[1], english
        if table == "sentences":
            doubled = [re.sub(r"%\(|%%", "", text).count("%") for text in (english, japanese)]
            assert doubled == [0, 0], english


def test_a_sentence_that_lacks_is_an_error_and_a_word_of_somebody_elses_stays():
    with pytest.raises(LookupError, match="no such sentence"):
        JAPANESE("no such sentence")
    assert JAPANESE.word("made by my own trick") == "made by my own trick"
    assert JAPANESE.word(3) == 3
    assert ENGLISH.word("folded") == "folded"


@pytest.mark.parametrize("verdict", ["worse", "better", "no difference shown"])
def test_the_page_in_japanese_has_no_english_of_ours(verdict):
    made = everything()
    made["comparison"]["verdict"] = verdict
    page = render_page(made, {0: PICTURE})
    assert '<html lang="ja">' in page
    assert page.count("<figure aria-label") == 10
    assert english_in(shown(page)) == set()
    for text in ("同じくらい良いか", "チェックリスト", "精度、%", "確信度", "BatchNorm の畳み込み"):
        assert text in page


def test_the_test_of_the_page_finds_english():
    assert {"Checklist", "accuracy", "image"} <= english_in(
        shown(render_page(everything(language="en"), {0: PICTURE}))
    )


def test_a_page_of_what_was_not_measured_is_in_japanese_too():
    keys = ("comparison", "agreement", "parity", "size_bytes", "sparsity", "int8_coverage",
            "latency_ms", "batch_size", "threads", "memory_mib", "layers", "profile")  # fmt: skip
    made = everything(**dict.fromkeys(keys), recipe=None)
    assert english_in(shown(render_page(made, {}))) == set()
    assert shown(render_page(made, {})).count("未測定") > 5


@pytest.mark.parametrize("normalization", ["built in", "outside"])
def test_the_report_in_japanese_has_no_english_of_ours(normalization):
    text = render(everything(normalization=normalization))
    words, code, after = text.split("```")  # the preprocessing is data
    assert english_in(words + after) == set()
    assert code.startswith("json")
    assert "conv2 がチャネルを混ぜ合わせる" in text


def test_the_figures_are_the_same_in_each_language(tmp_path):
    for language in LANGUAGES:
        write_report(tmp_path / language, everything(language=language))
    english, japanese = (read_report(tmp_path / language) for language in LANGUAGES)
    assert japanese.pop("language") == "ja"
    assert english.pop("language") == "en"
    assert japanese == english
    assert english["checklist"][0]["check"] == next(iter(CHECKS))


def test_a_report_is_in_english_unless_it_says_otherwise(tmp_path):
    write_report(tmp_path, whole())
    assert read_report(tmp_path)["language"] == "en"
    assert "<h2>Stages</h2>" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", ["fr", "", "EN", None])
def test_another_language_is_refused_in_one_line(code):
    with pytest.raises(QatTricksError, match=f"^language={code} is not allowed: give en or ja$"):
        check_language(code)
