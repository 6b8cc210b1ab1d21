"""The calls of one message except for inference: health, metadata, statistics, repository."""

from collections.abc import Awaitable, Callable

from tritonclient.grpc import service_pb2

from mnist_batchnorm.serve.core import protocol
from mnist_batchnorm.serve.core.control import Control, check_parameters
from mnist_batchnorm.serve.core.describe import (
    find,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)
from mnist_batchnorm.serve.core.protocol import RequestError, refuse
from mnist_batchnorm.serve.core.service import Headers, InferenceService
from mnist_batchnorm.serve.grpc.protobuf import Message, model_config, to_python

Method = Callable[[Message, Headers], Awaitable[Message]]

EXTENSIONS = tuple(name for name in protocol.EXTENSIONS if name != "binary_tensor_data")
ALTERNATIVES = {  # start of the name of a call that is not served -> what to do instead
    "SystemSharedMemory": "send the tensor in the request",
    "CudaSharedMemory": "send the tensor in the request",
    "TraceSetting": "send the metadata traceparent, which the log and the answer repeat",
    "LogSettings": "what is logged is said when the server is started, see --access-log",
}


class Methods:
    """The implementation of each call, by its name; `draining`: whether the server stops."""

    def __init__(
        self, service: InferenceService, control: Control, draining: Callable[[], bool]
    ) -> None:
        self.service = service
        self.catalog = service.catalog
        self.control = control
        self.draining = draining
        self._methods: dict[str, Method] = {
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

    async def answer(self, name: str, message: Message, metadata: Headers) -> Message:
        """Answer a call; raises RequestError."""
        method = self._methods.get(name)
        if method is None:
            instead = next(text for start, text in ALTERNATIVES.items() if name.startswith(start))
            raise RequestError(f"{name} is not served here: {instead}", 501, "path")
        return await method(message, metadata)

    async def live(self, *_: object) -> Message:
        return service_pb2.ServerLiveResponse(live=True)

    async def ready(self, *_: object) -> Message:
        ready = self.catalog.ready and not self.draining()
        return service_pb2.ServerReadyResponse(ready=ready)

    async def model_ready(self, message: Message, _: Headers) -> Message:
        model = self.catalog.find(message.name, message.version or None)
        return service_pb2.ModelReadyResponse(ready=model is not None and not self.draining())

    async def server(self, *_: object) -> Message:
        return service_pb2.ServerMetadataResponse(**server_metadata(EXTENSIONS))

    async def model(self, message: Message, _: Headers) -> Message:
        model = find(self.catalog, message.name, message.version or None)
        metadata = model_metadata(self.catalog, model, chosen=bool(message.version))
        return service_pb2.ModelMetadataResponse(**metadata)

    async def config(self, message: Message, _: Headers) -> Message:
        model = find(self.catalog, message.name, message.version or None)
        settings = self.service.settings
        return model_config(model, settings.limits, settings.workers)

    async def statistics(self, message: Message, _: Headers) -> Message:
        selection = message.name or None, message.version or None
        stats = model_statistics(self.catalog, self.service.metrics, *selection)
        return service_pb2.ModelStatisticsResponse(model_stats=stats)

    async def index(self, message: Message, _: Headers) -> Message:
        check_repository(message)
        rows = repository_index(self.catalog, only_ready=message.ready)
        return service_pb2.RepositoryIndexResponse(models=rows)

    async def load(self, message: Message, metadata: Headers) -> Message:
        self._check_control(message, metadata)
        problem = await self.control.load(message.model_name)
        if problem:
            raise RequestError(problem, 409, "unproven")
        return service_pb2.RepositoryModelLoadResponse()

    async def unload(self, message: Message, metadata: Headers) -> Message:
        self._check_control(message, metadata)
        await self.control.unload(message.model_name)
        return service_pb2.RepositoryModelUnloadResponse()

    def _check_control(self, message: Message, metadata: Headers) -> None:
        self.service.authorize_control(metadata)
        check_repository(message)
        self.control.require(message.model_name)
        check_parameters(to_python(message.parameters))


def check_repository(message: Message) -> None:
    """Raise RequestError for a message that names a repository: there is only one."""
    if message.repository_name:
        refuse("repository_name", message.repository_name, "none: this server has no others")
