"""TODO."""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mnist_batchnorm.core.access import TOKEN, is_loopback, read_token
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import PARITY
from mnist_batchnorm.serve.core.metrics_dir import SHARED
from mnist_batchnorm.serve.core.settings import Limits, Settings
from mnist_batchnorm.serve.process.sources import sources_of
from mnist_batchnorm.serve.process.start import start

F = TypeVar("F", bound=Callable[..., Any])

ORIGIN = re.compile(r"\*|https?://[^/\s]+")

SOME = click.FloatRange(min=0.0, min_open=True)

ANY = click.FloatRange(0.0)


def setting(name: str, kind: "click.ParamType[Any]", metavar: str, says: str) -> Callable[[F], F]:
    """Make an option of the setting with this name."""
    default = getattr(Settings, name.replace("-", "_"))
    return click.option(
        f"--{name}", default=default, show_default=True, type=kind, metavar=metavar, help=says
    )


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@setting("host", click.STRING, "ADDRESS", "Address to listen on.")
@setting("port", click.IntRange(0, 65535), "PORT", "Port to listen on; 0: any.")
@setting("grpc-port", click.IntRange(0, 65535), "PORT", "Answer gRPC too, on this port; 0: any.")
@setting("workers", click.IntRange(1, 256), "N", "Processes that share the port.")
@click.option(
    "--parity",
    default=PARITY,
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The gate's report on the files.",
)
@click.option("--allow-unverified", is_flag=True, help="Serve what the gate has not passed.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Holds the token that requests must bear; {TOKEN} may, too.",
)
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without a token.")
@click.option(
    "--cors", multiple=True, metavar="ORIGIN", help="A site whose pages may ask; may be repeated."
)
@setting(
    "max-body",
    click.IntRange(1 << 10),
    "BYTES",
    "Largest body of a request, also when it is unpacked.",
)
@setting(
    "max-bodies",
    click.IntRange(1 << 10),
    "BYTES",
    "Largest sum of the bodies held at once over HTTP; more get 503.",
)
@click.option(
    "--max-rows",
    default=Limits.rows,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Most images in a request.",
)
@setting("max-connections", click.IntRange(1), "N", "Most connections; one more gets 503.")
@setting("queue", click.IntRange(1), "N", "Most requests that wait; one more gets 503.")
@setting("head-timeout", SOME, "SECONDS", "For a request's head to arrive.")
@setting("body-timeout", SOME, "SECONDS", "For its body to arrive.")
@setting("write-timeout", SOME, "SECONDS", "In which a client must take some of its answer.")
@setting("keep-alive", SOME, "SECONDS", "For which a connection may lie idle.")
@setting(
    "drain-delay",
    ANY,
    "SECONDS",
    "To serve on, not ready, after SIGTERM; more than the probes' period.",
)
@setting("drain", SOME, "SECONDS", "For requests in flight to end after that.")
@setting(
    "watch", ANY, "SECONDS", "Between looks for new models; 0: never, nor in MLflow's registry."
)
@setting("watch-registry", ANY, "SECONDS", "Between looks at MLflow's registry; 0: never.")
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
    models:/MODEL@ALIAS or models:/MODEL/VERSION, that too with NAME= before it; without one, the
    pipeline's models. Only files that the parity gate has passed are served. An alias is followed:
    the version that it is moved to is served from then on.
    """
    with tempfile.TemporaryDirectory(prefix="mnist-bn-serve-") as state:
        # Read when prometheus_client and NumPy are imported. Another program's figures are not
        # ours, and nothing here is worth a second thread.
        os.environ.pop(SHARED, None)
        if options["workers"] > 1:
            os.environ[SHARED] = state
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        require_extra()
        settings = Settings(
            limits=Limits(max_rows, allow_nonfinite),
            token=read_token(token_file),
            origins=cors,
            state=Path(state),
            **options,
        )
        check(settings, insecure=insecure)
        found = sources_of(sources, parity, Path(state), allow_unverified=allow_unverified)
        sys.exit(start(found, settings))


def check(settings: Settings, *, insecure: bool) -> None:
    """Make sure that settings fit each other, and that what they need is installed.

    Args:
        settings: how to serve.
        insecure: whether other machines may ask without a token.

    Raises:
        UserError: They do not, or it is not.
    """
    if settings.grpc_port is not None:
        require_grpc()
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


def require_extra() -> None:
    """Make sure that what only the server needs is installed.

    Raises:
        UserError: It is not.
    """
    try:
        import httptools  # noqa: F401
        import orjson  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serving needs more packages ({error}): pip install 'mnist-batchnorm[serve]'"
        ) from None


def require_grpc() -> None:
    """Make sure that what only gRPC needs is installed.

    Raises:
        UserError: It is not.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own log has another form than ours
    try:
        import grpc  # noqa: F401
        from tritonclient.grpc import service_pb2  # noqa: F401
    except (ImportError, RuntimeError) as error:  # the second where only parts are installed
        raise UserError(
            f"gRPC needs more packages ({error}): pip install 'mnist-batchnorm[grpc,serve]'"
        ) from None
