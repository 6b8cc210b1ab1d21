"""The decoder with either JSON parser."""

import importlib.util
import sys
from types import ModuleType
from unittest import mock

from mnist_batchnorm.serve.core import decode as with_simdjson


def without_simdjson() -> ModuleType:
    """The module as it is where pysimdjson is not installed."""
    names = ("json_documents", "decode")  # in the order of their imports
    with mock.patch.dict(sys.modules, {"simdjson": None}):
        for name in names:
            spec = importlib.util.find_spec(f"mnist_batchnorm.serve.core.{name}")
            assert spec
            assert spec.loader
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    return module


PARSERS = {"pysimdjson": with_simdjson, "orjson": without_simdjson()}
