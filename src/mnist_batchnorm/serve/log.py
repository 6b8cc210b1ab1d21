"""The server's log: a JSON object a line, on stderr."""

import json
import logging
import sys
from datetime import UTC, datetime

import orjson


def log(event: str, level: str = "info", **fields: object) -> None:
    """Write one event."""
    line = {"time": datetime.now(UTC), "level": level, "event": event, **fields}
    try:
        text = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z, default=str)
    except TypeError:  # not UTF-8, as a file's name may be: written in escapes
        text = json.dumps(line, default=str).encode() + b"\n"
    sys.stderr.buffer.write(text)
    sys.stderr.buffer.flush()


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
