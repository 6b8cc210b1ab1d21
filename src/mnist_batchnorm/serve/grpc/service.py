"""The Open Inference Protocol over gRPC: the same models, limits and figures, on its own port."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.parity.runtime import RuntimeFailedError
from mnist_batchnorm.serve.core import protocol
from mnist_batchnorm.serve.core.control import Control, allow_control, check_parameters
from mnist_batchnorm.serve.core.describe import (
    find,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.protocol import RequestError, busy, refuse, unauthorized
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.grpc.protobuf import (
    Message,
    model_config,
    parse,
    plain,
    read_request,
    write_answer,
)
from mnist_batchnorm.serve.http.app import App, has_token, told

Context = Any  # grpc.aio.ServicerContext
Work = Callable[["Call"], Awaitable[None]]
Answer = Callable[[bytes, "Call"], Awaitable[bytes]]
Cold = Callable[[Message, "Call"], Awaitable[Message]]

SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
METHODS = SERVICE.methods_by_name
EXTENSIONS = tuple(name for name in protocol.EXTENSIONS if name != "binary_tensor_data")
HEALTH = ("ServerLive", "ServerReady")  # free of the token
TRACED = frozenset(("authorization", "x-request-id", "traceparent"))
CODES = {  # of HTTP -> of gRPC
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
MISSING = {  # how a call begins that is not here -> what to do instead
    "SystemSharedMemory": "send the tensor in the request",
    "CudaSharedMemory": "send the tensor in the request",
    "TraceSetting": "send the metadata traceparent, which the log and the answer repeat",
    "LogSettings": "what is logged is said when the server is started, see --access-log",
}
FINAL = "triton_enable_empty_final_response"  # asks a stream to say which answer is the last
PROMPT = 1.0  # seconds; a call whose message takes longer waits for its client, not for the server
QUIET = 0.05  # seconds without a request after which a stream is ended when the server stops
LINGER = 1.0  # seconds after which it is ended although requests still come
PAUSE = 0.1  # seconds between looks at whether to end
KEEPALIVE = 60_000  # milliseconds between pings that find out clients which have vanished
PINGS = 10_000  # milliseconds that a client leaves between its own pings


@dataclass(eq=False, slots=True)
class Call:
    """A call that is being answered.

    Attributes:
        name: of the method.
        context: gRPC's.
        head: its metadata, as HTTP has them in headers.
        model: that it asks for, once that is known.
        unread: whether it ended before its message was here.
    """

    name: str
    context: Context
    head: dict[bytes, bytes]
    model: str = ""
    unread: bool = False


class Rpc(grpc.GenericRpcHandler):  # type: ignore[misc]
    """What answers calls.

    All calls are handled as streams, also those of one message: so a call is refused before its
    message is read, and a slow message has a time limit.

    Args:
        app: the application over HTTP, with which it shares models and figures.
        control: by which models are loaded and unloaded.
        settings: how to serve.
        draining: tells whether the server is about to end.
    """

    def __init__(
        self, app: App, control: Control, settings: Settings, draining: Callable[[], bool]
    ) -> None:
        self.app = app
        self.catalog = app.catalog
        self.metrics = app.metrics
        self.control = control
        self.settings = settings
        self.draining = draining
        self._token = settings.token.encode() if settings.token else None
        self._slow: set[Call] = set()  # those that wait for their client
        self._streams: set[asyncio.Timeout] = set()  # of those that wait for a request
        self._ends: float | None = None  # when nothing is waited for any more, in the loop's time
        self._came = 0.0  # when the last call came that was refused because the server stops
        cold: dict[str, Cold] = {
            "ServerLive": self.live,
            "ServerReady": self.ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server,
            "ModelMetadata": self.model,
            "ModelConfig": self.config,
            "ModelStatistics": self.statistics,
            "RepositoryIndex": self.index,
            "RepositoryModelLoad": self.load,
            "RepositoryModelUnload": self.unload,
        }
        work: dict[str, Work] = {
            name: partial(self._one, partial(self._cold, cold.get(name, self.missing)))
            for name in METHODS
        }
        work |= {"ModelInfer": partial(self._one, self._infer), "ModelStreamInfer": self._stream}
        self._handlers = {
            name: grpc.stream_stream_rpc_method_handler(partial(self._call, name, work[name]))
            for name in METHODS
        }

    def service(self, handler_call_details: Any) -> Any:
        """Return what handles a call; None: there is no such call."""
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        return self._handlers.get(method) if service == SERVICE.full_name else None

    async def _call(self, name: str, work: Work, _: object, context: Context) -> None:
        """Answer one call."""
        metadata = context.invocation_metadata()
        head = {key.encode(): value.encode() for key, value in metadata if key in TRACED}
        call = Call(name, context, head)
        trace = self.app.trace(head)
        context.set_trailing_metadata([(key.decode(), value.decode()) for key, value in trace])
        try:
            if self._token is not None and name not in HEALTH and not has_token(head, self._token):
                raise unauthorized()
            if self._ends is not None and name not in HEALTH:
                self._came = asyncio.get_running_loop().time()
                raise busy("the server stops")
            await work(call)
        except RequestError as error:
            code = self._rejected(error, call)
            context.set_code(code)
            context.set_details(str(error))
            if code is grpc.StatusCode.UNAVAILABLE:
                again = ("grpc-retry-pushback-ms", "1000")  # gRPC's proposal A6
                context.set_trailing_metadata([*context.trailing_metadata(), again])
        except asyncio.CancelledError:  # by the client, or by the end of the time to drain
            self.metrics.rejected("unread" if call.unread else "gone", call.model)
            if call.unread:  # gRPC does not say which
                why = f"a message of more than {self.settings.max_body} bytes, or its client left"
                log("rejected", call=name, reason="unread", why=why, **told(head))
            raise

    def _rejected(self, error: RequestError, call: Call) -> Any:
        """Count and log a refusal; return its code."""
        code, model = CODES[error.status], call.model
        self.metrics.rejected(error.reason, model)
        told_why = {"reason": error.reason, "why": str(error)}
        log("rejected", call=call.name, code=code.name, **told_why, model=model, **told(call.head))
        return code

    async def _one(self, answer: Answer, call: Call) -> None:
        """Answer a call of one message with one message."""
        self._check_queue(call)
        with self._counted():
            # The message is not kept until its answer is taken.
            await self._write(call, await answer(await self._read(call), call))

    def _check_queue(self, call: Call) -> None:
        waiting = self.app.calls - len(self._slow)
        if waiting >= self.settings.queue and call.name not in HEALTH:
            raise busy("the server is busy, try again")

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.app.calls += 1
        try:
            yield
        finally:
            self.app.calls -= 1

    async def _read(self, call: Call) -> bytes:
        """Read the one message of a call.

        Raises:
            RequestError: It is not here in time, or there is none.
        """
        promptly = asyncio.get_running_loop().call_later(PROMPT, self._slow.add, call)
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                raw = await call.context.read()
        except TimeoutError:
            seconds = f"{self.settings.body_timeout:g} s"
            raise RequestError(f"the message: not all here after {seconds}", 408, "slow") from None
        finally:
            promptly.cancel()
            self._slow.discard(call)
        if raw is grpc.aio.EOF:
            call.unread = True
            await asyncio.sleep(QUIET)  # is cancelled where gRPC has ended the call already
            call.unread = False
            refuse("the call", "no message", "one")
        message: bytes = raw
        return message

    async def _write(self, call: Call, answer: bytes) -> None:
        """Send an answer.

        Raises:
            RequestError: The client does not take it in time.
        """
        try:
            async with asyncio.timeout(self.settings.write_timeout):
                await call.context.write(answer)
        except TimeoutError:
            seconds = f"{self.settings.write_timeout:g} s"
            raise RequestError(f"the answer: not taken after {seconds}", 408, "stalled") from None

    # --- inference ------------------------------------------------------------------------------

    async def _infer(self, raw: bytes, call: Call) -> bytes:
        answer: bytes = self._computed(raw, call).SerializeToString()
        return answer

    def _computed(self, raw: bytes, call: Call) -> Message:
        """Compute the answer to a ``ModelInferRequest``.

        Raises:
            RequestError: It is refused.
        """
        began = perf_counter()
        message = parse(service_pb2.ModelInferRequest, raw)
        model = find(self.catalog, message.model_name, message.model_version or None)
        call.model = model.name
        meters = self.metrics.of(model.name, model.version)
        try:
            request = read_request(message, self.settings.limits)
            parsed = perf_counter()
            logits = model.run(request.images)
            ran = perf_counter()
            answer = write_answer(message, request, logits, model)
        except Exception as error:
            meters.failed(perf_counter() - began)
            if not isinstance(error, RuntimeFailedError):
                raise
            log("failed", "error", model=model.name, why=str(error))
            raise RequestError(f"the model does not run: {error}", 500, "runtime") from None
        encoded = perf_counter()
        meters.answered(len(logits), began, parsed, ran, encoded)
        meters.count()
        if self.settings.access_log:
            log(
                "infer",
                call=call.name,
                model=model.name,
                version=model.version,
                rows=len(logits),
                seconds=round(encoded - began, 6),
                **told(call.head),
            )
        return answer

    async def _stream(self, call: Call) -> None:
        """Answer requests in their order; one that is refused does not end the stream."""
        while (raw := await self._next(call.context)) is not grpc.aio.EOF:
            answer = self._streamed(raw, call).SerializeToString()
            del raw  # it is not kept until its answer is taken
            with self._counted():
                await self._write(call, answer)

    async def _next(self, context: Context) -> Any:
        """Read a stream's next request, or its end.

        Raises:
            RequestError: The server stops.
        """
        now = asyncio.get_running_loop().time()
        until = None if self._ends is None else min(now + QUIET, self._ends)
        try:
            async with asyncio.timeout_at(until) as patience:
                self._streams.add(patience)
                return await context.read()
        except TimeoutError:
            raise busy("the server stops") from None
        finally:
            self._streams.discard(patience)

    def _streamed(self, raw: bytes, call: Call) -> Message:
        call.model = ""
        response = service_pb2.ModelStreamInferResponse()
        try:
            self._check_queue(call)
            answer = self._computed(raw, call)
        except RequestError as error:
            self._rejected(error, call)
            response.error_message = str(error)
            with contextlib.suppress(RequestError):
                message = parse(service_pb2.ModelInferRequest, raw)
                response.infer_response.id = message.id
        else:
            if FINAL in answer.parameters and answer.parameters[FINAL].bool_param:
                answer.parameters["triton_final_response"].bool_param = True
            response.infer_response.CopyFrom(answer)
        return response

    async def drain(self, at_once: Callable[[], bool]) -> None:
        """Refuse new calls, and end each stream as soon as what it has sent is answered.

        gRPC cancels calls that come while it shuts down, so this returns when no more come, or
        after a second.

        Args:
            at_once: tells whether nothing is to be waited for.
        """
        time = asyncio.get_running_loop().time
        self._came = time()
        self._ends = self._came + LINGER
        for patience in self._streams:
            patience.reschedule(self._came + QUIET)
        while time() < min(self._ends, self._came + 2 * QUIET) and not at_once():
            await asyncio.sleep(QUIET)

    # --- everything else ------------------------------------------------------------------------

    async def _cold(self, work: Cold, raw: bytes, call: Call) -> bytes:
        kind = getattr(service_pb2, METHODS[call.name].input_type.name)
        answer: bytes = (await work(parse(kind, raw), call)).SerializeToString()
        return answer

    async def missing(self, _: Message, call: Call) -> Message:
        """Refuse a call that is not here."""
        instead = next(told for start, told in MISSING.items() if call.name.startswith(start))
        raise RequestError(f"{call.name} is not served here: {instead}", 501, "path")

    async def live(self, *_: object) -> Message:
        """Answer that the process does its work."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ready(self, *_: object) -> Message:
        """Answer whether requests may come."""
        ready = self.catalog.ready and not self.draining()
        return service_pb2.ServerReadyResponse(ready=ready)

    async def model_ready(self, message: Message, _: Call) -> Message:
        """Answer whether a model may be asked; one that is not here may not."""
        model = self.catalog.find(message.name, message.version or None)
        return service_pb2.ModelReadyResponse(ready=model is not None and not self.draining())

    async def server(self, *_: object) -> Message:
        """Answer what the server is."""
        return service_pb2.ServerMetadataResponse(**server_metadata(EXTENSIONS))

    async def model(self, message: Message, _: Call) -> Message:
        """Answer what a model takes and gives."""
        model = find(self.catalog, message.name, message.version or None)
        metadata = model_metadata(self.catalog, model, chosen=bool(message.version))
        return service_pb2.ModelMetadataResponse(**metadata)

    async def config(self, message: Message, _: Call) -> Message:
        """Answer how a model is served, and whether it is proven."""
        model = find(self.catalog, message.name, message.version or None)
        return model_config(model, self.settings.limits, self.settings.workers)

    async def statistics(self, message: Message, _: Call) -> Message:
        """Answer what a model has done, or all."""
        asked = message.name or None, message.version or None
        figures = model_statistics(self.catalog, self.metrics, *asked)
        return service_pb2.ModelStatisticsResponse(model_stats=figures)

    async def index(self, message: Message, _: Call) -> Message:
        """Answer which models there are, served or not."""
        check_repository(message)
        rows = repository_index(self.catalog, only_ready=message.ready)
        return service_pb2.RepositoryIndexResponse(models=rows)

    async def load(self, message: Message, call: Call) -> Message:
        """Serve a model that was unloaded, or look whether its file has changed."""
        self._check_change(message, call)
        problem = await self.control.load(message.model_name)
        if problem:
            raise RequestError(problem, 409, "unproven")
        return service_pb2.RepositoryModelLoadResponse()

    async def unload(self, message: Message, call: Call) -> Message:
        """Serve a model no longer."""
        self._check_change(message, call)
        await self.control.unload(message.model_name)
        return service_pb2.RepositoryModelUnloadResponse()

    def _check_change(self, message: Message, call: Call) -> None:
        allow_control(self.settings, call.head)
        check_repository(message)
        self.control.require(message.model_name)
        check_parameters(plain(message.parameters))


def check_repository(message: Message) -> None:
    """Refuse to look at another repository than the one that there is.

    Raises:
        RequestError: The message names one.
    """
    if message.repository_name:
        refuse("repository_name", message.repository_name, "none: this server has no others")


# --- the port -----------------------------------------------------------------------------------


class RpcServer:
    """A port on which calls are answered.

    Args:
        rpc: what answers them.
    """

    def __init__(self, rpc: Rpc) -> None:
        self.rpc = rpc
        self._server = grpc.aio.server(handlers=[rpc], options=options(rpc.settings))

    async def start(self) -> str:
        """Take calls; return the address at which they come, ``host:port``.

        Raises:
            UserError: The port cannot be had.
        """
        settings = self.rpc.settings
        assert settings.grpc_port
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port}"
        try:
            self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise UserError(f"cannot listen on {address}: {error}") from None
        await self._server.start()
        return address

    async def run(self, ends: Callable[[], bool], at_once: Callable[[], bool]) -> None:
        """Answer calls until the server ends, then those that are open until their time is over.

        Args:
            ends: tells whether no more calls are to be taken.
            at_once: tells whether nothing is to be waited for.
        """
        while not ends():
            await asyncio.sleep(PAUSE)
        await self.rpc.drain(at_once)
        ending = asyncio.create_task(self._server.stop(self.rpc.settings.drain))
        while not ending.done():
            if at_once():
                await self._server.stop(None)
            await asyncio.wait({ending}, timeout=PAUSE)
        await ending


def options(settings: Settings) -> list[tuple[str, int]]:
    """Return what gRPC is told; see ``grpc/impl/channel_arg_names.h`` in its sources."""
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.max_body),  # also after decompression
        ("grpc.max_metadata_size", settings.max_head),
        ("grpc.absolute_max_metadata_size", settings.max_head),
        ("grpc.max_concurrent_streams", settings.queue),  # of a connection: the others wait
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", round(settings.head_timeout * 1000)),
        ("grpc.max_connection_idle_ms", round(settings.keep_alive * 1000)),
        ("grpc.keepalive_time_ms", KEEPALIVE),
        ("grpc.http2.min_ping_interval_without_data_ms", PINGS),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
