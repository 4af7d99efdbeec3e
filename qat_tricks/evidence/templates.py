"""Fills in the templates of this folder: Markdown as it is, HTML with its text escaped."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from qat_tricks.evidence.show import show


def fill_in(template: str, fields: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """Returns a template with its fields.

    Args:
        template: a file of this folder; one of HTML ends with ``.html.j2``.
        fields: every name that the template may ask for.
        filters: of the template, beside ``show``.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(show=show, **filters)
    return templates.get_template(template).render(fields)
