"""Cases that the gate's tests share, each trained and exported once per session."""

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import onnx
import pytest

from mnist_batchnorm.parity import Gate, ParityReport
from tests.support.gate import few_passes, reuse_function_registry
from tests.support.parity_cases import INPUT, OUTPUT, Case, make_case, provenance

__all__ = ["few_passes"]

reuse_function_registry()

GetCase = Callable[[str, int, float], Case]  # architecture, seed, gain
Judge = Callable[..., ParityReport]  # graph or a file's bytes, and options of `Gate.check`


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


FEW = 64  # images


@lru_cache(maxsize=4)
def gate_of(case: Case, images: int) -> Gate:
    """Return a case's gate; its reference costs a second and 50 MB."""
    inputs, labels = case.inputs[:images], case.labels[:images]
    return Gate(case.weights, model=case.architecture, inputs=inputs, labels=labels)


def judge_file(path: Path, case: Case, images: int = FEW, **options: Any) -> ParityReport:
    """Judge whether a file is a correct export of a case."""
    given: dict[str, Any] = {
        "input_name": INPUT,
        "output_name": OUTPUT,
        "provenance": provenance(case.weights.read_bytes()),
    }
    return gate_of(case, images).check(path, **given | options)


@pytest.fixture
def judge(tmp_path: Path, mlp: Case) -> Judge:
    """Judge a graph that claims, rightly or not, to come from `mlp`."""

    def run(graph: onnx.ModelProto | bytes, **options: Any) -> ParityReport:
        content = graph.SerializeToString() if isinstance(graph, onnx.ModelProto) else graph
        path = tmp_path / "candidate.onnx"
        path.write_bytes(content)
        return judge_file(path, mlp, **options)

    return run
