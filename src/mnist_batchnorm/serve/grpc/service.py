"""The Open Inference Protocol over gRPC: the same models, limits and metrics, on its own port."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from mnist_batchnorm.serve.core.control import Control
from mnist_batchnorm.serve.core.describe import find
from mnist_batchnorm.serve.core.protocol import RequestError, refuse
from mnist_batchnorm.serve.core.service import Headers, InferenceService
from mnist_batchnorm.serve.grpc.methods import Methods
from mnist_batchnorm.serve.grpc.protobuf import Message, decode_request, encode_response, parse
from mnist_batchnorm.serve.grpc.shutdown import Shutdown

Context = Any  # grpc.aio.ServicerContext
Handler = Callable[["Call"], Awaitable[None]]
Answer = Callable[[bytes, "Call"], Awaitable[Message]]

SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
HEALTH = ("ServerLive", "ServerReady")  # answered without a token, and by a full queue
USED_METADATA = frozenset(("authorization", "x-request-id", "traceparent"))
CODES = {  # HTTP -> gRPC
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
FINAL = "triton_enable_empty_final_response"  # asks a stream to mark its last answer
SLOW_CLIENT_S = 1.0  # a call whose message takes longer does not count as waiting for the server
CANCELLATION_S = 0.05  # in which gRPC cancels a call whose message it has rejected


@dataclass(eq=False, slots=True)
class Call:
    """A call in progress."""

    name: str  # of the method
    context: Context
    metadata: Headers  # the used part, like the headers of HTTP
    model: str = ""  # name of the requested model, once it is known
    unread: bool = False  # whether the call ended before its message was received


class GrpcService(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers gRPC calls; `draining`: whether the server stops.

    All calls are handled as streams, also those of one message, so that a call can be rejected
    before its message is read, and a slow message has a timeout.
    """

    def __init__(
        self, inference: InferenceService, control: Control, draining: Callable[[], bool]
    ) -> None:
        self.inference = inference
        self.settings = inference.settings
        self.metrics = inference.metrics
        self.methods = Methods(inference, control, draining)
        self.shutdown = Shutdown()
        self._slow: set[Call] = set()  # calls that wait for their client
        handlers: dict[str, Handler] = {
            method.name: partial(self._answer_one, partial(self._answer_method, method))
            for method in SERVICE.methods
        }
        handlers["ModelInfer"] = partial(self._answer_one, self._infer)
        handlers["ModelStreamInfer"] = self._answer_stream
        self._handlers = {
            name: grpc.stream_stream_rpc_method_handler(partial(self._handle, name, handler))
            for name, handler in handlers.items()
        }

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a call; None: there is no such call."""
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        return self._handlers.get(method) if service == SERVICE.full_name else None

    async def _handle(self, name: str, handler: Handler, _: object, context: Context) -> None:
        received = context.invocation_metadata()
        metadata = {k.encode(): value.encode() for k, value in received if k in USED_METADATA}
        call = Call(name, context, metadata)
        trace = self.inference.trace(metadata)
        context.set_trailing_metadata([(key.decode(), value.decode()) for key, value in trace])
        try:
            if name not in HEALTH:
                self.inference.authenticate(metadata)
                self.shutdown.check()
            await handler(call)
        except RequestError as error:
            context.set_code(CODES[error.status])
            context.set_details(self._reject(error, call))
            if CODES[error.status] is grpc.StatusCode.UNAVAILABLE:
                retry = ("grpc-retry-pushback-ms", "1000")  # gRPC's proposal A6
                context.set_trailing_metadata([*context.trailing_metadata(), retry])
        except asyncio.CancelledError:  # by the client, or at the end of the time to drain
            if call.unread:  # gRPC does not say which
                limit = self.settings.max_body
                why = f"a message of more than {limit} bytes, or its client left"
                unread = RequestError(why, reason="unread")
                self.inference.reject(unread, call.model, metadata, call=name)
            else:
                self.metrics.rejected("gone", call.model)
            raise

    def _reject(self, error: RequestError, call: Call) -> str:
        code = CODES[error.status].name
        return self.inference.reject(error, call.model, call.metadata, call=call.name, code=code)

    async def _answer_one(self, answer: Answer, call: Call) -> None:
        self._check_queue(call)
        with self._counted():
            # nested, so that the messages are released before the answer is sent
            content = (await answer(await self._read(call), call)).SerializeToString()
            await self._write(call, content)

    def _check_queue(self, call: Call) -> None:
        if call.name not in HEALTH:
            self.inference.check_queue(self.inference.open_calls - len(self._slow) + 1)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.inference.open_calls += 1
        try:
            yield
        finally:
            self.inference.open_calls -= 1

    async def _read(self, call: Call) -> bytes:
        slow = asyncio.get_running_loop().call_later(SLOW_CLIENT_S, self._slow.add, call)
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                raw = await call.context.read()
        except TimeoutError:
            seconds = f"{self.settings.body_timeout:g} s"
            raise RequestError(f"the message: not all here after {seconds}", 408, "slow") from None
        finally:
            slow.cancel()
            self._slow.discard(call)
        if raw is grpc.aio.EOF:
            call.unread = True
            await asyncio.sleep(CANCELLATION_S)
            call.unread = False
            refuse("the call", "no message", "one")
        return bytes(raw)  # not a copy

    async def _write(self, call: Call, answer: bytes) -> None:
        try:
            async with asyncio.timeout(self.settings.write_timeout):
                await call.context.write(answer)
        except TimeoutError:
            seconds = f"{self.settings.write_timeout:g} s"
            raise RequestError(f"the answer: not taken after {seconds}", 408, "stalled") from None

    async def _answer_method(self, method: Any, raw: bytes, call: Call) -> Message:
        message = parse(getattr(service_pb2, method.input_type.name), raw)
        return await self.methods.answer(call.name, message, call.metadata)

    async def _infer(self, raw: bytes, call: Call) -> Message:
        began = perf_counter()
        message = parse(service_pb2.ModelInferRequest, raw)
        model = find(self.inference.catalog, message.model_name, message.model_version or None)
        call.model = model.name
        meters = self.metrics.meters(model.name, model.version)
        codec = decode_request, (message,), encode_response
        try:
            response = self.inference.infer(
                (model, meters), call.metadata, began, *codec, call=call.name
            )
        except Exception:
            meters.failures.observe(perf_counter() - began)
            raise
        meters.flush()
        return response

    async def _answer_stream(self, call: Call) -> None:
        """Answer requests in their order; a rejected one does not end the stream."""
        while (raw := await self.shutdown.read(call.context)) is not grpc.aio.EOF:
            content = (await self._answer_streamed(raw, call)).SerializeToString()
            del raw  # before the answer is sent
            with self._counted():
                await self._write(call, content)

    async def _answer_streamed(self, raw: bytes, call: Call) -> Message:
        call.model = ""
        response = service_pb2.ModelStreamInferResponse()
        try:
            self._check_queue(call)
            answer = await self._infer(raw, call)
        except RequestError as error:
            response.error_message = self._reject(error, call)
            with contextlib.suppress(RequestError):
                response.infer_response.id = parse(service_pb2.ModelInferRequest, raw).id
        else:
            if FINAL in answer.parameters and answer.parameters[FINAL].bool_param:
                answer.parameters["triton_final_response"].bool_param = True
            response.infer_response.CopyFrom(answer)
        return response
