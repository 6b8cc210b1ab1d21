"""Open the ports, then serve in this process or in several workers.

Set PROMETHEUS_MULTIPROC_DIR before the import. The process that forks must not import ONNX Runtime,
which starts threads.
"""

import contextlib
from collections.abc import Sequence

from mnist_batchnorm.serve.core.catalog import Source
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.core.shared_state import SharedState
from mnist_batchnorm.serve.process.listener import listen, raise_descriptor_limit, reserve_grpc_port
from mnist_batchnorm.serve.process.supervisor import WorkerSupervisor
from mnist_batchnorm.serve.registry.source import RegisteredSource
from mnist_batchnorm.serve.registry.supervisor import RegistryWatcher


def start(sources: Sequence[Source], settings: Settings) -> int:
    """Serve in one process or several until a signal; return the exit status."""
    folder = settings.state
    assert folder
    registered = [source for source in sources if isinstance(source, RegisteredSource)]
    settings = raise_descriptor_limit(settings)
    with contextlib.ExitStack() as stack:
        watcher = RegistryWatcher(registered, settings.registry_period)
        stack.callback(watcher.stop)
        watcher.start()
        listener = stack.enter_context(listen(settings))
        if settings.grpc_port is not None:
            settings = stack.enter_context(reserve_grpc_port(settings))

        def work(parent: int | None = None) -> int:
            from mnist_batchnorm.serve.process.worker import serve

            state = SharedState(folder)
            if parent is None:
                return serve(sources, settings, listener, state, on_tick=watcher.restart_if_dead)
            watcher.close_pipe()
            return serve(sources, settings, listener, state, parent)

        if settings.workers > 1:
            state = SharedState(folder)
            return WorkerSupervisor(settings, listener, state, work, watcher.restart_if_dead).run()
        return work()
