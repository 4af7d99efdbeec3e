"""The language of a report: each sentence is called by its English text.

A catalogue such as ``ja.toml`` has two tables. ``sentences`` are those of the templates and of this
folder's code. One that lacks is an error, and a test finds it before a user does. ``words`` are
texts that the rest of the package has put into a report, such as the name of a step or why channels
stay. A trick of the user's may bring others, which stay as they are.

Sentences have fields as in ``"%(count)s images"``, and a percent sign is doubled, as
jinja2's extension for translations has it.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qat_tricks.errors import QatTricksError
from qat_tricks.evidence.show import show

LANGUAGES = ("en", "ja")


@dataclass(frozen=True, kw_only=True)
class Language:
    """The texts of a language, by the English ones; None: they are English."""

    code: str  # as of HTML's ``lang``
    sentences: Mapping[str, str] | None = None
    words: Mapping[str, str] | None = None

    def __call__(self, text: str, **fields: Any) -> str:
        """Returns a sentence with its fields."""
        return self.sentence(text) % fields

    def sentence(self, text: str) -> str:
        """Returns a sentence without its fields.

        Raises:
            LookupError: the catalogue lacks it.
        """
        if self.sentences is None:
            return text
        if text not in self.sentences:
            raise LookupError(f'{self.code}.toml has no sentence "{text}"')
        return self.sentences[text]

    def word(self, text: Any) -> Any:
        """Returns a text of another part of the package; one that is not known stays as it is."""
        if self.words is None or not isinstance(text, str):
            return text
        if text in self.words:
            return self.words[text]
        for english, own in self.words.items():
            found = re.fullmatch(_pattern(english), text) if "%(" in english else None
            if found:
                return own % found.groupdict()
        return text

    def show(self, value: float | None, unit: str, none: str | None = None) -> str:
        """Returns a figure with its unit, or ``none``: by default, that it was not measured."""
        return show(value, unit, none=self("not measured") if none is None else none)


ENGLISH = Language(code="en")


@cache
def language_named(code: str) -> Language:
    """Returns the language of a code.

    Raises:
        QatTricksError: there is none of it.
    """
    check_language(code)
    if code == ENGLISH.code:
        return ENGLISH
    path = Path(__file__).with_name(f"{code}.toml")
    return Language(code=code, **tomllib.loads(path.read_text(encoding="utf-8")))


def check_language(code: Any) -> None:
    """Raises QatTricksError unless reports are written in the language ``code``."""
    if code not in LANGUAGES:
        raise QatTricksError(f"language={code} is not allowed: give {' or '.join(LANGUAGES)}")


@cache
def _pattern(text: str) -> str:
    """A regular expression of the texts that a text with fields may become."""
    parts = re.split(r"%\((\w+)\)s", text)
    return "".join(
        f"(?P<{part}>.+)" if place % 2 else re.escape(part) for place, part in enumerate(parts)
    )
