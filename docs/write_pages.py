"""Writes those parts of the site that come from the package: tables, pictures, sections of README.

So none of them can be out of date: a recipe, a trick, a target or a public name that is added has
its place on the site with the next build.
"""

import re
from importlib import import_module
from pathlib import Path

from draw_tricks import write_pictures

import qat_tricks
from qat_tricks.deploy.targets import TARGETS
from qat_tricks.recipes.recipe import GUIDELINE, Stage, load_recipe
from qat_tricks.settings.ranges import AUTO

SECTIONS = {
    "Install and run": "install",
    "In your own trainer": "trainer",
    "What to know": "know",
    "Not supported": "not_supported",
}


def write_pages(root: Path, folder: Path) -> None:
    """Writes all parts of pages.

    Args:
        root: of the checkout.
        folder: gets the parts; within ``docs``.
    """
    folder.mkdir(exist_ok=True)
    lines = write_pictures(folder / "tricks")
    _write(folder / "tricks.md", tricks_page(root, lines))
    _write(folder / "recipes.md", recipes_table(root))
    _write(folder / "targets.md", targets_table())
    _write(folder / "names.md", public_names())
    _write(folder / "trick_modules.md", trick_modules(root))
    for title, name in SECTIONS.items():
        _write(folder / f"{name}.md", section(root, title))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def names(root: Path, group: str) -> list[str]:
    """The YAML files of a folder of ``conf``, without their suffix."""
    return sorted(path.stem for path in (root / "conf" / group).glob("*.yaml"))


def about(root: Path, group: str, name: str) -> tuple[str, str]:
    """The two comments that a YAML of ours begins with: its command, and what it does."""
    text = (root / "conf" / group / f"{name}.yaml").read_text(encoding="utf-8")
    text = text.removeprefix("# @package _global_\n")  # which Hydra reads on the first line only
    command, what = (line.removeprefix("# ") for line in text.splitlines()[:2])
    return command, what


def tricks_page(root: Path, lines: dict[str, str]) -> str:
    """A section a trick: what it does, its picture, its settings.

    Args:
        root: of the checkout.
        lines: below the pictures, by trick.

    Raises:
        ValueError: a trick has no picture, or a picture no trick.
    """
    tricks = names(root, "trick")
    if set(tricks) != set(lines):
        raise ValueError(
            f"docs/draw_tricks.py and conf/trick differ in {sorted(set(tricks) ^ set(lines))}: "
            "each trick has a function draw_NAME there"
        )
    parts = []
    for trick in tricks:
        command, what = about(root, "trick", trick)
        settings = (root / "conf" / "trick" / f"{trick}.yaml").read_text(encoding="utf-8")
        body = "".join(settings.splitlines(keepends=True)[2:])
        parts.append(
            f"## {trick}\n\n{what} In the API: {{mod}}`qat_tricks.tricks.{trick}`.\n\n"
            f"```{{figure}} generated/tricks/{trick}.png\n:alt: {what}\n\n{lines[trick]}\n```\n\n"
            f"```bash\n{command}\n```\n```yaml\n{body}```\n"
        )
    return "\n".join(parts)


def recipes_table(root: Path) -> str:
    """A row a recipe: what it is, its stages and their tricks."""
    rows = ["| recipe | what it does | stages |", "|---|---|---|"]
    for name in names(root, "recipe"):
        _, what = about(root, "recipe", name)
        if name == GUIDELINE:
            stages = "those of the step that it keeps: [](guideline.md)"
        else:
            stages = "<br>".join(_stage_cell(stage) for stage in load_recipe(name).stages)
        rows.append(f"| `{name}` | {what} | {stages or 'none'} |")
    return "\n".join(rows) + "\n"


def _stage_cell(stage: Stage) -> str:
    tricks = ", ".join(f"[{trick.name}](tricks.md#{trick.name})" for trick in stage.tricks)
    if stage.epochs == 0:
        return f"**{stage.name}**: {tricks}"
    rate = "measured" if stage.lr == AUTO else f"{stage.lr:g}"
    return f"**{stage.name}**, {stage.epochs} epochs, learning rate {rate}: {tricks}"


def targets_table() -> str:
    """A row a target: what it is, and what it asks for."""
    rows = [
        "| target | for | activations | weight bits | SiLU and Hardswish | zeros |",
        "|---|---|---|--:|---|---|",
    ]
    for name, target in TARGETS.items():
        kinds = ", ".join(f"`{kind}`" for kind in target.activations)
        rows.append(
            f"| `{name}` | {target.about} | {kinds} | {target.max_weight_bits} "
            f"| {target.functions} | {target.sparsity} |"
        )
    return "\n".join(rows) + "\n"


def public_names() -> str:
    """The API of each name that ``import qat_tricks`` gives."""
    parts = []
    for name in qat_tricks.__all__:
        if name == "__version__":
            continue
        kind = "class" if isinstance(getattr(qat_tricks, name), type) else "function"
        members = "   :members:\n" if kind == "class" else ""
        parts.append(
            f"## {name}\n\n```{{eval-rst}}\n.. auto{kind}:: qat_tricks.{name}\n{members}```\n"
        )
    return "\n".join(parts)


def trick_modules(root: Path) -> str:
    """The API of each trick's module."""
    parts = []
    for name in names(root, "trick"):
        module = f"qat_tricks.tricks.{name}"
        assert import_module(module).__doc__
        options = "   :members:\n"
        parts.append(f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {module}\n{options}```\n")
    return "\n".join(parts)


def section(root: Path, title: str) -> str:
    """A section of the README, whose links hold from within ``docs``.

    Raises:
        ValueError: README has no such section.
    """
    text = (root / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    if found is None:
        raise ValueError(f'README.md has no section "{title}", which the site shows')
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", _link, found[1].strip()) + "\n"


def _link(match: re.Match[str]) -> str:
    """A link of the README as it is written on a page of the site."""
    text, target = match.groups()
    if target.startswith("docs/") and not target.endswith("/") and "." in target:
        return f"[{text}]({target.removeprefix('docs/')})"
    # What lies elsewhere in the checkout is no page: its path is named.
    return match[0] if ":" in target else f"`{target}`"
