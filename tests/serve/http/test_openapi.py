"""The OpenAPI document: what it contains, and that the server conforms to it."""

from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings

from mnist_batchnorm.artifacts.splits import CLASSES, SIDE
from mnist_batchnorm.serve.core.protocol import INPUT, OUTPUT
from mnist_batchnorm.serve.core.settings import Limits, Settings
from mnist_batchnorm.serve.http.openapi import document
from tests.support.serving import BEARER, TOKEN, Server, running

REJECTIONS = [400, 401, 404, 405, 413]  # 413 is the status of too many images
DOCUMENT = document(Settings(token=TOKEN))


@pytest.fixture(scope="module")
def server(folder: Any) -> Iterator[Server]:
    with running(folder=folder, env={"MNIST_BN_TOKEN": TOKEN}) as server:
        yield server


@pytest.fixture(scope="module")
def schema() -> Any:
    import schemathesis

    config = schemathesis.Config.from_dict(
        {"checks": {"negative_data_rejection": {"expected-statuses": REJECTIONS}}}
    )
    return schemathesis.openapi.from_dict(DOCUMENT, config=config)


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_server_conforms_to_the_document(schema: Any, server: Server, mode: str) -> None:
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    checked = set()
    for result in schema.exclude(operation_id="unload").get_all_operations():  # keeps the models
        operation = result.ok()
        if mode == "negative" and not (operation.path_parameters or operation.body):
            continue

        @settings(max_examples=10, database=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=GenerationMode(mode)))
        def check(case: Any) -> None:
            case.call_and_validate(
                base_url=server.url,
                headers=BEARER,
                # the right number of pixels is more than a schema can require
                excluded_checks=[positive_data_acceptance],
            )

        check()
        checked.add(operation.definition.raw["operationId"])
    assert {"infer", "load", "index", "model"} <= checked


def test_the_document_is_valid_and_served(schema: Any, server: Server) -> None:
    schema.validate()

    assert requests.get(f"{server.url}/openapi.json", timeout=10).json() == DOCUMENT


def test_each_call_describes_every_rejection() -> None:
    statuses = {
        call["operationId"]: set(call["responses"])
        for path in DOCUMENT["paths"].values()
        for call in path.values()
    }
    assert statuses.pop("live") == {"200", "500"}
    assert statuses.pop("ready") == {"200", "500", "503"}
    for name, described in statuses.items():
        assert {"200", "401", "403", "500"} <= described, name


def test_the_document_contains_the_limits_and_names_of_the_server() -> None:
    filled = document(Settings(max_body=12345, limits=Limits(rows=7)))
    infer = filled["paths"]["/v2/models/{name}/infer"]["post"]
    tensors = filled["components"]["schemas"]["InferRequest"]["properties"]["inputs"]["items"]
    answer = filled["components"]["schemas"]["InferResponse"]["properties"]["outputs"]["items"]

    assert (filled["security"], DOCUMENT["security"]) == ([], [{"token": []}])
    assert "at most 7 images and 12345 bytes" in infer["description"]
    assert f"`{OUTPUT}` is FP32 `[n, {CLASSES}]`" in infer["description"]
    assert answer["properties"]["name"] == {"const": OUTPUT}
    rows = {"type": "integer", "minimum": 0, "maximum": 7}
    pixels, side = {"const": SIDE * SIDE}, {"const": SIDE}
    shapes = []
    for tensor in tensors["oneOf"]:
        assert tensor["properties"]["name"] == {"const": INPUT}
        shapes.append([one["prefixItems"] for one in tensor["properties"]["shape"]["anyOf"]])
    assert shapes == [[[rows, pixels]], [[rows, pixels], [rows, side, side]]]
    assert "<" not in str(filled)
    assert "#/components/responses" not in str(filled)


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
def test_health_checks_need_no_token_and_no_host(server: Server, path: str) -> None:
    assert requests.get(f"{server.url}{path}", headers={"Host": "a"}, timeout=10).status_code == 200


@pytest.mark.parametrize("version", ["", "/versions/{version}"])
def test_the_example_is_answered(server: Server, version: str) -> None:
    path = f"/v2/models/{{name}}{version}/infer"
    media = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    metadata = requests.get(f"{server.url}/v2/models/mnist-bn", headers=BEARER, timeout=10).json()
    path = path.format(name="mnist-bn", version=metadata["versions"][0])

    answer = requests.post(f"{server.url}{path}", json=media["example"], headers=BEARER, timeout=10)

    logits = answer.json()["outputs"][0]["data"]
    assert logits.index(max(logits)) == 1
