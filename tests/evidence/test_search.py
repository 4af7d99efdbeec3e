"""The result of a search: which jobs are on the front of its objectives, and which failed."""

import json

from qat_tricks.evidence.comparison import comparison_rows
from qat_tricks.evidence.report import write_report
from qat_tricks.evidence.search import search_text, trials, write_search
from qat_tricks.files import write_json
from tests.helpers.samples import report

OBJECTIVES = ["accuracy", "latency"]


def make_search(folder):
    """Four jobs whose test accuracy would choose otherwise, and one that has failed."""
    jobs = [(0.90, 1.0, 0.5), (0.80, 0.5, 0.9), (0.85, 1.2, 0.99), (0.80, 0.5, 0.6)]
    for number, (validated, scale, tested) in enumerate(jobs):
        write_report(
            folder / f"{number}_int8_ptq",
            report(scale=scale, accuracy=tested, validation={"images": 270, "accuracy": validated}),
        )
    write_json(folder / "4_int8_ptq" / "error.json", {"error": "lost too much"})
    return trials(folder, comparison_rows(folder), OBJECTIVES)


def test_validation_images_choose_and_not_test_images(tmp_path):
    found = make_search(tmp_path)
    assert [trial.on_front for trial in found] == [True, True, False, True, False]
    assert found[0].values == {"accuracy": 0.9, "latency": 0.6}
    assert found[4].values is None
    assert len({trial.name for trial in found}) == 5


def test_a_single_objective_has_one_best_job(tmp_path):
    make_search(tmp_path)
    best = [trial.on_front for trial in trials(tmp_path, comparison_rows(tmp_path), ["accuracy"])]
    assert best == [True, False, False, False, False]


def test_the_front_is_named_with_its_figures_and_written(tmp_path):
    found = make_search(tmp_path)
    title, *lines = search_text(found, OBJECTIVES).splitlines()
    assert title.startswith("Pareto front, 3 of 5 jobs (1 failed), by accuracy (maximize: ")
    assert "validation images" in title
    assert [line.partition(":")[0].strip() for line in lines] == [
        trial.job for trial in found if trial.on_front
    ]
    assert lines[0].startswith("  0_int8_ptq: 90.00%, 0.600 ms: ")
    written = json.loads(write_search(tmp_path, found, OBJECTIVES).read_text())
    assert written["objectives"] == {"accuracy": "maximize", "latency": "minimize"}
    assert [job["on_front"] for job in written["jobs"]] == [True, True, False, True, False]
    assert written["jobs"][4]["values"] is None


def test_a_job_whose_report_was_damaged_since_has_failed(tmp_path):
    make_search(tmp_path)
    rows = comparison_rows(tmp_path)
    (tmp_path / "0_int8_ptq" / "report.json").write_text("{")
    assert trials(tmp_path, rows, OBJECTIVES)[0].values is None
