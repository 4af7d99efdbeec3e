"""Settings bound to what takes them: keys, types, and the words of the error."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.settings.binding import Problems, bind, make


def _of(hint):
    def target(x):
        pass

    target.__annotations__["x"] = hint
    return target


@pytest.mark.parametrize(
    ("hint", "fits", "refused", "words"),
    [
        (int, [3], [3.0, True, "3", None], "a whole number"),
        (float, [3, 0.5], [False, "0.5"], "a number"),
        (bool, [True], [1, 0, None], "true or false"),
        (str | None, ["x", None], [3, True], "text or null"),
        (int | Sequence[int] | None, [3, [1, 2], None], [[1.5], "12"], "a whole number or a list"),
        (list[str], [[], ["x"], ("x",)], ["x", ["x", 3]], "a list of text"),
        (list, [[1, "x"]], [{}], "a list"),
        (Mapping[str, int], [{}, {"a": 1}], [{"a": "b"}, [1]], "keys with values"),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0], "a or 1"),
        (Any, [None, 3, {}], [], ""),
        ("Unknown", [3, "x"], [], ""),
    ],
    ids=str,
)
def test_values_fit_the_annotation(hint, fits, refused, words):
    for value in fits:
        assert bind("here", _of(hint), {"x": value}) == []
    for value in refused:
        (told,) = bind("here", _of(hint), {"x": value})
        assert told.startswith(f"here.x={value!r} is not allowed: give {words}")


def test_unknown_and_missing_keys_are_told_together():
    def target(path, *, size: int = 3, **rest):
        pass

    told = bind("here", target, {"sise": 1, "hidden": 2}, without=("hidden",))
    assert told == [
        'here has no setting "sise": did you mean "size"?',
        'here has no setting "hidden": allowed: path, size',
        'here lacks "path"',
    ]


def test_make_calls_what_binds_and_names_the_place_of_a_refusal():
    def halved(x: int) -> float:
        if x < 0:
            raise QatTricksError(f"x={x}: give 0 or more")
        return x / 2

    assert make("here", halved, {"x": 3}) == 1.5
    with pytest.raises(QatTricksError, match=r"^here: x=-1"):
        make("here", halved, {"x": -1})
    with pytest.raises(QatTricksError, match=r"^here\.x='a' is not allowed"):
        make("here", halved, {"x": "a"})


def test_problems_are_told_once_each():
    def fail(text):
        raise QatTricksError(text)

    problems = Problems()
    problems.report()
    assert problems.of(lambda: 3) == 3
    for text in ("one", "two", "one"):
        assert problems.of(lambda text=text: fail(text)) is None
    with pytest.raises(QatTricksError, match=r"^one; two$"):
        problems.report()
