"""The server's OpenAPI 3.1 document, and Swagger UI to try it."""

from importlib.metadata import version
from importlib.resources import files
from typing import Any

from mnist_batchnorm.artifacts.splits import CLASSES, SIDE
from mnist_batchnorm.serve.core.protocol import INPUT, OUTPUT, PIXELS
from mnist_batchnorm.serve.core.settings import Settings

Json = dict[str, Any]

# Files of Swagger UI in the package that brings it along, by the path they are served at.
SWAGGER_UI = {
    "/static/swagger-ui.css": "swagger-ui.css",
    "/static/swagger-ui-bundle.js": "swagger-ui-bundle.js",
}
BUNDLE = "fastapi_offline"

DOCS = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mnist-batchnorm: the protocol, to try</title>
<link rel="stylesheet" href="/static/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/static/swagger-ui-bundle.js"></script>
<script src="/static/swagger-start.js"></script>
</body>
</html>
"""
START = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  tryItOutEnabled: true,
  validatorUrl: null,
});
"""


def bundled(name: str) -> bytes:
    """Return a file of Swagger UI."""
    return files(BUNDLE).joinpath("static", name).read_bytes()


def document(settings: Settings) -> Json:
    """Return the document.

    Args:
        settings: how this server serves.
    """
    paths: Json = {}
    for parameters, path in (([NAME], ""), ([NAME, VERSION], "/versions/{version}")):
        one = f"/v2/models/{{name}}{path}"
        which = "One version" if path else "The default version"
        mark = "_of_version" if path else ""
        paths |= {
            one: get(f"model{mark}", "Model metadata", "ModelMetadata", parameters, 404),
            f"{one}/config": get(f"config{mark}", "Configuration", "ModelConfig", parameters, 404),
            f"{one}/ready": get(f"model_ready{mark}", "Model ready", "Ready", parameters, 404, 503),
            f"{one}/infer": infer(f"infer{mark}", which, parameters, settings),
            f"{one}/stats": get(f"stats{mark}", "Statistics", "Statistics", parameters, 404),
        }
    paths = {
        "/v2": get("server", "Server metadata", "ServerMetadata"),
        "/v2/health/live": health("live", "Live"),
        "/v2/health/ready": health("ready", "Ready"),
        **paths,
        "/v2/models/stats": get("all_stats", "Statistics of all models", "Statistics"),
        "/v2/repository/index": {
            "post": {
                **operation("index", "Repository index", "RepositoryIndex", 400, 408, 413, 415),
                "requestBody": body("IndexRequest", required=False),
            }
        },
        **{
            f"/v2/repository/models/{{name}}/{verb}": {
                "post": {
                    **operation(verb, told, "Nothing", 400, 403, 404, 408, 413, 415),
                    "parameters": [NAME],
                    "requestBody": body("LoadRequest", required=False),
                    "security": [{"token": []}],
                }
            }
            for verb, told in (
                ("load", "Serve a model again, or look at its file anew"),
                ("unload", "Serve a model no longer"),
            )
        },
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Figures for Prometheus",
                "responses": {
                    "200": {"description": "Done", "content": {"text/plain": {"schema": TEXT}}},
                    **refusals(),
                },
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mnist-batchnorm",
            "version": version("mnist-batchnorm"),
            "summary": "Proven MNIST classifiers over the Open Inference Protocol, version 2",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"token": []}] if settings.token else [],
        "paths": paths,
        "components": {
            "schemas": schemas(settings),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


# --- operations ---------------------------------------------------------------------------------

TEXT: Json = {"type": "string"}
NAME: Json = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "A model's name",
    "schema": {**TEXT, "minLength": 1},
    "example": "mnist-bn",
}
VERSION: Json = {
    "name": "version",
    "in": "path",
    "required": True,
    "description": "One of the model's versions",
    "schema": {**TEXT, "minLength": 1},
    "example": "1",
}
SAYS = {
    400: "The request cannot be answered",
    401: "The token is missing or another",
    403: "Host or Origin is another site's, or the server has no token and this needs one",
    404: "There is no such model or version",
    408: "The request came too slowly",
    413: "The request is too large",
    415: "The content encoding is unknown",
    500: "The server failed; its log says how",
    503: "Not now",
}


def refusals(*statuses: int) -> Json:
    """Return the responses that are errors: those of these statuses, and of any call."""
    error = {"application/json": {"schema": ref("Error")}}
    return {
        str(status): {"description": SAYS[status], "content": error}
        for status in sorted({401, 403, 500, *statuses})
    }


def operation(name: str, summary: str, schema: str, *statuses: int) -> Json:
    """Return an operation that answers JSON."""
    content = {"application/json": {"schema": ref(schema)}}
    unready = {"503": {"description": SAYS[503], "content": content}} if schema == "Ready" else {}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "Done", "content": content},
            **refusals(*statuses),
            **unready,
        },
    }


def health(name: str, schema: str) -> Json:
    """Return the path of a probe, which nobody is kept from."""
    probe = operation(name, f"Server {name}", schema)
    for status in ("401", "403"):
        del probe["responses"][status]
    return {"get": {**probe, "security": []}}


def get(
    name: str, summary: str, schema: str, parameters: list[Json] | None = None, *statuses: int
) -> Json:
    """Return a path that is only read."""
    given: Json = {"parameters": parameters} if parameters else {}
    return {"get": {**operation(name, summary, schema, *statuses), **given}}


def infer(name: str, which: str, parameters: list[Json], settings: Settings) -> Json:
    """Return the path of inference."""
    told = operation(
        name, f"Inference by {which.lower()}", "InferResponse", 400, 404, 408, 413, 415, 503
    )
    told["description"] = (
        f"`{INPUT}` is FP32 `[n, {PIXELS}]`, pixel / 255, or UINT8 `[n, {PIXELS}]` or "
        f"`[n, {SIDE}, {SIDE}]`, which the server scales as training does; at most "
        f"{settings.limits.rows} images and {settings.max_body} bytes. `{OUTPUT}` is FP32 "
        f"`[n, {CLASSES}]`, no softmax. Raw tensors may follow the JSON, as the protocol's binary "
        "tensor data extension says."
    )
    raw = {"type": "string", "contentMediaType": "application/octet-stream"}
    told["responses"]["200"]["content"]["application/octet-stream"] = {"schema": raw}
    told["parameters"] = parameters
    told["requestBody"] = body("InferRequest", required=True, example=example())
    return {"post": told}


def body(schema: str, *, required: bool, example: Json | None = None) -> Json:
    """Return what a request carries."""
    media: Json = {"schema": ref(schema)}
    if example is not None:
        media["example"] = example
    return {"required": required, "content": {"application/json": media}}


def example() -> Json:
    """Return a request with a picture of a 1: an upright stroke."""
    row = [255 if column in (13, 14) else 0 for column in range(SIDE)]
    data = [pixel for line in range(SIDE) for pixel in (row if 4 <= line < 24 else [0] * SIDE)]
    tensor = {"name": INPUT, "datatype": "UINT8", "shape": [1, SIDE, SIDE], "data": data}
    return {"id": "a stroke", "inputs": [tensor]}


# --- schemas ------------------------------------------------------------------------------------


def ref(name: str) -> Json:
    """Return a reference to a schema."""
    return {"$ref": f"#/components/schemas/{name}"}


def thing(properties: Json, *optional: str) -> Json:
    """Return the schema of an object."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def maybe(schema: Json) -> Json:
    """Return the schema of what may be null, which is the same as absent."""
    return {"anyOf": [schema, {"type": "null"}]}


def listed(items: Json, **limits: int) -> Json:
    """Return the schema of a list."""
    return {"type": "array", "items": items, **limits}


def tensor_input(datatype: str, shapes: list[Json], number: Json) -> Json:
    """Return the schema of the input with one datatype."""
    data = {"anyOf": [listed(number), listed(listed(number)), listed(listed(listed(number)))]}
    return thing(
        {
            "name": {"const": INPUT},
            "datatype": {"const": datatype},
            "shape": {"anyOf": shapes},
            "parameters": maybe(thing({"binary_data_size": COUNT}, "binary_data_size")),
            "data": maybe(data),
        },
        "parameters",
        "data",
    )


COUNT: Json = {"type": "integer", "minimum": 0}
BOOLEAN: Json = {"type": "boolean"}
PLAIN: Json = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean"]},
    "description": "Given back as it came",
}


def schemas(settings: Settings) -> Json:
    """Return all schemas."""
    rows = {"type": "integer", "minimum": 0, "maximum": settings.limits.rows}

    def shape(*tail: int) -> Json:
        lengths = [rows, *({"const": length} for length in tail)]
        exact = {"minItems": len(lengths), "maxItems": len(lengths)}
        return {"type": "array", "prefixItems": lengths, **exact}

    flat, square = shape(PIXELS), shape(SIDE, SIDE)
    floats, pixels = {"type": "number"}, {"type": "integer", "minimum": 0, "maximum": 255}
    wanted = thing(
        {
            "binary_data": BOOLEAN,
            "classification": {**COUNT, "description": "The so many likeliest classes"},
        },
        "binary_data",
        "classification",
    )
    output = thing({"name": {"const": OUTPUT}, "parameters": maybe(wanted)}, "parameters")
    tensor = thing({"name": TEXT, "datatype": TEXT, "shape": listed({"type": "integer"})})
    dims = listed({"type": "integer"})
    configured = thing({"name": TEXT, "data_type": TEXT, "dims": dims})
    duration = thing({"count": COUNT, "ns": COUNT})
    parts = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    return {
        "Error": thing(
            {"error": {**TEXT, "description": "The field, what it held, what it should"}}
        ),
        "Live": thing({"live": {"const": True}}),
        "Ready": thing({"name": TEXT, "ready": BOOLEAN}, "name"),
        "Nothing": {"type": "object", "maxProperties": 0},
        "ServerMetadata": thing({"name": TEXT, "version": TEXT, "extensions": listed(TEXT)}),
        "ModelMetadata": thing(
            {
                "name": TEXT,
                "versions": listed(TEXT, minItems=1),
                "platform": TEXT,
                "inputs": listed(tensor),
                "outputs": listed(tensor),
                "parameters": thing(
                    {
                        "version": TEXT,
                        "sha256": {**TEXT, "pattern": "^[0-9a-f]{64}$"},
                        "weights_sha256": {"type": ["string", "null"]},
                        "verified": {**BOOLEAN, "description": "The parity gate passed this file"},
                        "unverified_because": TEXT,
                    },
                    "unverified_because",
                ),
            }
        ),
        "ModelConfig": thing(
            {
                "name": TEXT,
                "platform": TEXT,
                "backend": TEXT,
                "max_batch_size": COUNT,
                "input": listed(configured),
                "output": listed(configured),
            }
        ),
        "InferRequest": thing(
            {
                "id": maybe(TEXT),
                "parameters": maybe({**PLAIN, "properties": {"binary_data_output": BOOLEAN}}),
                "inputs": listed(
                    {
                        "oneOf": [
                            tensor_input("FP32", [flat], floats),
                            tensor_input("UINT8", [flat, square], pixels),
                        ]
                    },
                    minItems=1,
                    maxItems=1,
                ),
                "outputs": maybe(listed(output, maxItems=1)),
            },
            "id",
            "parameters",
            "outputs",
        ),
        "InferResponse": thing(
            {
                "model_name": TEXT,
                "model_version": TEXT,
                "id": TEXT,
                "parameters": PLAIN,
                "outputs": listed(
                    thing(
                        {
                            "name": {"const": OUTPUT},
                            "datatype": {"enum": ["FP32", "BYTES"]},
                            "shape": listed(COUNT, minItems=2, maxItems=2),
                            "data": listed({"type": ["number", "string"]}),
                        }
                    ),
                    minItems=1,
                    maxItems=1,
                ),
            },
            "id",
            "parameters",
        ),
        "Statistics": thing(
            {
                "model_stats": listed(
                    thing(
                        {
                            "name": TEXT,
                            "version": TEXT,
                            "last_inference": {
                                **COUNT,
                                "description": "Milliseconds since the epoch; 0: none yet",
                            },
                            "inference_count": COUNT,
                            "execution_count": COUNT,
                            "inference_stats": thing(dict.fromkeys(parts, duration)),
                        }
                    )
                )
            }
        ),
        "IndexRequest": thing({"ready": maybe(BOOLEAN)}, "ready"),
        "RepositoryIndex": listed(
            thing(
                {
                    "name": TEXT,
                    "version": TEXT,
                    "state": {"enum": ["READY", "UNAVAILABLE"]},
                    "reason": TEXT,
                }
            )
        ),
        "LoadRequest": thing(
            {
                "parameters": maybe(
                    {
                        "type": "object",
                        "properties": {"unload_dependents": BOOLEAN},
                        "additionalProperties": False,
                    }
                )
            },
            "parameters",
        ),
    }
