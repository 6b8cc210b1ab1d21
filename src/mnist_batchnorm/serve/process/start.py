"""TODO."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mnist_batchnorm.serve.core.settings import Settings

if TYPE_CHECKING:
    from mnist_batchnorm.serve.core.catalog import Source


def start(sources: "Sequence[Source]", settings: Settings) -> int:
    """Serve in one process or several until told to end; return the exit status."""
    from mnist_batchnorm.serve.process.listener import fit_descriptors, listen, reserved
    from mnist_batchnorm.serve.process.shared_state import Roll
    from mnist_batchnorm.serve.registry.source import RegisteredSource
    from mnist_batchnorm.serve.registry.supervisor import fetching

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
            from mnist_batchnorm.serve.process.worker import serve

            return serve(sources, settings, listener, Roll(roll), tend=fetcher.tend)
        from mnist_batchnorm.serve.process.supervisor import Workers

        def work(parent: int) -> int:
            from mnist_batchnorm.serve.process.worker import serve

            fetcher.let_go()
            return serve(sources, settings, listener, Roll(roll), parent)

        return Workers(settings, listener, Roll(roll), work, fetcher.tend).run()
