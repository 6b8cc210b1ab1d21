"""Real services on this machine, each stopped by its own with-block: databases, servers, faults."""

import contextlib
import http.client
import os
import pwd
import random
import re
import secrets
import select
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.support import commands

HOST = "127.0.0.1"
PATIENCE = 60.0  # seconds for a service to start; the machine may be busy
STOP = 10.0  # seconds for it to end when told to
CHUNK = 1 << 16  # bytes passed on at a time
SERVER = {
    # as `make ui`: its runner of LLM-scoring jobs is 8 more processes and 2 GB
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def free_port() -> int:
    """A port that nobody listens on, and that the system gives to no connection by itself."""
    choice = random.SystemRandom()
    while True:
        port = choice.randrange(20_000, 32_000)  # below Linux's range for outgoing connections
        with contextlib.suppress(OSError), socket.create_server((HOST, port)):
            return port


def wait_for(
    ready: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Callable[[], str]
) -> None:
    """Wait until a service is ready; fail with its log if it ends or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        ended, late = process.poll(), time.monotonic() > deadline
        if ended is not None or late:
            what = "does not answer" if ended is None else f"ended with {ended}"
            pytest.fail(f"the service {what}:\n{log()}")
        time.sleep(0.05)


def isolated(**changed: str) -> dict[str, str]:
    """`commands.environment` without this machine's S3 settings."""
    kept = {name: value for name, value in commands.environment().items() if name[:4] != "AWS_"}
    return kept | changed


# ---------------------------------------------------------------------------------- PostgreSQL


def postgres_programs() -> Path | None:
    """The folder with PostgreSQL's programs, the newest one's; Debian keeps it off PATH."""
    installed = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    by_version = sorted(installed, key=lambda path: float(path.parts[-3]))
    found = by_version[-1] if by_version else shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def require_postgres() -> Path:
    """The folder with PostgreSQL's programs; without them, skip the test."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return programs


def unprivileged() -> str | None:
    """The user that PostgreSQL runs as, which refuses root."""
    if os.geteuid() != 0:
        return None
    known = {user.pw_name for user in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), None)


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The SQLAlchemy address of an empty PostgreSQL database, its log in a folder."""
    import psycopg

    programs, user, password = require_postgres(), unprivileged(), secrets.token_hex(8)
    group = None if user is None else pwd.getpwnam(user).pw_gid
    port, log = free_port(), folder / "postgres.log"
    # that user may not pass through pytest's folders, which are this user's own
    with (
        tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp" if user else None) as home,
        log.open("wb") as output,
    ):
        data, secret = Path(home, "data"), Path(home, "password")
        secret.write_text(password)
        if user:
            for path in (home, secret):
                shutil.chown(path, user, group)

        def start(program: str, *words: str) -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                [programs / program, "-D", data, *words],
                cwd=home,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                user=user,
                group=group,
                extra_groups=[] if user else None,
            )

        as_user = ["--username=mlflow", "--auth=scram-sha-256", f"--pwfile={secret}"]
        plain = ["--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        with stopping(start("initdb", *as_user, *plain)) as initdb:
            if initdb.wait(PATIENCE) != 0:
                pytest.fail(f"initdb:\n{log.read_text(errors='replace')}")

        settings = {
            "listen_addresses": HOST,
            "port": str(port),
            "unix_socket_directories": "",
            # what it loses when the machine goes down nobody misses
            "fsync": "off",
            "full_page_writes": "off",
            "synchronous_commit": "off",
            "shared_buffers": "16MB",
        }
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        where = f"mlflow:{password}@{HOST}:{port}/postgres"

        def ready() -> bool:
            try:
                psycopg.connect(f"postgresql://{where}", connect_timeout=2).close()
            except psycopg.OperationalError:
                return False
            return True

        with stopping(start("postgres", *words)) as server:
            wait_for(ready, server, lambda: log.read_text(errors="replace"))
            yield f"postgresql+psycopg://{where}"


@contextlib.contextmanager
def stopping(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """End one of PostgreSQL's programs when the block ends; each takes its children along."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGQUIT)  # to the server: at once, children first
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()  # its children see that, and end
                process.wait(STOP)


# -------------------------------------------------------------------------------------- MLflow


@dataclass
class Server:
    """A real ``mlflow server``."""

    port: int
    words: list[str]
    folder: Path
    env: Mapping[str, str]
    _command: commands.Command | None = field(default=None, init=False)

    @property
    def uri(self) -> str:
        """Its address."""
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """What it has said since it was started last."""
        return "" if self._command is None else self._command.err

    def start(self) -> None:
        """Start it, the same port and the same store, and wait until it answers."""
        assert self._command is None, "it is running"
        self._command = commands.Command(self.folder, *self.words, env=self.env)
        wait_for(self.healthy, self._command.process, lambda: self.log)

    def healthy(self) -> bool:
        """Whether it answers now."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def pause(self) -> None:
        """Stop all of its processes where they are: connections are taken, nothing is answered."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on, with what has arrived meanwhile."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """Kill all of its processes, as a power cut would."""
        if self._command is not None:
            self._command.kill()
            self._command = None

    def _send(self, number: signal.Signals) -> None:
        assert self._command is not None, "it is not running"
        for process in self._command.processes():
            os.kill(process, number)


@contextlib.contextmanager
def mlflow_server(
    backend_uri: str, artifacts: str, *, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """An MLflow server that keeps runs in a database and hands artefacts on to ``artifacts``."""
    port, home = free_port(), folder / "mlflow-server"
    home.mkdir()
    where = ["--host", HOST, "--port", str(port), "--workers", "1"]
    kept = ["--serve-artifacts", "--artifacts-destination", artifacts]
    words = ["mlflow", "server", *where, "--backend-store-uri", backend_uri, *kept]
    server = Server(port, words, home, isolated(**SERVER, **(env or {})))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@dataclass(frozen=True)
class Shared:
    """A server on PostgreSQL that tests use one after the other."""

    uri: str
    database: str

    def empty(self) -> None:
        """Forget everything but the schema; what the artefacts were stays on disk, unseen."""
        with psycopg.connect(self.database.replace("+psycopg", "")) as connection:
            connection.execute("TRUNCATE experiments, registered_models CASCADE")


@contextlib.contextmanager
def mlflow_on_postgres(folder: Path) -> Iterator[Shared]:
    """MLflow as a team runs it: a server over HTTP, PostgreSQL behind it, proxied artefacts."""
    with (
        postgres(folder) as database,
        mlflow_server(database, str(folder / "artefacts"), folder=folder) as server,
    ):
        yield Shared(server.uri, database)


# -------------------------------------------------------------------------------------- faults

Mode = Literal["pass", "500", "hang", "refuse", "drop", "full"]

WRITES = re.compile(r"(PUT|PATCH|DELETE) |POST (?!.*/search$)")  # MLflow searches with POST


class Faulty:
    """A reverse proxy that passes requests on, byte for byte, or fails as it is told to.

    ``pass``: hand the request on and the answer back; 502 when the server is down.
    ``500``: answer 500.  ``full``: answer 507 to what writes, and pass what reads.
    ``hang``: answer nothing; what still waits at the next switch is treated in that mode.
    ``refuse``: reset the connection.
    ``drop``: have the server do it, then close the connection without handing its answer back.
    """

    def __init__(self, uri: str) -> None:
        """Stand in front of a server."""
        place = urlsplit(uri)
        assert place.hostname is not None
        assert place.port is not None
        self.target = (place.hostname, place.port)
        self.requests: list[str] = []  # each as "POST /path", in the order of arrival
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._closed = False
        self._switches = 0
        self._set("pass", "", None)

    def __enter__(self) -> Self:
        self._listener = _Listener(self)
        # how long it takes to see that it shall stop
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown()
        self._thread.join()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for connection in self._open:
                _shut(connection)
        self._listener.server_close()  # waits for the threads of the connections

    @property
    def uri(self) -> str:
        """Its own address."""
        return f"http://{HOST}:{self._listener.server_address[1]}"

    def switch(self, mode: Mode, *, only: str = "", times: int | None = None) -> None:
        """Fail so from now on; or only requests that a regex finds, or only so many; others pass.

        The regex is searched in "POST /path?query".
        """
        with self._changed:
            self._set(mode, only, times)
            self._changed.notify_all()

    def _set(self, mode: Mode, only: str, times: int | None) -> None:
        self._mode, self._only, self._left = mode, re.compile(only), times
        self._switches += 1

    def _take(self) -> Mode:
        """The mode for one more request that is meant."""
        if self._left is not None:
            if self._left == 0:
                return "pass"
            self._left -= 1
        return self._mode

    def _judge(self, request: str, client: socket.socket) -> Mode:
        """What shall become of a request; comes back when that is not to hang."""
        with self._changed:
            self.requests.append(request)
            while True:
                mode = self._take() if self._only.search(request) else "pass"
                if mode != "hang":
                    return "pass" if mode == "full" and not WRITES.match(request) else mode
                asked = self._switches
                while asked == self._switches:
                    if self._closed or _gone(client):
                        return "refuse"
                    self._changed.wait(0.1)

    @contextlib.contextmanager
    def _watched(self, connection: socket.socket) -> Iterator[None]:
        """Have a connection shut when the proxy is."""
        with self._changed:
            self._open.add(connection)
            if self._closed:
                _shut(connection)
        try:
            yield
        finally:
            with self._changed:
                self._open.discard(connection)


class _Listener(socketserver.ThreadingTCPServer):
    """Takes the connections of a `Faulty`."""

    allow_reuse_address = True
    daemon_threads = False  # so that closing waits for them
    request_queue_size = 64

    def __init__(self, faulty: Faulty) -> None:
        """Listen on a free port."""
        super().__init__((HOST, 0), _Connection)
        self.faulty = faulty


class _Connection(socketserver.StreamRequestHandler):
    """One connection to a `Faulty`, which is one request."""

    server: _Listener
    connection: socket.socket

    def handle(self) -> None:
        """Read the request's head and do with it what the proxy says."""
        faulty = self.server.faulty
        with faulty._watched(self.connection), contextlib.suppress(OSError):
            head = self._read_head()
            if not head:
                return
            mode = faulty._judge(b" ".join(head[0].split()[:2]).decode("latin-1"), self.connection)
            if mode == "refuse":
                # close sends a reset, without waiting
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            elif mode in ("500", "full"):
                self._answer(500 if mode == "500" else 507)
            else:
                self._pass_on(head, answer=mode == "pass")

    def finish(self) -> None:
        """Close the two files."""
        with contextlib.suppress(OSError):
            super().finish()

    def _read_head(self) -> list[bytes]:
        """The lines before the body, without the empty one; none if the client left."""
        lines = []
        while (line := self.rfile.readline(CHUNK)) not in (b"\r\n", b"\n"):
            if not line.endswith(b"\n"):
                return []
            lines.append(line)
        return lines

    def _answer(self, status: int) -> None:
        """Answer with nothing but a status."""
        head = f"HTTP/1.1 {status} {http.client.responses[status]}\r\n"
        self.connection.sendall(f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(STOP)
        # A close with something unread would reset the connection, answer and all.
        while self.rfile.read1(CHUNK):
            pass

    def _pass_on(self, head: list[bytes], answer: bool) -> None:
        """Send the request to the server, and the answer back or nowhere."""
        try:
            server = socket.create_connection(self.server.faulty.target, STOP)
        except OSError:
            self._answer(502)
            return
        # One request a connection: where it ends, the answer ends, whatever encoding it has.
        hop = (b"connection:", b"keep-alive:")
        kept = [line for line in head if not line.lower().startswith(hop)]
        with server, self.server.faulty._watched(server):
            server.settimeout(None)  # Server.pause may take long, and the client knows how long
            server.sendall(b"".join([*kept, b"Connection: close\r\n\r\n"]))
            upload = threading.Thread(target=self._upload, args=(server,))
            upload.start()
            try:
                with contextlib.suppress(OSError):
                    while part := server.recv(CHUNK):
                        if answer:
                            self.connection.sendall(part)
                    if answer:
                        self.connection.shutdown(socket.SHUT_WR)
                        upload.join(STOP)  # until the client has read the answer and closed
            finally:
                _shut(self.connection)
                upload.join()

    def _upload(self, server: socket.socket) -> None:
        """Hand the body on until the client or the server closes."""
        with contextlib.suppress(OSError, ValueError):
            while part := self.rfile.read1(CHUNK):
                with contextlib.suppress(OSError):  # it has answered already: read on
                    server.sendall(part)
        _shut(server)  # the client has left: so does the proxy


def _shut(connection: socket.socket) -> None:
    """End both directions, so that whoever waits for the connection goes on."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _gone(client: socket.socket) -> bool:
    """Whether the other end has closed, read or unread bytes before that or not."""
    poll = select.poll()
    poll.register(client, getattr(select, "POLLRDHUP", 0))  # of Linux; elsewhere HUP says it
    return bool(poll.poll(0))


# ------------------------------------------------------------------------------------------ S3


@dataclass(frozen=True)
class S3:
    """A bucket in an S3-compatible server."""

    endpoint: str
    bucket: str

    @property
    def credentials(self) -> dict[str, str]:
        """The variables that give access to it."""
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",  # asks nobody beyond this machine for keys
        }

    @property
    def environment(self) -> dict[str, str]:
        """The variables that give access to it and say where it is."""
        where = {"AWS_ENDPOINT_URL": self.endpoint, "MLFLOW_S3_ENDPOINT_URL": self.endpoint}
        return self.credentials | where

    def objects(self) -> dict[str, bytes]:
        """All that lies in the bucket, by its key."""
        with self._client() as client:
            listed = client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
            keys = [entry["Key"] for entry in listed]
            return {
                key: client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys
            }

    def put(self, key: str, content: bytes) -> None:
        """Store an object."""
        with self._client() as client:
            client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def _client(self) -> "contextlib.closing[Any]":
        import boto3

        settings = self.credentials
        return contextlib.closing(
            boto3.session.Session(
                aws_access_key_id=settings["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
                region_name=settings["AWS_DEFAULT_REGION"],
            ).client("s3", endpoint_url=self.endpoint)
        )


@contextlib.contextmanager
def s3(bucket: str) -> Iterator[S3]:
    """An S3-compatible server with an empty bucket."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line a request
    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        store = S3(f"http://{host}:{port}", bucket)
        with store._client() as client:
            client.create_bucket(Bucket=bucket)
        yield store
        # its buckets are this process's, not the server's
        connection = http.client.HTTPConnection(host, port, timeout=STOP)
        with contextlib.closing(connection):
            connection.request("POST", "/moto-api/reset")
            connection.getresponse().read()
    finally:
        server.stop()
