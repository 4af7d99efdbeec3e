"""Old names of settings work, and one warning names the new one."""

import pytest

from qat_tricks.cli import main as cli
from qat_tricks.errors import QatTricksError
from qat_tricks.recipes.recipe import build_recipe, load_recipe
from qat_tricks.settings import renamed
from qat_tricks.settings.renamed import RENAMED, rename_keys, rename_overrides
from tests.helpers.configs import composed


@pytest.fixture(autouse=True)
def _not_warned_yet():
    renamed._warn.cache_clear()


def warning(old):
    return (
        f"warning: the setting {old} is now called {RENAMED[old]}; "
        "the old name works in this release only\n"
    )


@pytest.mark.parametrize("old", RENAMED)
def test_the_shipped_configs_have_the_new_names_only(old):
    config = composed("recipe=int8_ptq")
    group, _, key = old.rpartition(".")
    assert key not in (config[group] if group else config)
    composed(f"{RENAMED[old]}={[] if group else 'true'}")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("preflight=true", "++forecast=true"),
        ("+preflight=true", "+forecast=true"),
        ("~preflight", "~forecast"),
        ("recipe.whole=[a=b]", "++recipe.untraced=[a=b]"),
        ("recipe.whole=[a],[b]", "++recipe.untraced=[a],[b]"),
        ("recipe.wholesale=1", "recipe.wholesale=1"),
        ("seed=3", "seed=3"),
    ],
)
def test_overrides_get_the_new_name(override, expected, capsys):
    assert rename_overrides([override, override]) == [expected, expected]
    old = override.lstrip("+~").partition("=")[0]
    assert capsys.readouterr().err == (warning(old) if old in RENAMED else "")


def test_the_old_flag_forecasts(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    network = ["model=custom", "model.factory=tests.helpers.nets.SmallNet", "data=fake"]
    cli.train(["recipe=int8_ptq", "preflight=true", *network])
    printed = capfd.readouterr()
    assert "100.00% of the " in printed.out
    assert printed.err == warning("preflight")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("override", ["whole=[conv]", "recipe.whole=[conv]"])
def test_an_override_of_a_recipe_may_have_the_old_name(override, capsys):
    assert load_recipe("int8_ptq", [override]).untraced == ("conv",)
    assert capsys.readouterr().err == warning("recipe.whole")


def test_a_recipe_of_ones_own_may_have_the_old_name(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe").mkdir()
    text = "defaults: [int8_ptq, _self_]\nname: mine\nwhole: [block]\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    network = ["model=custom", "model.factory=tests.helpers.nets.SmallNet", "data=fake"]
    mine = ["--config-dir", ".", "recipe=mine", *network]
    cli.train([*mine, "forecast=true"])
    printed = capfd.readouterr()
    assert "block" in printed.out
    assert printed.err == warning("recipe.whole")  # once, though the recipe is built twice

    with pytest.raises(SystemExit):
        cli.train([*mine, "forecast=true", "recipe.whole=[fc]"])
    assert "two values of one setting" in capfd.readouterr().err


def test_keys_of_a_file_get_the_new_name_where_they_belong(capsys):
    assert rename_keys("recipe", {"whole": ["a"], "untraced": []}) == {"untraced": ["a"]}
    assert rename_keys("recipe", {"whole": [], "untraced": ["a"]}) == {"untraced": ["a"]}
    assert rename_keys("recipe", {"preflight": 1}) == {"preflight": 1}  # of the top level
    assert capsys.readouterr().err == warning("recipe.whole")
    with pytest.raises(QatTricksError, match=r"leave out recipe\.whole"):
        rename_keys("recipe", {"whole": ["a"], "untraced": ["b"]})
    with pytest.raises(QatTricksError, match=r"recipe\.untraced=3 is not allowed"):
        build_recipe({"name": "mine", "whole": 3})


def test_only_the_first_process_warns(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    rename_overrides(["preflight=true"])
    assert capsys.readouterr().err == ""


def test_a_setting_under_both_names_is_refused():
    with pytest.raises(QatTricksError, match=r"recipe\.whole and recipe\.untraced are one setting"):
        load_recipe("int8_ptq", ["whole=[a]", "untraced=[b]"])
