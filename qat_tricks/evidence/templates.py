"""Fills in the templates of this folder: Markdown as it is, HTML with its text escaped.

Their sentences are marked for translation, as jinja2's own extension has it: ``_("…")``, and
``{% trans %}…{% endtrans %}`` where they have fields.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from qat_tricks.evidence.language import Language


def fill_in(
    template: str, fields: Mapping[str, Any], say: Language, **filters: Callable[..., Any]
) -> str:
    """Returns a template with its fields.

    Args:
        template: a file of this folder; one of HTML ends with ``.html.j2``.
        fields: every name that the template may ask for.
        say: the language to fill it in.
        filters: of the template, beside ``show`` and ``word``.
    """
    templates = environment()
    templates.install_gettext_callables(  # type: ignore[attr-defined]
        say.sentence, lambda one, several, count: say.sentence(several), newstyle=True
    )
    templates.filters.update(show=say.show, word=say.word, **filters)
    return templates.get_template(template).render(fields)


def environment() -> Environment:
    """Returns what reads the templates, without a language."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=["jinja2.ext.i18n"],
    )
    templates.policies["ext.i18n.trimmed"] = True  # a sentence may take several lines
    return templates
