"""Options as text: in TOML, and those of an objective."""

import tomllib
from inspect import signature

import pytest

from geomkd import distill, score_layers
from geomkd.cli.config import as_toml
from geomkd.cli.distill import objective_of
from geomkd.cli.parser import options_of, parsed
from geomkd.distillation.rivals import OBJECTIVES


def with_config(text, *options):
    with open("run.toml", "w", encoding="utf-8") as file:
        file.write(text)
    return parsed(["distill", "--config", "run.toml", *options])


def test_a_config_takes_every_kind_of_option(here):
    found = with_config(
        """
        teacher-weights = "a file.pth"
        batch_size = 32
        lr = 1e-05
        mean = [0.5, -0.25]
        layers = "even"
        compile = true
        quiet = true
        resume = false
        set = {normalize = "channel", detaches_head = false}
        """,
        "--no-quiet",
    )
    assert found.teacher_weights == str(here / "a file.pth")
    assert (found.batch_size, found.lr, found.mean) == (32, 1e-5, [0.5, -0.25])
    assert (found.layers, found.set) == (["even"], ["normalize=channel", "detaches_head=false"])
    assert (found.compile, found.quiet, found.resume) == (True, False, False)


def test_pairs_on_the_command_line_are_in_place_of_the_layers_of_a_config(here):
    found = with_config("layers = ['auto']", "--pairs", "block2:block1")
    assert (found.layers, found.pairs) == (None, ["block2:block1"])
    found = with_config("pairs = ['block2:block1']", "--layers", "last")
    assert (found.layers, found.pairs) == (["last"], None)
    assert with_config("pairs = ['block2:block1']").pairs == ["block2:block1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epocs = 3", "there is no option 'epocs'; near it are epochs"),
        ("zzz = 3", "there is no option 'zzz'; there are teacher, "),
        ("config = 'a'", "there is no option 'config'"),
        ("batch-size = 3\nbatch_size = 4", "'batch-size' is there more than once"),
        ("epochs = 2.5", "invalid int value: '2.5'"),
        ("epochs = [3]", r"run.toml: epochs must be text or a number; got \[3\]"),
        ("compile = 'yes'", "run.toml: compile must be true or false; got 'yes'"),
        ("lr = ", "run.toml is no TOML file"),
    ],
)
def test_a_config_is_checked(here, text, message):
    with pytest.raises(ValueError, match=message):
        with_config(text)


def test_toml_that_is_written_says_the_same_when_it_is_read():
    names = ['a"b\\c', "tab\t, line\n, bell\x07, delete\x7f", "ö 層 😀"]
    settings = {"layers": names, "lr": 1e-30, "k": 3, "cache": False, "mean": [0.1, -2.0]}
    assert tomllib.loads(as_toml(settings)) == settings


@pytest.mark.parametrize(
    ("command", "function"),
    [(["distill"], distill), (["score", "--model=a", "--data=b"], score_layers)],
)
def test_defaults_are_those_of_the_function(command, function):
    found, parameters = options_of(function, parsed(command)), signature(function).parameters
    for own in {"model", "data", "resume"} & set(found):  # given, or with a meaning of its own
        del found[own]
    assert found == {name: parameters[name].default for name in found}
    assert len(found) > 5 and {"seed", "memory" if function is score_layers else "lr"} <= set(found)


# ---- objectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_goes_by_its_name(name):
    assert objective_of(name) == OBJECTIVES[name]()


def test_values_are_read_by_the_type_of_their_field():
    found = objective_of("feature_kd", ["all_pairs=true", "temperature=2"])
    assert found == OBJECTIVES["feature_kd"](all_pairs=True, temperature=2.0)
    for name, text, message in [
        ("feature_kd", "all_pairs=1", "all_pairs must be true or false; got '1'"),
        ("kd", "temperature=warm", "temperature must be a finite number; got 'warm'"),
        ("kd", "kd_weight=nan", "kd_weight must be a finite number; got 'nan'"),
        ("kd", "temperature=0", "temperature must be finite and above 0"),
        ("kd", "temperature", "--set takes NAME=VALUE; got 'temperature'"),
        ("ce", "weight=1", "objective 'ce' has no options; got 'weight'"),
    ]:
        with pytest.raises(ValueError, match=message):
            objective_of(name, [text])
    with pytest.raises(ValueError, match="temperature is there more than once"):
        objective_of("kd", ["temperature=1", "temperature=2"])
