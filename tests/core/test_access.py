"""Bearer tokens, and which hosts are this machine."""

from pathlib import Path

import pytest

from mnist_batchnorm.core.access import TOKEN, is_loopback, read_token
from mnist_batchnorm.core.errors import UserError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_a_loopback_address_is_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", ""])
def test_every_other_address_is_not(host: str) -> None:
    assert not is_loopback(host)


def test_a_token_is_read_from_the_file_or_else_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN, "")
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN, "of-the-environment")
    assert read_token(None) == "of-the-environment"
    file = tmp_path / "token"
    file.write_text("of-the-token-file\n")
    assert read_token(file) == "of-the-token-file"


@pytest.mark.parametrize(
    ("token", "message"),
    [("short", "16 or more"), ("0123456789abcdef 0123", "visible"), ("é" * 16, "ASCII")],
)
def test_an_unusable_token_is_an_error_that_does_not_repeat_it(
    monkeypatch: pytest.MonkeyPatch, token: str, message: str
) -> None:
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(UserError) as error:
        read_token(None)
    assert message in str(error.value)
    assert token not in str(error.value)


def test_a_missing_token_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none cannot be read"):
        read_token(tmp_path / "none")
