"""The site is built from docs, without a warning, and its notebooks show what they claim."""

import ast
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import pytest
from PIL import Image

import qat_tricks
from tests.helpers import ROOT

SOURCES = ("docs", "conf", "README.md")
PAGES = (
    "index",
    "start",
    "trainer",
    "recipes",
    "tricks",
    "targets",
    "know",
    "reading_the_report",
    "report",
    "checklist",
    "checklist.ja",
    "evaluation_template",
    "evaluation_template.ja",
    "troubleshooting",
    "not_supported",
    "api/names",
    "api/tricks",
)
TRICKS = sorted(path.stem for path in (ROOT / "conf" / "trick").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml"))
NOTEBOOKS = sorted(path.stem for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"))


def copied(folder):
    """A copy of what the site is made of, so that a build leaves the checkout as it is."""
    ignore = shutil.ignore_patterns("generated", "__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; the build has run the notebooks."""
    folder = tmp_path_factory.mktemp("site")
    out = folder / "build" / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(copied(folder)), str(out)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


class Page(HTMLParser):
    """What a page links to, the pictures that it shows, and the places in it."""

    def __init__(self, path):
        super().__init__()
        self.links, self.pictures, self.ids = [], {}, set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.ids.add(found["id"])
        for name in ("href", "src"):
            if found.get(name):
                self.links.append(found[name])
        if tag == "img":
            self.pictures[found["src"]] = found.get("alt")


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_the_pages_are_there(site):
    results = [f"results/{path.stem}" for path in (ROOT / "docs" / "results").glob("*.md")]
    notebooks = [f"notebooks/{name}" for name in NOTEBOOKS]
    assert len(NOTEBOOKS) >= 3
    missing = [
        name
        for name in [*PAGES, *results, *notebooks]
        if not (site / f"{name}.html").is_file() or (site / f"{name}.html").stat().st_size < 2000
    ]
    assert missing == []


def test_every_link_within_the_site_resolves(site, pages):
    broken, internal = [], 0
    for path, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            target, place = urldefrag(link)
            file = (path.parent / unquote(urlsplit(target).path)).resolve() if target else path
            internal += 1
            if file.is_dir():
                file = file / "index.html"
            known = pages.get(file)
            if not file.is_file() or (place and known and unquote(place) not in known.ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert internal > 1000
    assert broken == []


def test_each_trick_has_its_picture_and_its_settings(site, pages):
    page = pages[site / "tricks.html"]
    pictures = {}
    for trick in TRICKS:
        (source,) = [link for link in page.pictures if link.endswith(f"/{trick}.png")]
        assert page.pictures[source]  # what a reader hears who does not see it
        with Image.open(site / source) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20  # something is drawn
            pictures[trick] = picture.tobytes()
        assert trick in page.ids
    assert len(set(pictures.values())) == len(TRICKS) == len(page.pictures)


def test_a_trick_without_a_picture_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from draw_tricks import drawings
    from write_pages import tricks_page

    assert sorted(drawings()) == TRICKS
    copied(tmp_path)
    lines = dict.fromkeys(TRICKS, "What it did.")
    assert tricks_page(tmp_path, lines).count("{figure}") == len(TRICKS)
    (tmp_path / "conf" / "trick" / "new_trick.yaml").write_text("# command\n# What it does.\n")
    with pytest.raises(ValueError, match="differ in \\['new_trick'\\]"):
        tricks_page(tmp_path, lines)


def test_the_table_has_every_recipe_with_links_to_its_tricks(site, pages):
    text = (site / "recipes.html").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f">{name}<" not in text] == []
    linked = {urldefrag(link)[1] for link in pages[site / "recipes.html"].links}
    assert {"gptq", "prune-channels", "tune-ranges", "dampen-oscillations"} <= linked


def test_the_reference_has_every_public_name_and_every_trick(site, pages):
    names = {f"qat_tricks.{name}" for name in qat_tricks.__all__ if name != "__version__"}
    assert names <= pages[site / "api" / "names.html"].ids
    modules = {f"qat_tricks.tricks.{trick}.{trick}" for trick in TRICKS}
    assert modules <= pages[site / "api" / "tricks.html"].ids


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs(name):
    cells = nbformat.read(ROOT / "docs" / "notebooks" / f"{name}.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count is not None] == []


def figures_of(site, name):
    """The figures that a notebook's last code cell has shown."""
    run = site.parent / "jupyter_execute" / "notebooks" / f"{name}.ipynb"
    code = [cell for cell in nbformat.read(run, as_version=4).cells if cell.cell_type == "code"]
    return ast.literal_eval(code[-1].outputs[-1]["data"]["text/plain"])


def test_a_checkpoint_becomes_an_int8_file_that_is_as_good(site):
    figures = figures_of(site, "checkpoint_to_int8")
    assert figures["points_lost"] <= 1
    assert figures["agreement"] >= 0.99
    assert figures["same_class_in_file"] == 1
    assert 2 < figures["size_ratio"] < 4


def test_training_brings_back_what_few_bits_cost(site):
    figures = figures_of(site, "qat_in_your_trainer")
    lost = figures["float"] - figures["without_training"]
    assert lost > 0.02
    assert figures["file_after_training"] - figures["without_training"] > lost / 3
    assert figures["same_class_in_file"] >= 0.99
    assert figures["checkpoint_is_the_same"] is True


def test_the_layer_at_the_top_of_the_list_is_worth_its_bits(site):
    figures = figures_of(site, "layer_that_costs")
    assert figures["worst"] != figures["best"]
    assert figures["kl_with_worst_at_8_bits"] < figures["kl"] * 2 / 3
    assert figures["kl_with_worst_at_8_bits"] < figures["kl_with_best_at_8_bits"]


def test_what_troubleshooting_quotes_is_what_the_package_says():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    quotes = re.findall(r'"([^"]+)"', re.sub(r"`[^`]*`", "", prose))
    sources = [*(ROOT / "qat_tricks").rglob("*.py"), *(ROOT / "qat_tricks").rglob("*.j2")]
    said = "\n".join(path.read_text(encoding="utf-8") for path in [*sources, ROOT / "README.md"])
    said = " ".join(re.sub(r'"\s*\n\s*f?"', "", said).split())  # strings go over several lines
    pieces = [" ".join(piece.split()) for quote in quotes for piece in quote.split("…")]
    assert len(pieces) > 20
    assert [piece for piece in pieces if piece not in said] == []
