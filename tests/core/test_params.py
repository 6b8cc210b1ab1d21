import contextlib
import copy
import functools
import io
import json
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import Params, load_params, parse_params
from tests.conftest import ROOT, MnistBn

TEXT = (ROOT / "params.yaml").read_text()
CONTENT: dict[str, Any] = YAML(typ="safe", pure=True).load(TEXT)


def keys(content: dict[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from keys(value, *above, key)


KEYS = [".".join(path) for path in keys(CONTENT)]
VALUES = [key for key in KEYS if not any(other.startswith(f"{key}.") for other in KEYS)]


def opened(key: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return a copy of the committed parameters, the section in it that holds a key, its name."""
    content = copy.deepcopy(CONTENT)
    *above, name = key.split(".")
    return content, functools.reduce(operator.getitem, above, content), name


def changed(key: str, value: object) -> str:
    """Return the committed parameters with one value replaced."""
    content, section, name = opened(key)
    section[name] = value
    return dumped(content)


def misspelt(key: str) -> str:
    """Return the committed parameters with an x after a key's name."""
    content, section, name = opened(key)
    section[f"{name}x"] = section.pop(name)
    return dumped(content)


def dumped(content: dict[str, Any]) -> str:
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(content, stream)
    return stream.getvalue()


def problems(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_params(text)
    first, *lines = str(caught.value).split("\n  ")
    assert first == "params.yaml is not usable:"
    return lines


def test_committed_defaults_are_the_lectures() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.train.hidden == (32, 32)
    assert params.train.lr == 0.01
    assert params.train.batch_size == 32
    assert params.train.epochs == 10


def test_dvc_sees_the_same_values() -> None:
    from dvc.utils.serialize import parse_yaml

    assert parse_yaml(TEXT, "params.yaml") == CONTENT
    seen = parse_params(TEXT).model_dump(by_alias=True, mode="json")
    assert seen == CONTENT
    assert [list(section) for section in seen.values()] == [list(s) for s in CONTENT.values()]


@pytest.mark.parametrize(
    "number", ["1e-3", "1E-3", "1.e-3", ".001", "0.001", "1.0e-3", "+1e-3", "1", "1_0.0"]
)
def test_a_number_means_the_same_to_dvc(number: str) -> None:
    from dvc.utils.serialize import parse_yaml

    text = TEXT.replace("lr: 0.01", f"lr: {number}")
    assert text != TEXT
    assert parse_params(text).train.lr == parse_yaml(text, "params.yaml")["train"]["lr"]


@pytest.mark.parametrize("lr", [1e-3, 1e-5, 3e-10, 1.0, 1])
def test_a_number_that_dvc_writes_is_read_back(lr: float) -> None:
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    content = parse_yaml_for_update(TEXT, "params.yaml")  # as `dvc exp run -S train.lr=...` does
    content["train"]["lr"] = lr
    assert parse_params(dumps_yaml(content)).train.lr == lr


@pytest.mark.parametrize("key", KEYS)
def test_missing_and_unknown_key_are_named(key: str) -> None:
    assert problems(misspelt(key)) == [
        f"{key}: missing",
        f"{key}x: unknown key; remove it or correct its name",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in VALUES
        for value in (None, {"a": 1}, True, "", -1.5)
        if (key, value) not in [("train.portable", True), ("register.signed_by", None)]
    ],
)
def test_wrong_type_is_named(key: str, value: object) -> None:
    (problem,) = problems(changed(key, value))
    assert problem.startswith(f"{key}: ")
    assert "(got " in problem


@pytest.mark.parametrize("value", [None, [], "text", 3])
@pytest.mark.parametrize("key", sorted(set(KEYS) - set(VALUES)))
def test_section_that_holds_a_value_is_named(key: str, value: object) -> None:
    assert problems(changed(key, value)) == [f"{key}: must be a section of keys (got {value!r})"]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("download.sha256.train-images", "0" * 63, "match pattern"),
        ("download.sha256.train-labels", "F" * 64, "match pattern"),
        ("prepare.valid_size", -1, "greater than or equal to 0"),
        ("prepare.valid_size", 5000.0, "valid integer"),
        ("prepare.seed", -1, "greater than or equal to 0"),
        ("prepare.seed", 2**63, "less than"),
        ("train.seed", 2**63, "less than"),
        ("train.hidden", [], "at least one usable value"),
        ("train.hidden", 32, "must be a list"),
        ("train.hidden.1", [32, 0], "greater than 0"),
        ("train.hidden.0", ["32", 32], "valid integer"),
        ("train.epochs", 0, "greater than 0"),
        ("train.epochs", "10", "valid integer"),
        ("train.batch_size", 1, "greater than or equal to 2"),
        ("train.lr", 0, "greater than 0"),
        ("train.lr", -0.01, "greater than 0"),
        ("train.lr", "0.01", "valid number"),
        ("train.lr", float("nan"), "finite number"),
        ("train.lr", float("inf"), "finite number"),
        ("train.bn_momentum", 0, "greater than 0"),
        ("train.bn_momentum", 1.01, "less than or equal to 1"),
        ("train.bn_eps", 0, "greater than 0"),
        ("train.device", "gpu", "match pattern"),
        ("train.device", "cuda:", "match pattern"),
        ("train.device", "cuda:-1", "match pattern"),
        ("train.device", "cuda:01", "match pattern"),  # torch refuses it
        ("train.device", "cuda:128", "match pattern"),  # torch takes it for cuda:-128
        ("train.device", "cuda:\u0663", "match pattern"),  # a digit, to Unicode
        ("train.device", "cpu\n", "match pattern"),
        ("evaluate.batch_size", 0, "greater than 0"),
        ("evaluate.batch_size", 2**31, "less than"),
        ("evaluate.calibration_bins", 0, "greater than 0"),
        ("evaluate.calibration_bins", 10_001, "less than or equal to 10000"),
        ("export.opset", 17, "greater than or equal to 18"),
        ("export.opset", 24, "less than or equal to 23"),
        ("register.min_accuracy", 1.001, "less than or equal to 1"),
        ("register.min_accuracy", "0.9", "valid number"),
        ("register.min_accuracy", float("nan"), "finite number"),
        ("register.alpha", 0, "greater than 0"),
        ("register.alpha", 1, "less than 1"),
        ("register.signed_by", 1, "valid string"),
        ("register.signed_by", "", "at least 1 character"),
        ("sync.experiment", "", "at least 1 character"),
    ],
)
def test_impossible_value_is_named(key: str, value: object, reason: str) -> None:
    (problem,) = problems(changed(re.sub(r"\.\d$", "", key), value))
    assert problem.startswith(f"{key}: ")
    assert reason in problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prepare.valid_size", 0),
        ("train.seed", 2**63 - 1),
        ("train.hidden", [1]),
        ("train.hidden", [8, 8, 8]),
        ("train.batch_size", 2),
        ("train.bn_momentum", 1),
        ("train.device", "cpu"),
        ("train.device", "cuda"),
        ("train.device", "cuda:0"),
        ("train.device", "cuda:10"),
        ("export.opset", 18),
        ("export.opset", 23),
        ("register.min_accuracy", 0),
        ("register.min_accuracy", 1),
        ("register.signed_by", "release.pub"),
    ],
)
def test_value_at_the_edge_is_accepted(key: str, value: object) -> None:
    section, name = key.split(".")
    parsed = parse_params(changed(key, value)).model_dump(by_alias=True, mode="json")
    assert parsed[section][name] == value


def test_all_problems_are_named_at_once() -> None:
    text = TEXT.replace("lr: 0.01", "lr: -1").replace("epochs:", "epoch:")
    assert [problem.partition(":")[0] for problem in problems(text)] == [
        "train.epochs",
        "train.lr",
        "train.epoch",
    ]


def test_duplicated_key_is_refused() -> None:
    with pytest.raises(UserError, match=r'not valid YAML: .*\n.*\n.*duplicate key "lr"'):
        parse_params(TEXT.replace("lr: 0.01", "lr: 0.01\n  lr: 0.02"))


def test_params_cannot_be_changed() -> None:
    params = parse_params(TEXT)
    with pytest.raises(ValidationError, match="frozen"):
        params.train.lr = 1.0  # type: ignore[misc]


def parses_or_is_the_users_mistake(text: str) -> None:
    with contextlib.suppress(UserError):
        assert isinstance(parse_params(text), Params)


YAML_PIECES = [
    *(
        "!!bool ",
        "!!int ",
        "!!float ",
        "!!binary ",
        "!!timestamp ",
        "!!set ",
        "!!omap ",
        "!x ",
        "!",
    ),
    *("&a ", "*a", "<<: ", "? ", ": ", "- ", "[", "]", "{", "}", ", ", "|", ">", "'", '"', "#"),
    *("\n", "\n  ", "\t", "---", "%YAML 1.1", "0x", "0o", "1", ".", "e5", "~", "2001-01-01", "\0"),
    *("train:", "lr:", "hidden:"),
]


@given(st.text() | st.lists(st.sampled_from(YAML_PIECES), max_size=12).map("".join))
@example("!!bool x")  # a KeyError in ruamel.yaml
@example('!!float ""')  # an IndexError
@example("? - ? ")  # a TypeError
@example("[" * 1000)  # a RecursionError
@example("&a [*a]")
@example("train: &a [*a]")
@example("")
def test_any_text_is_parsed_or_refused(text: str) -> None:
    parses_or_is_the_users_mistake(text)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(KEYS), JSON_VALUES)
def test_any_value_of_any_key_is_accepted_or_refused(key: str, value: object) -> None:
    content, section, name = opened(key)
    section[name] = value
    parses_or_is_the_users_mistake(json.dumps(content))


def test_missing_file_says_where_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mnist_bn: MnistBn
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mnist_bn("prepare")
    assert done.status == 2
    assert done.err == (
        f"error: no params.yaml in {tmp_path}; run this in the folder that holds dvc.yaml\n"
    )


@pytest.mark.parametrize("kind", ["folder", "latin1"])
def test_unreadable_file_is_the_users_mistake(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "params.yaml"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(TEXT.replace("auto", "caf\xe9").encode("latin1"))
    with pytest.raises(UserError, match="cannot be read"):
        load_params(path)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [("lr: 0.01", "lr: fast", "train.lr"), ("train:", "train: [", "not valid YAML")],
)
def test_command_names_the_mistake_without_a_traceback(
    project: Path, mnist_bn: MnistBn, old: str, new: str, named: str
) -> None:
    (project / "params.yaml").write_text(TEXT.replace(old, new, 1))
    done = mnist_bn("prepare")
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("error: params.yaml ")
    assert named in done.err
    assert "Traceback" not in done.err
