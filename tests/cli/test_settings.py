"""Settings: one dataclass, a TOML file and flags that say the same, and errors that help."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from lora_jax.cli import settings
from lora_jax.cli.settings import Section

pytestmark = pytest.mark.once


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run.

    Attributes:
      model: what.
      limit: how much,
        in tokens.
      out: where to.
    """

    model: str
    limit: int | None = None
    out: Path = Path("here")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A tuning.

    Attributes:
      rank: a rank.
      rate: 5% of something.
      fast: quickly.
      targets: names.
      ranks: by name.
      layers: some.
      rows: of one table, or by name.
      speed: how fast; None leaves it open.
      packed: on, off or as it pays.
      names: of somebody.
      hidden: not a setting.
    """

    rank: int = 8
    rate: float = 0.1
    fast: bool = True
    targets: tuple[str, ...] | str = "all-linear"
    ranks: Mapping[str, int] = field(default_factory=dict)
    layers: int | tuple[int, ...] | None = None
    rows: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    speed: Literal["slow", "fast"] | None = None
    packed: Literal["auto"] | bool = False
    names: Sequence[str] | str = ()
    hidden: int = 0


RUN = Section("", Run)
TUNING = Section("tuning", Tuning, frozenset({"hidden"}))
OPTIONS = settings.options([RUN, TUNING])


def from_flags(line: str) -> settings.Values:
    parser = argparse.ArgumentParser()
    settings.add_flags(parser, OPTIONS)
    return settings.from_flags(parser.parse_args(line.split()), OPTIONS)


def from_toml(tmp_path: Path, text: str) -> settings.Values:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return settings.from_toml(path, OPTIONS)


def test_each_field_is_one_option_with_the_docstrings_text():
    assert [o.key for o in OPTIONS] == [
        "model", "limit", "out",
        "tuning.rank", "tuning.rate", "tuning.fast", "tuning.targets", "tuning.ranks",
        "tuning.layers", "tuning.rows", "tuning.speed", "tuning.packed", "tuning.names",
    ]  # fmt: skip
    assert OPTIONS[1].help == "how much, in tokens."
    assert OPTIONS[3].flag == "--rank"


def test_an_undescribed_field_is_refused():
    @dataclass
    class Bare:
        """Nothing said."""

        rank: int = 1

    with pytest.raises(ValueError, match="docstring of Bare does not describe rank"):
        settings.options([Section("", Bare)])


def test_two_sections_may_not_share_a_flag():
    with pytest.raises(ValueError, match="share the settings limit, model, out"):
        settings.options([RUN, Section("again", Run)])


@pytest.mark.parametrize(
    ("flags", "toml", "expected"),
    [
        ("--model m", 'model = "m"', {("", "model"): "m"}),
        ("--limit 3", "limit = 3", {("", "limit"): 3}),
        ("--out a/b", 'out = "a/b"', {("", "out"): Path("a/b")}),
        ("--rate 1e-3", "[tuning]\nrate = 1e-3", {("tuning", "rate"): 1e-3}),
        ("--no-fast", "[tuning]\nfast = false", {("tuning", "fast"): False}),
        ("--fast", "[tuning]\nfast = true", {("tuning", "fast"): True}),
        (
            "--targets q_proj v_proj",
            '[tuning]\ntargets = ["q_proj", "v_proj"]',
            {("tuning", "targets"): ("q_proj", "v_proj")},
        ),
        (
            "--targets q_proj",
            '[tuning]\ntargets = ["q_proj"]',
            {("tuning", "targets"): ("q_proj",)},
        ),
        (
            "--targets all-linear",
            '[tuning]\ntargets = "all-linear"',
            {("tuning", "targets"): "all-linear"},
        ),
        (
            r"--targets .*\.(q|v)_proj",
            r"tuning.targets = '.*\.(q|v)_proj'",
            {("tuning", "targets"): r".*\.(q|v)_proj"},
        ),
        (
            "--ranks down_proj=16 up=4",
            "[tuning]\nranks = {down_proj = 16, up = 4}",
            {("tuning", "ranks"): {"down_proj": 16, "up": 4}},
        ),
        (
            "--ranks a=1,b=2 c=3",
            "tuning.ranks = {a = 1, b = 2, c = 3}",
            {("tuning", "ranks"): {"a": 1, "b": 2, "c": 3}},
        ),
        ("--speed fast", "tuning.speed = 'fast'", {("tuning", "speed"): "fast"}),
        ("--packed", "tuning.packed = true", {("tuning", "packed"): True}),
        ("--packed false", "tuning.packed = false", {("tuning", "packed"): False}),
        ("--packed auto", "tuning.packed = 'auto'", {("tuning", "packed"): "auto"}),
        ("--names a b", "tuning.names = ['a', 'b']", {("tuning", "names"): ("a", "b")}),
        ("--names a|b", "tuning.names = 'a|b'", {("tuning", "names"): "a|b"}),
        ("--layers 4", "tuning.layers = 4", {("tuning", "layers"): 4}),
        ("--rows 4 5", "tuning.rows = [4, 5]", {("tuning", "rows"): (4, 5)}),
        (
            "--rows wte=4,5 lm_head=2",
            "[tuning]\nrows = {wte = [4, 5], lm_head = [2]}",
            {("tuning", "rows"): {"wte": (4, 5), "lm_head": (2,)}},
        ),
        ("--layers 4 5", "tuning.layers = [4, 5]", {("tuning", "layers"): (4, 5)}),
        ("--ranks (?=a)b=3", "tuning.ranks = {'(?=a)b' = 3}", {("tuning", "ranks"): {"(?=a)b": 3}}),
        # The setting is a text and cannot be none.
        ("--model none", "model = 'none'", {("", "model"): "none"}),
    ],
)
def test_flags_and_file_say_the_same(tmp_path, flags, toml, expected):
    assert from_flags(flags) == expected
    assert from_toml(tmp_path, toml) == expected


def test_a_flag_can_say_none():
    assert from_flags("--limit none --layers none --speed none") == {
        ("", "limit"): None,
        ("tuning", "layers"): None,
        ("tuning", "speed"): None,
    }


def test_what_nobody_says_keeps_its_default(tmp_path):
    values = from_toml(tmp_path, 'model = "m"\n[tuning]\nrank = 4\nrate = 1') | from_flags(
        "--rank 2"
    )
    assert settings.build(RUN, values) == Run(model="m")
    assert settings.build(TUNING, values) == Tuning(rank=2, rate=1)


def test_a_setting_without_default_must_be_given():
    with pytest.raises(ValueError, match="`model` is missing: give --model"):
        settings.build(RUN, {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rank three", "--rank expects an integer, got `three`"),
        ("--rank 1.5", "--rank expects an integer, got `1.5`"),
        ("--rate quick", "--rate expects a number, got `quick`"),
        (
            "--ranks down_proj",
            "--ranks expects NAME=VALUE pairs whose VALUE is an integer, each NAME once, got `do",
        ),
        ("--ranks q=1,q=2", "each NAME once, got `q=1,q=2`"),
        ("--speed fats", "--speed expects one of slow, fast"),
        ("--packed on", "--packed expects one of auto or true or false, got `on`"),
        ("--targets q_proj,v_proj", "list with spaces, got `q_proj,v_proj`: write --targets q_pr"),
        ("--rows 4,5", "write --rows 4 5"),
        ("--layers a", "--layers expects an integer or a list, each an integer or"),
    ],
)
def test_a_flag_of_another_type_is_an_error(flags, message):
    with pytest.raises(ValueError, match=message):
        from_flags(flags)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("modle = 'm'", r"run.toml: there is no setting `modle`; the nearest are `model`"),
        ("[tuning]\nrnak = 3", r"no setting `tuning.rnak`; the nearest are `tuning.rank"),
        ("[tunign]\nrank = 3", r"there is no table \[tunign\]; the tables are \[tuning\]"),
        ("rank = 3", r"there is no setting `rank`: it is tuning.rank here"),
        ("lora_rank = 3", r"there is no setting `lora_rank`: it is tuning.rank here"),
        ("license = 3", r"there is no setting `license`, and none is like it"),
        ("tuning = 3", r"`tuning` must be a table, written \[tuning\], got 3"),
        ("limit = '3'", r"`limit` expects an integer or \"none\", got \"3\""),
        ("limit = true", r"`limit` expects an integer or \"none\", got true"),
        ("tuning.fast = 1", r"`tuning.fast` expects true or false, got 1"),
        (
            "tuning.targets = [1]",
            r"`tuning.targets` expects a list, each a text or a text, got \[1\]",
        ),
        (
            "tuning.speed = 'fats'",
            r"`tuning.speed` expects one of slow, fast or \"none\", got \"fats\"",
        ),
        ("limit = ", r"run.toml: not a TOML file: Invalid value"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(tmp_path, toml, message):
    with pytest.raises(ValueError, match=message):
        from_toml(tmp_path, toml)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.toml: no such config file"):
        settings.from_toml(tmp_path / "no.toml", OPTIONS)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="x.toml: not a TOML file"):
        settings.from_toml(tmp_path / "x.toml", OPTIONS)
