"""The gRPC port: when it is taken, shared by workers, or shut down."""

import queue
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from tests.support.grpc_calls import (
    MODEL,
    STREAM,
    WAIT,
    address,
    ask,
    halfway,
    packed,
    rejection,
)
from tests.support.serving import counted, running, until


def test_sigterm_loses_no_call(folder: Path) -> None:
    release = threading.Event()
    with (
        running("--grpc-port", "0", "--drain-delay", "0.5", folder=folder) as server,
        triton.InferenceServerClient(address(server)) as client,
        grpc.insecure_channel(address(server)) as channel,
        ThreadPoolExecutor(4) as threads,
    ):
        open_ = [halfway(channel, release) for _ in range(3)]
        asked: queue.Queue[bytes | None] = queue.Queue()
        stream = channel.stream_stream(STREAM)(iter(asked.get, None), timeout=WAIT)
        asked.put(packed())
        assert service_pb2.ModelStreamInferResponse.FromString(next(stream)).infer_response.outputs
        until(lambda: counted(server, "mnist_bn_queue") == 3)

        stopped = threading.Event()
        answered, lost = [0] * 4, []

        def keep_asking(number: int) -> None:
            while not stopped.is_set():
                try:
                    ask(channel, packed())
                except grpc.RpcError as error:
                    lost.append(error.code())
                    return
                answered[number] += 1

        for number in range(4):
            threads.submit(keep_asking, number)
        until(lambda: all(answered))
        server.process.send_signal(signal.SIGTERM)
        until(lambda: bool(server.events("draining")))
        asked.put(packed())
        next(stream)
        ready = client.is_server_ready()
        release.set()
        answers = [list(call) for call in open_]
        code, says = rejection(lambda: next(stream))
        asked.put(None)
        status = server.process.wait(WAIT)
        stopped.set()

        assert not ready
        assert [len(answer) for answer in answers] == [1, 1, 1]
        assert (code, says) == ("UNAVAILABLE", "the server stops")
        assert set(lost) <= {grpc.StatusCode.UNAVAILABLE}
        assert status == 0
        assert [line for line in server.log() if line["level"] == "error"] == []


def test_a_call_that_never_ends_is_cancelled_at_the_deadline(folder: Path) -> None:
    release = threading.Event()
    with (
        running(
            "--grpc-port", "0", "--drain-delay", "0", "--drain", "0.5", folder=folder
        ) as server,
        grpc.insecure_channel(address(server)) as channel,
    ):
        call = halfway(channel, release)
        until(lambda: counted(server, "mnist_bn_queue") == 1)

        assert server.stop() == 0
        code, _ = rejection(lambda: list(call))
        release.set()
        assert code == "UNAVAILABLE"


def test_workers_share_the_port(folder: Path) -> None:
    with running("--grpc-port", "0", "--workers", "2", folder=folder) as server:
        until(lambda: len(server.events("serving")) == 2)
        assert len({line["grpc"] for line in server.events("serving")}) == 1
        for _ in range(8):  # a connection each, so that more than one worker is met
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(address(server), options) as channel:
                assert ask(channel, packed()).model_name == MODEL
        with triton.InferenceServerClient(address(server)) as client:
            (stats,) = client.get_inference_statistics(MODEL).model_stats

        assert stats.execution_count == 8
        assert server.stop() == 0
