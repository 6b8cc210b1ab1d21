"""Parse ``dvc.lock``: the MD5 of each dependency and output by stage."""

import functools
import re
from collections.abc import Mapping
from typing import Any

# As DVC writes an output; parsing the YAML of every commit would take minutes.
MD5_ENTRY = re.compile(r"- path: (\S+)\n +hash: md5\n +md5: ([0-9a-f]{32})$", re.MULTILINE)


@functools.lru_cache(maxsize=8)  # parsing takes a third of a second
def load_stages(text: str) -> Any:
    """Return the value of ``stages`` in the text of a ``dvc.lock``; not to be modified.

    Raises:
        ruamel.yaml.error.YAMLError, KeyError, TypeError: Not a lock file.
    """
    from ruamel.yaml import YAML  # most callers of this package parse nothing

    return YAML(typ="safe", pure=True).load(text)["stages"]


def parse_stages(text: str) -> dict[str, dict[str, Any]]:
    """Return the stages by name; empty if the text is not a lock file."""
    from ruamel.yaml.error import YAMLError

    try:
        stages = load_stages(text)
    except (YAMLError, KeyError, TypeError):
        return {}
    if not isinstance(stages, dict):
        return {}
    return {name: stage for name, stage in stages.items() if isinstance(stage, dict)}


def md5_by_path(stage: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Return the MD5 of each ``deps`` or ``outs`` file of a stage; skips malformed entries."""
    entries = stage.get(kind)
    return {
        entry["path"]: entry["md5"]
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and isinstance(entry.get("md5"), str)
    }


def output_files(stages: Mapping[str, Any]) -> dict[str, str]:
    """Return the MD5 of every output of all stages by path, without folders."""
    return {
        path: md5
        for stage in stages.values()
        for path, md5 in md5_by_path(stage, "outs").items()
        if not md5.endswith(".dir")
    }
