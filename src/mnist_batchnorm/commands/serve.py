"""Tool serve: proven models over the Open Inference Protocol, version 2."""

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from mnist_batchnorm.commands.options import FILE
from mnist_batchnorm.core.access import TOKEN, is_loopback, read_token
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import PARITY
from mnist_batchnorm.serve.core.settings import METRICS_DIR, Limits, Settings

F = TypeVar("F", bound=Callable[..., Any])

ORIGIN = re.compile(r"\*|https?://[^/\s]+")
POSITIVE = click.FloatRange(min=0.0, min_open=True)
NOT_NEGATIVE = click.FloatRange(0.0)
SIZE = click.IntRange(1 << 10)


def setting(
    name: str, kind: "click.ParamType[Any]", metavar: str, help_: str, default: Any = None
) -> Callable[[F], F]:
    """Make an option; its default is that of the field of `Settings` unless given."""
    if default is None:
        default = getattr(Settings, name.replace("-", "_"))
    return click.option(
        f"--{name}", default=default, show_default=True, type=kind, metavar=metavar, help=help_
    )


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@setting("host", click.STRING, "ADDRESS", "Address to listen on.")
@setting("port", click.IntRange(0, 65535), "PORT", "Port to listen on; 0: any.")
@setting("grpc-port", click.IntRange(0, 65535), "PORT", "Answer gRPC too, on this port; 0: any.")
@setting("workers", click.IntRange(1, 256), "N", "Processes that share the port.")
@setting("parity", FILE, "FILE", "The gate's report on the files.", PARITY)
@click.option("--allow-unverified", is_flag=True, help="Serve what the gate has not passed.")
@click.option(
    "--token-file",
    type=FILE,
    metavar="FILE",
    help=f"Holds the bearer token that requests must send; default: the variable {TOKEN}.",
)
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without a token.")
@click.option(
    "--cors", multiple=True, metavar="ORIGIN", help="Allow pages of this origin; repeatable."
)
@setting("max-body", SIZE, "BYTES", "Largest body of a request, also after decompression.")
@setting("max-bodies", SIZE, "BYTES", "Largest sum of bodies held over HTTP; more get 503.")
@setting("max-rows", click.IntRange(1), "N", "Most images in a request.", Limits.rows)
@setting("max-connections", click.IntRange(1), "N", "Most connections; one more gets 503.")
@setting("queue", click.IntRange(1), "N", "Most requests that wait; one more gets 503.")
@setting("head-timeout", POSITIVE, "SECONDS", "Time limit for receiving the request headers.")
@setting("body-timeout", POSITIVE, "SECONDS", "Time limit for receiving the body.")
@setting("write-timeout", POSITIVE, "SECONDS", "Time limit for a client that reads no answer.")
@setting("keep-alive", POSITIVE, "SECONDS", "Time limit for an idle connection.")
@setting(
    "drain-delay",
    NOT_NEGATIVE,
    "SECONDS",
    "How long to keep serving, reporting not ready, after SIGTERM; more than the probes' period.",
)
@setting("drain", POSITIVE, "SECONDS", "Time limit for requests in flight after that.")
@setting(
    "watch",
    NOT_NEGATIVE,
    "SECONDS",
    "How often to check for new models; 0: never, nor in MLflow's registry.",
)
@setting("watch-registry", NOT_NEGATIVE, "SECONDS", "How often to poll the registry; 0: never.")
@click.option("--allow-nonfinite", is_flag=True, help="Pass NaN and infinities to the model.")
@click.option("--access-log", is_flag=True, help="Log each request.")
def command(
    sources: tuple[str, ...],
    parity: Path,
    allow_unverified: bool,
    token_file: Path | None,
    insecure: bool,
    cors: tuple[str, ...],
    max_rows: int,
    allow_nonfinite: bool,
    **options: Any,
) -> None:
    """Serve proven models over the Open Inference Protocol, version 2.

    A SOURCE is an ONNX file, FILE or NAME=FILE, or a version in MLflow's registry,
    models:/MODEL@ALIAS or models:/MODEL/VERSION, optionally with NAME= before it; default: the
    pipeline's models. Only files that the parity gate has passed are served. When an alias moves to
    another version, the server switches to that version.
    """
    with tempfile.TemporaryDirectory(prefix="mnist-bn-serve-") as state:
        # Read when prometheus_client and NumPy are imported. Another program's metrics are not
        # ours, and nothing here is worth a second thread.
        os.environ.pop(METRICS_DIR, None)
        if options["workers"] > 1:
            os.environ[METRICS_DIR] = state
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        modules = ("httptools", "orjson", "prometheus_client", "starlette", "uvicorn")
        require_packages("serving", "serve", modules)
        from mnist_batchnorm.serve.process.sources import parse_sources
        from mnist_batchnorm.serve.process.start import start

        settings = Settings(
            limits=Limits(max_rows, allow_nonfinite),
            token=read_token(token_file),
            origins=cors,
            state=Path(state),
            **options,
        )
        check(settings, insecure=insecure)
        found = parse_sources(sources, parity, Path(state), allow_unverified=allow_unverified)
        sys.exit(start(found, settings))


def check(settings: Settings, *, insecure: bool) -> None:
    """Raise UserError unless settings are consistent and the packages they need are installed."""
    if settings.grpc_port is not None:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own log has another form than ours
        require_packages("gRPC", "grpc,serve", ("grpc", "tritonclient.grpc.service_pb2"))
    if not settings.token and not insecure and not is_loopback(settings.host):
        raise UserError(
            f"--host {settings.host} lets other machines in: give a token by --token-file or "
            f"{TOKEN}, or say --insecure"
        )
    for origin in settings.origins:
        if not ORIGIN.fullmatch(origin):
            raise UserError(
                f"--cors: got {origin!r}, expected what browsers send as Origin, like "
                "https://app.example.org, or *"
            )
    if settings.max_bodies < settings.max_body:
        raise UserError(
            f"--max-bodies {settings.max_bodies}: expected --max-body, {settings.max_body}, or more"
        )


def require_packages(purpose: str, extra: str, modules: Iterable[str]) -> None:
    """Import modules of an extra, so that a missing one is a UserError at the start."""
    try:
        for module in modules:
            importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # tritonclient without gRPC raises the second
        raise UserError(
            f"{purpose} needs more packages ({error}): pip install 'mnist-batchnorm[{extra}]'"
        ) from None
