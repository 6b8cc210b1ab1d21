"""What a file must show to be served: the gate's word for its bytes, and its golden outputs."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import MODELS, PARITY, SERVED
from mnist_batchnorm.serve.core import models
from mnist_batchnorm.serve.core.catalog import Catalog
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.models import Model
from tests.support.serving import NETWORK, lay


def load(name: str = "mnist-bn", *, allow_unverified: bool = False) -> Model:
    return models.load(name, MODELS / SERVED[name], PARITY, allow_unverified=allow_unverified)


def edit(change: Callable[[dict[str, Any]], object]) -> None:
    report = json.loads(PARITY.read_text())
    change(report)
    PARITY.write_text(json.dumps(report))


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laid")
    lay(folder)
    return folder


@pytest.fixture(autouse=True)
def folder(laid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copytree(laid, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("pixels", "classes", "says"),
    [(784, 7, r"float32 \[1, 7\] for one image, expected float32 \[1, 10\]"), (28, 10, "run on")],
)
def test_another_interface_is_no_risk_that_one_can_take(
    pixels: int, classes: int, says: str
) -> None:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("image", pixels), ("logits", classes))
    ]
    weights = numpy_helper.from_array(np.ones((pixels, classes), np.float32), "weights")
    node = helper.make_node("MatMul", ["image", "weights"], ["logits"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weights])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, ir_version=9, opset_imports=opset), "other.onnx")

    with pytest.raises(UserError, match=says):
        models.load("other", Path("other.onnx"), PARITY, allow_unverified=True)


@dataclass
class Given:
    """A source of whatever the test puts there."""

    model: Model
    name: str = "digits"

    def state(self) -> tuple[object, ...]:
        return self.model.identity

    def load(self) -> Model:
        return self.model


def test_no_file_hides_another_of_its_version() -> None:
    first, second = (
        replace(load(name), name="digits", version="1") for name in ("mnist-bn", "mnist-bn-folded")
    )
    with pytest.raises(CheckFailedError, match="digits has two files of version 1"):
        Catalog([Given(first), Given(second)], Metrics()).load()
    Catalog([Given(first), Given(first)], Metrics()).load()

    source = Given(replace(second, version="2"))
    catalog = Catalog([Given(first), source], Metrics())
    catalog.load()
    source.model = second
    asyncio.run(catalog.refresh())

    assert catalog.versions("digits") == ["1", "2"]
    assert "two files of version 1" in (catalog.slots[1].problem or "")


def test_what_fails_unexpectedly_keeps_no_other_model_from_being_swapped(
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    class Broken(Given):
        broken = False

        def load(self) -> Model:
            if self.broken:
                raise MemoryError("no room")
            return super().load()

    old = load()
    names = "first", "broken", "last"
    _, broken, _ = sources = [Broken(replace(old, name=name), name) for name in names]
    catalog = Catalog(sources, Metrics())
    catalog.load()
    for source in sources:
        source.model = replace(source.model, version="new")
    broken.broken = True
    capsysbinary.readouterr()
    for _ in range(3):
        asyncio.run(catalog.refresh())

    assert [catalog.versions(name) for name in names] == [["new"], [old.version], ["new"]]
    assert catalog.slots[1].problem == "it could not be loaded: MemoryError('no room')"
    (failed,) = events(capsysbinary, "failed")
    assert (failed["model"], failed["why"]) == ("broken", "MemoryError('no room')")

    broken.broken = False
    asyncio.run(catalog.refresh())
    assert catalog.versions("broken") == ["new"]
    assert catalog.slots[1].problem is None


def test_what_was_swapped_is_served_though_the_look_at_others_is_cut_off() -> None:
    class Endless(Given):
        def load(self) -> Model:
            raise asyncio.CancelledError

    new = load()
    catalog = Catalog([Given(new), Endless(new, "endless")], Metrics())
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(catalog.refresh())

    assert catalog.versions("digits") == [new.version]


def test_what_is_served_is_logged_in_the_order_of_the_sources(
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    names = [str(number) for number in range(20)]
    catalog = Catalog([Given(replace(load(), name=name), name) for name in names], Metrics())
    catalog.load()
    assert [event["model"] for event in events(capsysbinary, "served")] == names
    catalog.unload(frozenset(names))
    assert [event["model"] for event in events(capsysbinary, "retired")] == names


def events(capture: pytest.CaptureFixture[bytes], name: str) -> list[dict[str, Any]]:
    """What has been logged under one name."""
    lines = [json.loads(line) for line in capture.readouterr().err.splitlines()]
    return [line for line in lines if line["event"] == name]


@pytest.mark.parametrize("name", SERVED)
def test_a_proven_file_is_served(name: str) -> None:
    model = load(name)

    assert model.verified
    assert model.version == model.sha256[:12]
    assert model.run(np.zeros((3, 784), np.float32)).shape == (3, 10)


def test_statistics_in_training_mode_are_seen_whatever_the_report_says(tmp_path: Path) -> None:
    lay(tmp_path, replace(NETWORK, training_mode=1))

    with pytest.raises(CheckFailedError, match="depends on which others come with it"):
        load()


def test_statistics_that_moved_are_seen_whatever_the_report_says() -> None:
    def move(report: dict[str, Any]) -> None:
        report["goldens"]["logits"]["bn.onnx"][3][0] *= 1.01

    edit(move)

    with pytest.raises(CheckFailedError, match="its outputs are off by"):
        load()
    assert load("mnist-bn-folded").verified


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda report: report.pop("goldens"), "holds no golden outputs of it"),
        (lambda report: report["goldens"]["logits"].pop("bn.onnx"), "holds no golden outputs"),
        (lambda report: report["goldens"]["logits"]["bn.onnx"].pop(), "that are none"),
        (lambda report: report["goldens"].update(images="AAAA"), "that are none"),
        (lambda report: report["goldens"].update(images=""), "holds no golden outputs"),
        (lambda report: report["goldens"]["logits"]["bn.onnx"][0].__setitem__(0, 1e39), "off by"),
        (lambda report: report.update(parity=False), "no parity"),
    ],
)
def test_a_report_without_goldens_proves_nothing(
    change: Callable[[dict[str, Any]], object], says: str
) -> None:
    edit(change)

    with pytest.raises(CheckFailedError, match=says):
        load()
    model = load(allow_unverified=True)
    assert says in (model.unproven or "")
