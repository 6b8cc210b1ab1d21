"""The server's log: one JSON object per line, on stderr."""

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson


def log(event: str, level: str = "info", **fields: object) -> None:
    """Write one event; a log that cannot be written, on a full disk say, stops no request."""
    line = {"time": datetime.now(UTC), "level": level, "event": event, **fields}
    try:
        text = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z, default=str)
    except TypeError:  # not UTF-8, as a file's name may be: written in escapes
        text = json.dumps(line, default=str).encode() + b"\n"
    try:
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()
    except BrokenPipeError:  # nobody reads it; flushing at exit would fail again
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - to the end
    except OSError:
        pass


class RateLimitedLog:
    """Writes an event that may happen thousands of times a second at most once per interval."""

    def __init__(self, event: str, interval_s: float = 1.0) -> None:
        self._event = event
        self._interval_s = interval_s
        self._next = 0.0
        self._held_back = 0

    def log(self, **fields: object) -> None:
        """Write the event with the number held back since the last one, or hold it back."""
        now = time.monotonic()
        if now < self._next:
            self._held_back += 1
            return
        log(self._event, "warning", **fields, held_back=self._held_back)
        self._next, self._held_back = now + self._interval_s, 0


class LibraryHandler(logging.Handler):
    """Writes the records of libraries as lines of this log."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name, "says": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
        log("library", record.levelname.lower(), **fields)


def take_over_logging() -> None:
    """Send warnings and errors of all libraries through this log."""
    logging.basicConfig(handlers=[LibraryHandler()], level=logging.WARNING, force=True)
