"""Every kind of bad export is rejected, and most are diagnosed correctly.

The fast suite judges all of them on the perceptron, and on the small CNN those that only a CNN can
have; the rest of the CNN's are slow.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from mnist_batchnorm.parity import ParityReport
from tests.parity.conftest import GetCase, judge_file
from tests.support.mutants import FAMILIES, MUTANTS, mutants_of
from tests.support.mutants.edit import Array
from tests.support.mutants.folding import refolded, right
from tests.support.mutants.table import Mutant
from tests.support.parity_cases import INPUT, NETWORKS, Case

MIN_DIAGNOSED = 0.8  # share of the mutants

Make = Callable[[str, str], Path]  # of a case and a mutant
Verdict = Callable[[str, str], ParityReport]


@pytest.fixture(scope="session")
def make(get_case: GetCase, tmp_path_factory: pytest.TempPathFactory) -> Make:
    def run(case: str, mutant: str) -> Path:
        return MUTANTS[mutant].make(get_case(case, 0, 1.0), tmp_path_factory.mktemp("mutant"))

    return cache(run)


@pytest.fixture(scope="module")
def verdict(get_case: GetCase, make: Make, few_passes: None) -> Verdict:
    return cache(lambda case, mutant: judge_file(make(case, mutant), get_case(case, 0, 1.0)))


def mutants(fast: Callable[[str, Mutant], bool]) -> pytest.MarkDecorator:
    """Parametrize by all mutants of all cases; those that are not fast are slow."""
    return pytest.mark.parametrize(
        ("case", "mutant"),
        [
            pytest.param(
                case,
                mutant,
                id=f"{case}-{mutant.name}",
                marks=[] if fast(case, mutant) else pytest.mark.slow,
            )
            for case in NETWORKS
            for mutant in mutants_of(case)
        ],
    )


@mutants(fast=lambda case, mutant: case == "mlp" or "mlp" not in mutant.cases)
def test_bad_export_is_rejected(case: str, mutant: Mutant, verdict: Verdict) -> None:
    report = verdict(case, mutant.name)
    assert report.verdict == "no parity", f"{mutant.story}\n{report.table()}"
    json.dumps(report.to_json(), allow_nan=False)
    assert report.table()
    assert not [d for d in report.diagnoses if d.id == "undiagnosed"], "a rule itself failed"


@pytest.mark.parametrize("case", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_most_mistakes_are_diagnosed(case: str, verdict: Verdict) -> None:
    """The first diagnosis is right for most; the table shows the others too."""
    wrong = {
        mutant.name: f"is {mutant.diagnosis}, diagnosed as {', '.join(found) or 'nothing'}"
        for mutant in mutants_of(case)
        if (found := [diagnosis.id for diagnosis in verdict(case, mutant.name).diagnoses])[:1]
        != [mutant.diagnosis]
    }
    total = len(mutants_of(case))
    print(f"{total - len(wrong)} of {total} diagnosed")  # noqa: T201 - pytest -s, -rP
    for name, text in wrong.items():
        print(f"  {name} {text}")  # noqa: T201
    assert len(wrong) <= (1 - MIN_DIAGNOSED) * total, wrong


def test_every_family_has_mutants() -> None:
    assert len(MUTANTS) >= 60
    assert all(family.mutants for family in FAMILIES)
    assert all(mutant.story.endswith(".") for mutant in MUTANTS.values())


# --- the mutants themselves ---------------------------------------------------------------------


def probes(case: Case) -> list[Array]:
    """Inputs that may reveal a mistake: images, few, none, larger ones, noise, non-finite ones."""
    images = case.inputs
    broken = images[:4].copy()
    broken.reshape(4, -1)[1:, 300] = np.nan, np.inf, -np.inf
    noise = np.random.default_rng(0).standard_normal(images[:64].shape, dtype=np.float32)
    return [images, images[:1], images[:0], images[:3] * 255, images[:3] * 1e6, noise, broken]


def outputs(content: bytes | Path, case: Case) -> tuple[list[object], list[list[Array]]]:
    """A file's declared inputs and outputs, and what it computes for the `probes`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # no thread pool
    options.log_severity_level = 4  # these files are expected to be wrong
    session = ort.InferenceSession(
        content if isinstance(content, bytes) else str(content),
        options,
        providers=["CPUExecutionProvider"],
    )
    ends = [session.get_inputs(), session.get_outputs()]
    declared: list[object] = [(v.name, v.type, len(v.shape)) for end in ends for v in end]
    return declared, [session.run(None, {INPUT: inputs}) for inputs in probes(case)]


@pytest.fixture(scope="session")
def honest(get_case: GetCase) -> Callable[[str], list[tuple[list[object], list[list[Array]]]]]:
    def run(name: str) -> list[tuple[list[object], list[list[Array]]]]:
        case = get_case(name, 0, 1.0)
        graphs = case.kept(), case.folded(), case.legacy()
        return [outputs(graph.SerializeToString(), case) for graph in graphs]

    return cache(run)


@mutants(fast=lambda case, _: case == "mlp")
def test_mutant_is_bad(
    case: str,
    mutant: Mutant,
    get_case: GetCase,
    make: Make,
    honest: Callable[[str], list[tuple[list[object], list[list[Array]]]]],
) -> None:
    """A mutant is invalid, cannot run, computes something else, or is marked as latent."""
    path, expected = make(case, mutant.name), honest(case)
    try:
        onnx.checker.check_model(path, full_check=True)
        declared, computed = outputs(path, get_case(case, 0, 1.0))
    except Exception:  # noqa: BLE001 - of the checker, of protobuf, of ONNX Runtime
        return  # invalid
    if mutant.latent:
        for got, want in zip(computed, expected[0][1], strict=True):
            size = np.abs(want[0][np.isfinite(want[0])]).max(initial=0)
            np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4 * size)
    else:
        assert not any(
            declared == interface and equal(computed, logits) for interface, logits in expected
        )


def equal(some: list[list[Array]], others: list[list[Array]]) -> bool:
    return all(
        len(a) == len(b) and all(map(np.array_equal, a, b, [True] * len(a)))
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_correct_fold_equals_the_exporters(name: str, get_case: GetCase) -> None:
    """The correct fold, made by the code that makes the bad ones."""
    case = get_case(name, 0, 1.0)
    for ours, theirs in zip(
        refolded(case, right).graph.initializer, case.folded().graph.initializer, strict=True
    ):
        array = onnx.numpy_helper.to_array(theirs)
        np.testing.assert_allclose(
            onnx.numpy_helper.to_array(ours), array, rtol=1e-6, atol=1e-6 * np.abs(array).max()
        )
