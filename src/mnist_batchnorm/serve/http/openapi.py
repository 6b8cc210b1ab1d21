"""The server's OpenAPI 3.1 document, and Swagger UI to try it."""

from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson

from mnist_batchnorm.serve.core.settings import Settings

STATIC = Path(__file__).parent / "static"
DOCS = (STATIC / "docs.html").read_bytes()
START = (STATIC / "swagger-start.js").read_bytes()
BUNDLE = "fastapi_offline"  # the package that contains Swagger UI
SWAGGER_UI = ("swagger-ui.css", "swagger-ui-bundle.js")
INLINED = ("examples", "parameters", "responses")  # components that the document does not keep


def read_bundled(name: str) -> bytes:
    """Return a file of Swagger UI."""
    return files(BUNDLE).joinpath("static", name).read_bytes()


def document(settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI document of a server with these settings.

    `static/openapi.json` contains ``<version>``, ``<max_rows>`` and ``<max_body>``.
    """
    text = (STATIC / "openapi.json").read_text(encoding="utf-8")
    max_rows = str(settings.limits.rows)
    for placeholder, value in (
        ('"<max_rows>"', max_rows),  # as a number
        ("<max_rows>", max_rows),
        ("<max_body>", str(settings.max_body)),
        ("<version>", version("mnist-batchnorm")),
    ):
        text = text.replace(placeholder, value)
    content = orjson.loads(text)
    shared = {kind: content["components"].pop(kind) for kind in INLINED}
    filled: dict[str, Any] = _inline(content, shared)
    if not settings.token:
        filled["security"] = []
    return filled


def _inline(node: Any, shared: dict[str, dict[str, Any]]) -> Any:
    if isinstance(node, list):
        return [_inline(item, shared) for item in node]
    if not isinstance(node, dict):
        return node
    kind, _, name = str(node.get("$ref", "")).removeprefix("#/components/").partition("/")
    if kind in shared:
        return shared[kind][name]
    return {key: _inline(value, shared) for key, value in node.items()}
