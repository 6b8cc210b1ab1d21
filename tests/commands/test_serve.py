"""The options of ``mnist-bn serve``."""

import sys
from dataclasses import replace
from typing import Any

import click
import pytest

from mnist_batchnorm.commands import serve
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.serve.core.settings import Settings
from tests.conftest import MnistBn


def test_every_option_has_a_help_text() -> None:
    silent = [p.name for p in serve.command.params if isinstance(p, click.Option) and not p.help]
    assert silent == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host": "0.0.0.0"}, "--token-file or MNIST_BN_TOKEN, or say --insecure"),
        ({"host": "::"}, "--host :: lets other machines in"),
        ({"host": "example.org"}, "--host example.org lets other machines in"),
        ({"origins": ("https://a.example/",)}, "--cors: got 'https://a.example/'"),
        ({"origins": ("a.example",)}, "--cors: got 'a.example'"),
        ({"origins": ("https://a.example/x",)}, "--cors: got 'https://a.example/x'"),
        ({"origins": ("",)}, "--cors: got ''"),
        ({"max_bodies": 2048, "max_body": 4096}, "--max-bodies 2048: expected --max-body, 4096"),
    ],
)
def test_inconsistent_settings_are_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        serve.check(replace(Settings(), **change), insecure=False)
    assert message in str(error.value)


def test_a_token_or_insecure_lets_other_machines_in() -> None:
    serve.check(Settings(host="0.0.0.0", token="0123456789abcdef"), insecure=False)
    serve.check(Settings(host="0.0.0.0"), insecure=True)
    serve.check(Settings(origins=("*", "https://a.example")), insecure=False)


def test_the_command_checks_its_settings(mnist_bn: MnistBn) -> None:
    outcome = mnist_bn("serve", "--host", "0.0.0.0")
    assert outcome.status == 2
    assert outcome.err.startswith("error: --host 0.0.0.0 lets other machines in")


def test_a_missing_extra_is_an_error(monkeypatch: pytest.MonkeyPatch, mnist_bn: MnistBn) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    outcome = mnist_bn("serve")
    assert outcome.status == 2
    assert "pip install 'mnist-batchnorm[serve]'" in outcome.err


@pytest.mark.parametrize("missing", ["grpc", "tritonclient.grpc.service_pb2"])
def test_a_missing_grpc_extra_is_an_error(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"gRPC needs more.*'mnist-batchnorm\[grpc,serve\]'"):
        serve.check(Settings(grpc_port=0), insecure=False)
