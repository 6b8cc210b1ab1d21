"""The OpenAPI document says what the server does, and the server does nothing else."""

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.openapi import document
from tests.support.serving import Server, lay, running

TOKEN = "the-token-of-these-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
REFUSALS = [400, 401, 404, 405, 413]  # 413 is how the server refuses more images than it takes

DOCUMENT = document(Settings(token=TOKEN))

config = schemathesis.Config.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}}
)
schema = schemathesis.openapi.from_dict(DOCUMENT, config=config)
described = schema.exclude(operation_id="unload")  # nothing would be left to ask


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openapi") / "pipeline"
    lay(folder)
    with running(folder=folder, env={"MNIST_BN_TOKEN": TOKEN}) as server:
        yield server


@described.parametrize()
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_described(case: schemathesis.Case[Any], server: Server) -> None:
    case.call_and_validate(
        base_url=server.url,
        headers=BEARER,
        # the right number of pixels is more than a schema can ask for
        excluded_checks=[positive_data_acceptance],
    )


def test_each_call_tells_of_every_refusal() -> None:
    told = {
        call["operationId"]: set(call["responses"])
        for path in DOCUMENT["paths"].values()
        for call in path.values()
    }
    assert told.pop("live") == {"200", "500"}
    assert told.pop("ready") == {"200", "500", "503"}
    for name, statuses in told.items():
        assert {"200", "401", "403", "500"} <= statuses, name


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
def test_health_is_told_to_whoever_asks(server: Server, path: str) -> None:
    assert requests.get(f"{server.url}{path}", headers={"Host": "a"}, timeout=10).status_code == 200


def test_the_document_is_one(server: Server) -> None:
    schema.validate()

    assert requests.get(f"{server.url}/openapi.json", timeout=10).json() == DOCUMENT


@pytest.mark.parametrize("version", ["", "/versions/{version}"])
def test_the_example_is_answered(server: Server, version: str) -> None:
    path = f"/v2/models/{{name}}{version}/infer"
    media = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    metadata = requests.get(f"{server.url}/v2/models/mnist-bn", headers=BEARER, timeout=10).json()
    path = path.format(name="mnist-bn", version=metadata["versions"][0])

    answer = requests.post(f"{server.url}{path}", json=media["example"], headers=BEARER, timeout=10)

    logits = answer.json()["outputs"][0]["data"]
    assert logits.index(max(logits)) == 1
