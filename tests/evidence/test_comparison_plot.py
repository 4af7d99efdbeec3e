"""The picture of a sweep: each network once, and labels that can be read."""

from itertools import pairwise

from matplotlib import image
from matplotlib.text import Text

from qat_tricks.evidence import comparison_plot
from qat_tricks.evidence.comparison import write_comparison
from qat_tricks.evidence.report import write_report
from tests.helpers.samples import report


def test_the_picture_labels_every_network_once_and_no_label_covers_another(sweep, monkeypatch):
    figures = []
    monkeypatch.setattr(
        comparison_plot, "FigureCanvasAgg", _keeping(figures, comparison_plot.FigureCanvasAgg)
    )
    for job in range(20, 34):  # many that are alike
        write_report(sweep / str(job), report("w4a4_qat", accuracy=1.0))
    write_comparison(sweep)
    assert image.imread(sweep / "comparison.png").ndim == 3
    figures[0].draw_without_rendering()
    for axes in figures[0].axes:
        assert axes.get_ylim()[1] <= 100
        labels = [text for text in axes.texts if text.get_text()]
        names = [text.get_text() for text in labels]
        assert len(set(names)) == len(names) == 3 + 14 + 1
        assert "float" in names
        boxes = sorted((Text.get_window_extent(text) for text in labels), key=lambda box: box.y0)
        tops = [(lower.y1, upper.y0) for lower, upper in pairwise(boxes)]
        assert all(top <= bottom + 1 for top, bottom in tops)


def _keeping(figures, canvas):
    def make(figure):
        figures.append(figure)
        return canvas(figure)

    return make
