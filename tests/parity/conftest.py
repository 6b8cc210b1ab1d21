"""The cases that the gate's tests share, each trained and exported once a session."""

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import onnx
import pytest

from mnist_batchnorm.parity import Gate, ParityReport, invariance
from tests.support.parity_cases import INPUT, OUTPUT, Case, make_case, provenance

GetCase = Callable[[str, int, float], Case]  # of an architecture, seed, gain
Judge = Callable[..., ParityReport]  # of a graph or a file's bytes, and what `Gate.check` is told


@pytest.fixture(scope="session")
def get_case(tmp_path_factory: pytest.TempPathFactory) -> GetCase:
    folder = tmp_path_factory.mktemp("cases")
    return cache(lambda name, seed, gain: make_case(name, seed, gain, folder))


@pytest.fixture(scope="session")
def mlp(get_case: GetCase) -> Case:
    return get_case("mlp", 0, 1.0)


@pytest.fixture(scope="session")
def cnn(get_case: GetCase) -> Case:
    return get_case("cnn", 0, 1.0)


@pytest.fixture(scope="module")
def few_passes() -> Iterator[None]:
    """Spare the passes over thousands of rows and with two threads, nine tenths of the time.

    For bad files, which a gate with fewer checks would rather miss; test_honest has them all.
    """
    small = [s for s in invariance.SETTINGS if s.batch_size < 1000 and s.threads == 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invariance, "SETTINGS", small)
        yield


FEW = 64  # images


@lru_cache(maxsize=4)
def gate_of(case: Case, images: int) -> Gate:
    """Make a case's gate: what one knows of a network costs it a second, and 50 MB."""
    inputs, labels = case.inputs[:images], case.labels[:images]
    return Gate(case.weights, model=case.architecture, inputs=inputs, labels=labels)


def judge_file(path: Path, case: Case, images: int = FEW, **options: Any) -> ParityReport:
    """Ask the gate whether a file is an honest export of a case."""
    given: dict[str, Any] = {
        "input_name": INPUT,
        "output_name": OUTPUT,
        "provenance": provenance(case.weights.read_bytes()),
    }
    return gate_of(case, images).check(path, **given | options)


@pytest.fixture
def judge(tmp_path: Path, mlp: Case) -> Judge:
    """Ask the gate about a graph that claims, truly or not, to come from `mlp`."""

    def run(graph: onnx.ModelProto | bytes, **options: Any) -> ParityReport:
        content = graph.SerializeToString() if isinstance(graph, onnx.ModelProto) else graph
        path = tmp_path / "candidate.onnx"
        path.write_bytes(content)
        return judge_file(path, mlp, **options)

    return run
