"""Load for benchmarks/serving.py: `wrk` on a core of its own, one thread, connections kept alive.

It is a closed loop: a connection sends its next request when it has the answer to the last, so
latency at many connections is mostly the queue that they form.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving_wire import Request
from mnist_batchnorm.core.errors import UserError


class LoadError(Exception):
    """Load that could not be made: wrk failed, or nobody listened; says what wrk said."""


ANSWER_TIMEOUT = 30  # seconds until wrk counts a request as lost
MARK = "MEASURED "

# The requests are made before the clock starts; `request` hands them out in turn.
SCRIPT = """\
local requests, turn = {{}}, 0

function init(args)
  for _, one in ipairs({{
{entries}
  }}) do
    local file = assert(io.open(one.file, "rb"))
    table.insert(requests, wrk.format("POST", one.path, one.headers, file:read("*a")))
    file:close()
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '{mark}{{"requests":%d,"seconds":%.6f,"p50":%.3f,"p99":%.3f,' ..
    '"errors":{{"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d}}}}\\n',
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """What wrk measured.

    Attributes:
        requests: answered.
        seconds: that it took.
        p50, p99: percentiles of the latency, ms.
        errors: kind -> how many, those that occurred; "status" is every answer from 400 up.
    """

    requests: int
    seconds: float
    p50: float
    p99: float
    errors: dict[str, int]


def find_wrk() -> str:
    """Return wrk's path.

    Raises:
        UserError: It is not installed.
    """
    found = shutil.which("wrk")
    if not found:
        raise UserError("no `wrk` on the PATH; on Debian and Ubuntu: apt-get install wrk")
    return found


def quoted(text: str) -> str:
    """Write a string of Lua's."""
    for char, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n")):
        text = text.replace(char, escape)
    return f'"{text}"'


def write_script(folder: Path, requests: Sequence[Request]) -> Path:
    """Write the Lua script that sends requests in turn, and their bodies, into an empty folder."""
    entries = []
    for number, request in enumerate(requests):
        body = folder / f"{number}.body"
        body.write_bytes(request.body)
        headers = ", ".join(f"[{quoted(k)}] = {quoted(v)}" for k, v in request.headers.items())
        entries.append(
            f"    {{file = {quoted(str(body))}, path = {quoted(request.path)}, "
            f"headers = {{{headers}}}}},"
        )
    script = folder / "load.lua"
    script.write_text(SCRIPT.format(entries="\n".join(entries), mark=MARK))
    return script


def parse(output: str) -> Load:
    """Read what the script's `done` printed.

    Raises:
        LoadError: It printed nothing.
    """
    for line in output.splitlines():
        if line.startswith(MARK):
            values = json.loads(line.removeprefix(MARK))
            errors = {kind: count for kind, count in values.pop("errors").items() if count}
            return Load(**values, errors=errors)
    raise LoadError(f"wrk ended without figures:\n{output}")


def load(port: int, script: Path, connections: int, seconds: int, core: int) -> Load:
    """Send a script's requests to this machine for some whole seconds, wrk's unit.

    Raises:
        LoadError: wrk fails.
    """
    command = ["taskset", "-c", str(core), find_wrk(), "--threads", "1"]
    command += ["--connections", str(connections), "--duration", f"{seconds}s"]
    command += ["--timeout", f"{ANSWER_TIMEOUT}s", "--script", str(script)]
    try:
        done = subprocess.run(  # noqa: S603
            [*command, f"http://127.0.0.1:{port}/"],
            capture_output=True,
            text=True,
            timeout=seconds + 2 * ANSWER_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LoadError("wrk does not end") from None
    if done.returncode:
        raise LoadError(f"wrk failed: {done.stdout}{done.stderr}")
    return parse(done.stdout)
