"""Tool serve: proven models over the Open Inference Protocol, version 2."""

import contextlib
import ipaddress
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mnist_batchnorm.errors import UserError
from mnist_batchnorm.layout import MODELS, REPORTS, SERVED

if TYPE_CHECKING:
    from mnist_batchnorm.serve.catalog import Source
    from mnist_batchnorm.serve.settings import Settings

TOKEN = "MNIST_BN_TOKEN"  # noqa: S105 - the variable's name
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client keeps what processes share
LONG_ENOUGH = 16  # characters of a token
ORIGIN = re.compile(r"\*|https?://[^/\s]+")
NAMES = {file: name for name, file in SERVED.items()}

seconds = click.FloatRange(min=0.0, min_open=True)


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on.",
)
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port to listen on; 0: any.",
)
@click.option(
    "--grpc-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Answer gRPC too, on this port; 0: any.",
)
@click.option(
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(1, 256),
    metavar="N",
    help="Processes that share the port.",
)
@click.option(
    "--parity",
    default=REPORTS / "parity.json",
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
@click.option(
    "--max-body",
    default=32 << 20,
    show_default=True,
    type=click.IntRange(1 << 10),
    metavar="BYTES",
    help="Largest body of a request, also when it is unpacked.",
)
@click.option(
    "--max-bodies",
    default=256 << 20,
    show_default=True,
    type=click.IntRange(1 << 10),
    metavar="BYTES",
    help="Largest sum of the bodies held at once over HTTP; more get 503.",
)
@click.option(
    "--max-rows",
    default=10_000,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Most images in a request.",
)
@click.option(
    "--max-connections",
    default=4096,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Most connections; one more gets 503.",
)
@click.option(
    "--queue",
    default=512,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Most requests that wait; one more gets 503.",
)
@click.option(
    "--head-timeout",
    default=10.0,
    show_default=True,
    type=seconds,
    metavar="SECONDS",
    help="For a request's head to arrive.",
)
@click.option(
    "--body-timeout",
    default=30.0,
    show_default=True,
    type=seconds,
    metavar="SECONDS",
    help="For its body to arrive.",
)
@click.option(
    "--write-timeout",
    default=30.0,
    show_default=True,
    type=seconds,
    metavar="SECONDS",
    help="In which a client must take some of its answer.",
)
@click.option(
    "--keep-alive",
    default=75.0,
    show_default=True,
    type=seconds,
    metavar="SECONDS",
    help="For which a connection may lie idle.",
)
@click.option(
    "--drain-delay",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.0),
    metavar="SECONDS",
    help="To serve on, not ready, after SIGTERM; more than the probes' period.",
)
@click.option(
    "--drain",
    default=20.0,
    show_default=True,
    type=seconds,
    metavar="SECONDS",
    help="For requests in flight to end after that.",
)
@click.option(
    "--watch",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.0),
    metavar="SECONDS",
    help="Between looks for new models; 0: never, nor in MLflow's registry.",
)
@click.option(
    "--watch-registry",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0.0),
    metavar="SECONDS",
    help="Between looks at MLflow's registry; 0: never.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Pass NaN and infinities to the model.")
@click.option("--access-log", is_flag=True, help="Log each request.")
def command(
    sources: tuple[str, ...],
    host: str,
    port: int,
    grpc_port: int | None,
    workers: int,
    parity: Path,
    allow_unverified: bool,
    token_file: Path | None,
    insecure: bool,
    cors: tuple[str, ...],
    max_body: int,
    max_bodies: int,
    max_rows: int,
    max_connections: int,
    queue: int,
    head_timeout: float,
    body_timeout: float,
    write_timeout: float,
    keep_alive: float,
    drain_delay: float,
    drain: float,
    watch: float,
    watch_registry: float,
    allow_nonfinite: bool,
    access_log: bool,
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
        if workers > 1:
            os.environ[SHARED] = state
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        require_extra()
        if grpc_port is not None:
            require_grpc()
        from mnist_batchnorm.serve.protocol import Limits
        from mnist_batchnorm.serve.settings import Settings

        token = read_token(token_file)
        if not token and not insecure and not is_loopback(host):
            raise UserError(
                f"--host {host} lets other machines in: give a token by --token-file or {TOKEN}, "
                "or say --insecure"
            )
        for origin in cors:
            if not ORIGIN.fullmatch(origin):
                raise UserError(
                    f"--cors: got {origin!r}, expected what browsers send as Origin, like "
                    "https://app.example.org, or *"
                )
        if max_bodies < max_body:
            raise UserError(f"--max-bodies {max_bodies}: expected --max-body, {max_body}, or more")
        settings = Settings(
            host=host,
            port=port,
            grpc_port=grpc_port,
            workers=workers,
            limits=Limits(max_rows, allow_nonfinite),
            max_body=max_body,
            max_bodies=max_bodies,
            max_connections=max_connections,
            queue=queue,
            head_timeout=head_timeout,
            body_timeout=body_timeout,
            write_timeout=write_timeout,
            keep_alive=keep_alive,
            drain_delay=drain_delay,
            drain=drain,
            token=token,
            origins=cors,
            access_log=access_log,
            watch=watch,
            watch_registry=watch_registry if watch else 0.0,
            state=Path(state),
        )
        found = sources_of(sources, parity, Path(state), allow_unverified=allow_unverified)
        sys.exit(start(found, settings))


def start(sources: "Sequence[Source]", settings: "Settings") -> int:
    """Serve in one process or several until told to end; return the exit status."""
    from mnist_batchnorm.serve.fetcher import fetching
    from mnist_batchnorm.serve.listener import fit_descriptors, listen, reserved
    from mnist_batchnorm.serve.registered import RegisteredSource
    from mnist_batchnorm.serve.roll import Roll

    assert settings.state
    roll = settings.state
    registered = [source for source in sources if isinstance(source, RegisteredSource)]
    settings = fit_descriptors(settings)
    with contextlib.ExitStack() as held:
        fetcher = held.enter_context(fetching(registered, settings.watch_registry))
        listener = held.enter_context(listen(settings))
        if settings.grpc_port is not None:
            settings = held.enter_context(reserved(settings))
        if settings.workers == 1:
            from mnist_batchnorm.serve.run import serve

            return serve(sources, settings, listener, Roll(roll), tend=fetcher.tend)
        from mnist_batchnorm.serve.workers import Workers

        def work(parent: int) -> int:
            from mnist_batchnorm.serve.run import serve

            fetcher.let_go()
            return serve(sources, settings, listener, Roll(roll), parent)

        return Workers(settings, listener, Roll(roll), work, fetcher.tend).run()


def sources_of(
    words: Sequence[str], parity: Path, state: Path, *, allow_unverified: bool
) -> "Sequence[Source]":
    """Make sources of what stands in the command line.

    Args:
        words: of the command line.
        parity: the gate's report on the files among them.
        state: folder for what is fetched from MLflow's registry.
        allow_unverified: serve whatever the reports say.

    Raises:
        UserError: An address in MLflow's registry is none, or a model's name fits into no URL.
    """
    from mnist_batchnorm.serve.catalog import FileSource
    from mnist_batchnorm.serve.registered import SCHEME, Address, RegisteredSource

    files = list(words) or [str(MODELS / file) for file in SERVED.values()]
    sources: list[Source] = []
    for number, word in enumerate(files):
        name, equals, what = ("", "", word) if word.startswith(SCHEME) else word.partition("=")
        if equals and (not name or "/" in name):
            raise UserError(
                f"{word}: got {name!r} before =, expected the model's name, without /; a file "
                "whose path has a = goes behind one, NAME=FILE"
            )
        if what.startswith(SCHEME):
            address = Address.parse(what)
            folder = state / "registry" / str(number)
            source = RegisteredSource(name or address.model, address, folder, allow_unverified)
            sources.append(source)
            continue
        path = Path(what if equals else word)
        known = name if equals else NAMES.get(path.name, path.stem)
        sources.append(FileSource(known, path, parity, allow_unverified))
    return sources


def read_token(path: Path | None) -> str | None:
    """Return the token that requests must bear: from a file, else from the environment.

    Raises:
        UserError: The file cannot be read, or the token is too short or not plain ASCII.
    """
    if path is None:
        token, where = os.environ.get(TOKEN, ""), TOKEN
        if not token:
            return None
    else:
        try:
            token, where = path.read_text(encoding="utf-8").strip(), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    if len(token) < LONG_ENOUGH or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{where} holds no token: expected {LONG_ENOUGH} or more visible ASCII characters; "
            "`openssl rand -hex 32` makes one"
        )
    return token


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
