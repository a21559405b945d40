"""grpcio: messages as bytes, without protobuf. Throughput is a client's stream, a round trip a unary call.

Each connection is a channel with a TCP connection of its own. The library takes bytes alone, so that what is sent is
copied into bytes first, as a program has to.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from concurrent import futures
from typing import Any, Final

from loopback import HOST
from peers.contract import missing
from peers.control import Control, Part
from peers.works import Kind

SERVICE: Final = "peers.Messages"
STREAM: Final = "Stream"
ECHO: Final = "Echo"
OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)


class Handlers:
    """What the server does with a call; ``landed`` gets the last message of each."""

    def __init__(self) -> None:
        self.landed: queue.Queue[memoryview] = queue.Queue()

    def stream(self, messages: Iterator[bytes], context: Any) -> bytes:
        """Take all messages of a stream; the answer is the acknowledgement."""
        last = b""
        for message in messages:
            last = message
        self.landed.put(memoryview(last))
        return b"\x06"

    def echo(self, message: bytes, context: Any) -> bytes:
        self.landed.put(memoryview(message))
        return message


class GrpcioCalls:
    most_connections = 64  # a call takes a thread on each side

    def available(self) -> str:
        return missing("grpc", "grpcio")

    def serve(self, control: Control) -> None:
        import grpc

        handlers = Handlers()
        with futures.ThreadPoolExecutor(control.work.connections) as threads:
            server = grpc.server(threads, options=OPTIONS)
            methods = {
                STREAM: grpc.stream_unary_rpc_method_handler(handlers.stream),
                ECHO: grpc.unary_unary_rpc_method_handler(handlers.echo),
            }
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
            control.tell(str(server.add_insecure_port(f"{HOST}:0")))
            server.start()
            a_call_each = control.work.kind is Kind.ROUND_TRIP
            for part in control.parts():
                with part:
                    calls = part.messages if a_call_each else control.work.connections
                    landed = [handlers.landed.get() for _ in range(calls)]
                part.check(landed[-control.work.connections :])
            server.stop(None).wait()

    def drive(self, control: Control) -> None:
        import grpc

        address = f"{HOST}:{control.hear()}"
        with contextlib.ExitStack() as stack:
            channels = [
                stack.enter_context(grpc.insecure_channel(address, OPTIONS)) for _ in range(control.work.connections)
            ]
            for part in control.parts():
                if control.work.kind is Kind.ROUND_TRIP:
                    _round_trips(channels[0], part)
                else:
                    _streams(channels, part)


def _streams(channels: list[Any], part: Part) -> None:
    """Send all messages on each channel, in one call each."""
    calls = [channel.stream_unary(f"/{SERVICE}/{STREAM}", request_serializer=bytes) for channel in channels]
    with part:
        answers = [call.future(iter([part.message] * part.messages)) for call in calls]
        for answer in answers:
            answer.result()


def _round_trips(channel: Any, part: Part) -> None:
    call = channel.unary_unary(f"/{SERVICE}/{ECHO}", request_serializer=bytes)
    landed = b""
    with part:
        for _ in range(part.messages):
            landed = call(part.message)
            part.lap()
    part.check([memoryview(landed)])
