"""TLS on the control connection, and checksums of messages, by asyncio: what passes, what does not, and who is told."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

import devmem_tcp as dmt
from aio_ends import (
    LOOPBACK,
    MIB,
    PATIENCE_S,
    SIZE,
    Pair,
    cancel_after,
    cancel_everywhere,
    check_idle,
    check_passes,
    paired,
    pattern,
    receiving,
    run,
    sending,
    take,
)
from devmem_tcp import aio
from devmem_tcp.errors import BrokenError, RemoteProtocolError
from devmem_tcp.sansio.handshake import PREAMBLE_BYTES
from devmem_tcp.transport.checksums import available_checksums
from fault_wire import middle

ONE: Final = pattern(3 * MIB + 5, 1)  # larger than what may be under way
CHECKSUMS: Final = sorted(kind.value for kind in available_checksums())


# --- TLS -----------------------------------------------------------------------------------------------------------


class Certificate(NamedTuple):
    """A certificate that signs itself, and its key."""

    path: Path
    key: Path


class Certificates(NamedTuple):
    right: Certificate
    unknown: Certificate  # for the right address, but nobody trusts it
    misnamed: Certificate  # trusted, but of another address


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    addresses = {"right": "127.0.0.1", "unknown": "127.0.0.1", "misnamed": "10.0.0.9"}
    return Certificates(*(make_certificate(folder / name, address) for name, address in addresses.items()))


def make_certificate(path: Path, address: str) -> Certificate:
    certificate = Certificate(path.with_suffix(".pem"), path.with_suffix(".key"))
    make = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    name = ("-subj", f"/CN={path.name}", "-addext", f"subjectAltName=IP:{address}")
    out = ("-keyout", certificate.key, "-out", certificate.path)
    subprocess.run([*make, *name, *out], check=True, capture_output=True, timeout=PATIENCE_S)
    return certificate


def listening(own: Certificate, trusted: Certificate | None = None) -> ssl.SSLContext:
    """TLS of the end that listens; with ``trusted`` the other one needs a certificate, too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.path, own.key)
    if trusted is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(trusted.path)
    return context


def connecting(trusted: Certificate, own: Certificate | None = None) -> ssl.SSLContext:
    """TLS of the end that connects."""
    context = ssl.create_default_context(cafile=str(trusted.path))
    if own is not None:
        context.load_cert_chain(own.path, own.key)
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("mutual", [False, True], ids=["one certificate", "two"])
def test_a_session_over_tls(made: Certificates, version: ssl.TLSVersion, mutual: bool) -> None:
    server = listening(made.right, made.unknown if mutual else None)
    client = connecting(made.right, made.unknown if mutual else None)
    server.minimum_version = client.maximum_version = version

    async def main() -> None:
        async with paired({"tls": server, "lanes": 2}, {"tls": client, "lanes": 2}) as pair:
            await check_passes(pair)
            for number in range(100):  # many frames either way
                task = asyncio.create_task(pair.sender.send(b"x", str(number), confirm=True, metadata={"n": number}))
                assert await take(pair.receiver) == (str(number), b"x")
                await (await task).wait_delivered(PATIENCE_S)
            check_idle(pair)

    run(main)


def test_a_receiver_that_connects_checks_the_certificate_of_a_sender_that_listens(made: Certificates) -> None:
    async def main() -> None:
        with dmt.open_nic("soft0", backend="software") as nic, dmt.open_nic("soft1", backend="software") as far:
            async with aio.open_sender(far, listen=LOOPBACK, size=SIZE, tls=listening(made.right)) as sender:
                with pytest.raises(BrokenError, match="CERTIFICATE_VERIFY_FAILED"):
                    await aio.open_receiver(nic, to=sender.address, size=SIZE, tls=connecting(made.unknown))
                tls = connecting(made.right)
                async with aio.open_receiver(nic, to=sender.address, size=SIZE, tls=tls) as receiver:
                    await sender.wait_connected(PATIENCE_S)
                    await check_passes(Pair(sender, receiver))

    run(main)


class Mismatch(NamedTuple):
    """Ends that do not fit, what the sender meets, and why the receiver turned it away."""

    own: str | None  # whose certificate the receiver has; None: it does without TLS
    trusted: str | None  # whose certificate the sender trusts; None: the same
    told: type[Exception]
    words: str
    refusal: str
    asked: bool = False  # for a certificate, of which the sender has none


MISMATCHES: Final = {
    "unknown": Mismatch("unknown", "right", BrokenError, "certificate verify failed: self-signed", "alert unknown ca"),
    "misnamed": Mismatch("misnamed", "misnamed", BrokenError, "not valid for '127.0.0.1'", "alert bad certificate"),
    "none to show": Mismatch(
        "right", "right", BrokenError, "certificate required", "did not return a certificate", True
    ),
    "plain sender": Mismatch("right", None, ConnectionResetError, "instead of sending its challenge", "WRONG_VERSION"),
    "plain receiver": Mismatch(None, "right", BrokenError, "both ends need tls=", "this is no control connection"),
}


@pytest.mark.parametrize("mismatch", MISMATCHES.values(), ids=MISMATCHES.keys())
def test_ends_that_do_not_fit_are_told_so_and_harm_nobody(made: Certificates, mismatch: Mismatch) -> None:
    found = made._asdict()
    server = None if mismatch.own is None else listening(found[mismatch.own], made.right if mismatch.asked else None)
    client = None if mismatch.trusted is None else connecting(found[mismatch.trusted])
    fitting = None if mismatch.own is None else connecting(found[mismatch.own], made.right if mismatch.asked else None)
    if fitting is not None:
        fitting.check_hostname = False  # of the misnamed one

    async def main() -> None:
        async with receiving(tls=server, max_peers=2) as receiver, sending(receiver, tls=fitting) as good:
            await check_passes(Pair(good, receiver))
            with pytest.raises(mismatch.told, match=mismatch.words):
                await open_and_close(receiver, tls=client)
            await until(lambda: receiver.refused > 0)
            assert mismatch.refusal in receiver.last_refusal
            await check_passes(Pair(good, receiver))
            async with sending(receiver, tls=fitting) as another:
                await check_passes(Pair(another, receiver))
            assert receiver.refused == 1

    run(main)


async def open_and_close(receiver: aio.Receiver, **options: Any) -> None:
    async with sending(receiver, **options):
        pass


def test_a_context_for_the_other_end_is_a_mistake_that_shows_at_once(made: Certificates) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match=r"listens has to be of ssl\.PROTOCOL_TLS_SERVER"):
            async with receiving(tls=connecting(made.right)):
                pass
        async with receiving(tls=listening(made.right)) as receiver:
            with pytest.raises(ValueError, match=r"connects has to be of ssl\.PROTOCOL_TLS_CLIENT"):
                await open_and_close(receiver, tls=listening(made.right))
            assert not receiver.refused

    run(main)


def test_opening_over_tls_cancelled_at_every_turn(made: Certificates) -> None:
    server, client = listening(made.right), connecting(made.right)

    async def scenario(count: int) -> bool:
        async with receiving(tls=server, max_peers=3) as receiver, sending(receiver, tls=client) as old:
            await check_passes(Pair(old, receiver))
            done = await cancel_after(count, open_and_close(receiver, tls=client))
            async with sending(receiver, tls=client) as new:
                for sender in (old, new):
                    task = asyncio.create_task(sender.send(ONE, "one"))
                    assert await take_whatever_ended(receiver) == ("one", ONE.tobytes())
                    await task
        return done

    cancel_everywhere(scenario, 5)


async def take_whatever_ended(receiver: aio.Receiver) -> tuple[str, bytes]:
    """Receive a message; sessions that were cancelled may say so before."""
    while True:
        with contextlib.suppress(BrokenError, ConnectionError):
            return await take(receiver)


def test_sending_over_tls_cancelled_at_every_turn(made: Certificates) -> None:
    server, client = listening(made.right), connecting(made.right)

    async def scenario(count: int) -> bool:
        async with paired({"tls": server}, {"tls": client}) as pair:
            done = await cancel_after(count, pair.sender.send(ONE, "one"))
            probe = asyncio.create_task(pair.sender.send(b"probe", "probe"))
            came = [await take(pair.receiver)]
            if came[0][0] == "one":
                came.append(await take(pair.receiver))
            assert came[-1] == ("probe", b"probe")
            assert came[:-1] in ([("one", ONE.tobytes())], []) if not done else len(came) == 2
            await (await probe).wait(PATIENCE_S)
            check_idle(pair)
        return done

    cancel_everywhere(scenario, 2)


# --- checksums -----------------------------------------------------------------------------------------------------


def test_both_libraries_are_here() -> None:
    assert CHECKSUMS == ["crc32c", "xxh3"], "pip install 'devmem-tcp[dev]': what follows needs them"


@pytest.mark.parametrize("kind", CHECKSUMS)
@pytest.mark.parametrize("lanes", [1, 3])
def test_messages_with_checksums_pass_and_are_verified(kind: str, lanes: int) -> None:
    async def main() -> None:
        async with paired({"lanes": lanes}, {"lanes": lanes, "size": 8 * MIB}) as pair:
            with pair.sender.reserve(len(ONE), "uint8") as slot:
                slot.numpy()[:] = ONE
                for sends in (
                    pair.sender.send(ONE, "one", checksum=kind, confirm=True),
                    slot.send("one", checksum=kind),
                ):
                    task = asyncio.create_task(sends)
                    with await pair.receiver.receive(PATIENCE_S) as message:
                        assert message.checksum
                        assert message.gather().tobytes() == ONE.tobytes()
                    await (await task).wait(PATIENCE_S)
            await check_passes(pair)
            check_idle(pair)

    run(main)


async def until(done: Callable[[], bool]) -> None:
    """Let the loop turn until something holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not done():
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def damaged(receiver: aio.Receiver, at: int, **options: Any) -> AsyncIterator[aio.Sender]:
    """A sender to a receiver, on whose way the byte at this offset of the first message is changed."""
    reception = receiver._engine.reception
    assert reception is not None
    assert receiver.address is not None
    place = PREAMBLE_BYTES + at

    def change(data: bytearray, offset: int) -> None:
        if offset <= place < offset + len(data):
            data[place - offset] ^= 0x10

    with (
        middle(receiver.address, reception._data.address[1], change) as between,
        dmt.open_nic("soft2", backend="software") as nic,
    ):
        others = len(receiver.peers)
        sender = await aio.open_sender(nic, to=between.address, size=SIZE, **options)
        try:
            yield sender
        finally:
            sender._attendant.close()
            await until(lambda: len(receiver.peers) <= others)  # whoever is in the middle may wait for it to read


@pytest.mark.parametrize("kind", CHECKSUMS)
@pytest.mark.parametrize("at", [0, len(ONE) // 2, len(ONE) - 1], ids=["first", "middle", "last"])
def test_damage_is_told_both_ends_and_harms_no_other_session(kind: str, at: int) -> None:
    async def main() -> None:
        async with receiving(max_peers=2, size=2 * SIZE) as receiver, sending(receiver) as other:
            await check_passes(Pair(other, receiver))
            async with damaged(receiver, at) as sender:
                sent = asyncio.create_task(hear_of_damage(sender, kind))
                with pytest.raises(
                    RemoteProtocolError, match=r"message 0 \('one'\) was damaged on its way: its " + kind
                ):
                    await receiver.receive(PATIENCE_S)
                await sent
                with pytest.raises(BrokenError, match="the peer aborted"):
                    await sender.send(b"x", "after it")
            await check_passes(Pair(other, receiver))
            assert len(receiver.peers) == 1

    run(main)


async def send_and_wait(sender: aio.Sender, kind: str | None) -> None:
    sent = await sender.send(ONE, "one", checksum=kind, confirm=True)
    await sent.wait_delivered(PATIENCE_S)


async def hear_of_damage(sender: aio.Sender, kind: str) -> None:
    with pytest.raises(BrokenError, match=r"the peer aborted the session: message 0 \('one'\) was damaged"):
        await send_and_wait(sender, kind)


def test_without_a_checksum_damage_passes() -> None:
    async def main() -> None:
        async with receiving() as receiver, damaged(receiver, 5) as sender:
            sent = asyncio.create_task(send_and_wait(sender, None))
            name, data = await take(receiver)
            await sent
            assert name == "one"
            assert [at for at in range(10) if data[at] != ONE[at]] == [5]
            await sender.aclose()

    run(main)


@pytest.mark.parametrize("kind", CHECKSUMS)
def test_sending_with_a_checksum_cancelled_at_every_turn(kind: str) -> None:
    async def scenario(count: int) -> bool:
        async with paired() as pair:
            done = await cancel_after(count, send_and_wait(pair.sender, kind))
            probe = asyncio.create_task(pair.sender.send(b"probe", "probe", checksum=kind))
            while (came := await take(pair.receiver)) != ("probe", b"probe"):
                assert came == ("one", ONE.tobytes())
            await (await probe).wait(PATIENCE_S)
            await check_passes(pair)
            check_idle(pair)
        return done

    # the receiver does not receive meanwhile, but its loop runs: the message comes, and its delivery is confirmed
    cancel_everywhere(scenario, 3)


@pytest.mark.parametrize("kind", CHECKSUMS)
def test_sending_what_is_damaged_cancelled_ever_later(kind: str) -> None:
    async def scenario(count: int) -> bool:
        async with receiving(max_peers=2, size=2 * SIZE) as receiver, sending(receiver) as other:
            await check_passes(Pair(other, receiver))
            async with damaged(receiver, len(ONE) // 2) as sender:
                turns = 1 << (count - 1)  # many, since bytes go by another thread
                done = await cancel_after(turns, hear_of_damage(sender, kind))
            task = asyncio.create_task(other.send(ONE, "whole"))
            while True:
                with contextlib.suppress(BrokenError, ConnectionError, RemoteProtocolError):
                    assert await take(receiver) == ("whole", ONE.tobytes()), "what was damaged is never given out"
                    break
            await task
        return done

    cancel_everywhere(scenario, 3)
