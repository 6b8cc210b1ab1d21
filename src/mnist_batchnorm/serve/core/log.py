"""The server's log: a JSON object a line, on stderr."""

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import orjson


def log(event: str, level: str = "info", **fields: object) -> None:
    """Write one event; what cannot be written, on a full disk say, keeps nobody from his answer."""
    line = {"time": datetime.now(UTC), "level": level, "event": event, **fields}
    try:
        text = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z, default=str)
    except TypeError:  # not UTF-8, as a file's name may be: written in escapes
        text = json.dumps(line, default=str).encode() + b"\n"
    try:
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()
    except BrokenPipeError:  # nobody reads any more; what is left would fail again at the exit
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - to the end
    except OSError:
        pass


class Sparse:
    """Writes an event that may come thousands of times a second once in a while.

    Args:
        event: its name.
        pause: seconds for which it is held back after it was written.
    """

    def __init__(self, event: str, pause: float = 1.0) -> None:
        self._event = event
        self._pause = pause
        self._next = 0.0
        self._held = 0

    def log(self, **fields: object) -> None:
        """Write the event, with how many were held back since the last time, or hold it back."""
        now = time.monotonic()
        if now < self._next:
            self._held += 1
            return
        log(self._event, "warning", **fields, held_back=self._held)
        self._next, self._held = now + self._pause, 0


class Handler(logging.Handler):
    """Makes what libraries log lines of this log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, with the traceback of its exception."""
        trace = {}
        if record.exc_info:
            trace["traceback"] = (self.formatter or logging.Formatter()).formatException(
                record.exc_info
            )
        log(
            "library",
            record.levelname.lower(),
            logger=record.name,
            says=record.getMessage(),
            **trace,
        )


def take_over_logging() -> None:
    """Send warnings and worse of all libraries through this log, and nothing else."""
    logging.basicConfig(handlers=[Handler()], level=logging.WARNING, force=True)
