"""Tool serve: proven models over the Open Inference Protocol, version 2."""

import contextlib
import ipaddress
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mnist_batchnorm.errors import UserError
from mnist_batchnorm.layout import MODELS, PARITY, SERVED
from mnist_batchnorm.serve.settings import Limits, Settings

if TYPE_CHECKING:
    from mnist_batchnorm.serve.catalog import Source

F = TypeVar("F", bound=Callable[..., Any])
TOKEN = "MNIST_BN_TOKEN"  # noqa: S105 - the variable's name
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client keeps what processes share
LONG_ENOUGH = 16  # characters of a token
ORIGIN = re.compile(r"\*|https?://[^/\s]+")
NAMES = {file: name for name, file in SERVED.items()}

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


def start(sources: "Sequence[Source]", settings: Settings) -> int:
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
        fetcher = held.enter_context(fetching(registered, settings.registry_period))
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
        UserError: An address in MLflow's registry is none, or a model's name fits into no URL or is
            not UTF-8.
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
    for word, named in zip(files, sources, strict=True):
        try:
            named.name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{word}: got the name {named.name!r}, expected one in UTF-8; NAME=FILE gives a "
                "file another"
            ) from None
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
