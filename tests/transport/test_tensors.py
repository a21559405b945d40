"""Tensors in at one end and out at the other: whole, named, in order, with the path that their bytes took."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import devmem_tcp as dmt
from devmem_tcp.errors import (
    AuthenticationFailed,
    BrokenError,
    ClosedError,
    LocalProtocolError,
    OutOfDeviceMemory,
    RemoteProtocolError,
    StaleFragError,
    Timeout,
)
from devmem_tcp.software.options import SoftwareOptions
from devmem_tcp.transport import Message, Sender, open_receiver, open_sender
from devmem_tcp.transport.checksums import available_checksums
from tensor_ends import MIB, Driven, receiving, sending, session

KEY = b"sixteen bytes or more of a secret"


def copied(message: Message) -> tuple[str, np.ndarray]:
    return message.name, message.gather().numpy().copy()


def pattern(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, MIB, 3 * MIB + 5, 9 * MIB])
def test_an_array_arrives_as_it_was_sent(nbytes: int, lanes: int) -> None:
    array = pattern(nbytes)
    with session(copied, receiver={"lanes": lanes}, sender={"lanes": lanes}) as (sender, driven):
        sender.send(array, "weights", metadata={"step": 7})
    ((name, arrived),) = driven.results
    assert name == "weights"
    np.testing.assert_array_equal(arrived, array)


@pytest.mark.parametrize("hostile", [None, 5])
def test_many_messages_arrive_in_order_on_a_friendly_and_a_hostile_nic(hostile: int | None) -> None:
    arrays = [pattern(size, size) for size in (0, 1, 10, 5000, 70_000, 300_000) * 8]
    options = SoftwareOptions(hostile_seed=hostile)
    with session(copied, receiver={"software": options, "lanes": 2}, sender={"lanes": 2}) as (sender, driven):
        for number, array in enumerate(arrays):
            sender.send(array, str(number))
    assert [name for name, _ in driven.results] == [str(number) for number in range(len(arrays))]
    for (_, arrived), array in zip(driven.results, arrays, strict=True):
        np.testing.assert_array_equal(arrived, array)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["bool", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64", "complex64"]),
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from("CF"),
    st.text(max_size=8).filter(str.isprintable),
)
def test_dtype_shape_order_and_name_are_kept(dtype: str, shape: list[int], order: Any, name: str) -> None:
    array = np.asarray(pattern(int(np.prod(shape)) * np.dtype(dtype).itemsize) % 2).view(dtype)
    array = np.asarray(array[: int(np.prod(shape))].reshape(shape), order=order)
    with session(copied) as (sender, driven):
        sender.send(array, name)
    ((arrived_name, arrived),) = driven.results
    assert arrived_name == name
    assert arrived.dtype == array.dtype
    np.testing.assert_array_equal(arrived, array)


def test_eight_bit_floats_arrive() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        array = np.arange(8).astype(getattr(ml_dtypes, name))
        with session(lambda message: (message.dtype, copied(message)[1])) as (sender, driven):
            sender.send(array)
        ((dtype, arrived),) = driven.results
        assert dtype == name
        assert arrived.dtype == array.dtype
        np.testing.assert_array_equal(arrived, array)


def test_metadata_and_the_proof_of_path_come_with_the_message() -> None:
    def act(message: Message) -> Any:
        path = message.path
        assert message.gather().nbytes == MIB
        assert path.copied < 4096  # what the read before it may have left in its last page
        return message.metadata, message.backend, path.dmabuf, path.linear, path.host

    with session(act) as (sender, driven):
        sender.send(pattern(MIB), metadata={"step": 3, "of": [1, 2]})
        (stats,) = sender.stats()
        assert stats.sent_dmabuf_bytes == MIB
    assert driven.results == [({"step": 3, "of": [1, 2]}, "software", MIB, 0, 0)]


def test_a_message_larger_than_the_buffer_is_copied_out_as_it_comes() -> None:
    array = pattern(6 * MIB)
    with session(lambda message: (*copied(message), message.path.copied), receiver={"size": MIB}) as (sender, driven):
        sender.send(array)
    ((_, arrived, bytes_copied),) = driven.results
    assert bytes_copied == array.nbytes
    np.testing.assert_array_equal(arrived, array)


@pytest.mark.parametrize("lanes", [1, 3])
def test_an_array_goes_through_a_few_pages_for_sending(lanes: int) -> None:
    array = pattern(3 * MIB + 5)
    options = {"lanes": lanes}
    with session(lambda message: copied(message)[1], receiver=options, sender=options | {"size": 16384}) as both:
        both[0].send(array, timeout_s=20)
    (arrived,) = both[1].results
    np.testing.assert_array_equal(arrived, array)


def test_messages_go_straight_into_the_callers_arrays() -> None:
    targets = {name: np.zeros(200_000, np.uint8) for name in "ab"}
    receiver = {"into": lambda header: targets.get(header.name)}
    with session(lambda message: (message.name, message.path.copied), receiver=receiver) as (sender, driven):
        for seed, name in enumerate("abc"):
            sender.send(pattern(200_000, seed), name)
    (*copied_out, (name, bytes_copied)) = driven.results
    assert copied_out == [("a", 200_000), ("b", 200_000)]
    assert name == "c"
    assert bytes_copied < 4096  # at most what a read of "b" left in its last page
    for seed, name in enumerate("ab"):
        np.testing.assert_array_equal(targets[name], pattern(200_000, seed))


def test_gather_into_an_array_of_the_callers() -> None:
    target = np.zeros((10, 10), np.float32)

    def act(message: Message) -> None:
        message.gather(into=target)
        with pytest.raises(ValueError, match="400"):
            message.gather(into=np.zeros(3, np.uint8))
        readonly = np.zeros((10, 10), np.float32)
        readonly.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            message.gather(into=readonly)

    with session(act) as (sender, _):
        sender.send(np.arange(100, dtype=np.float32))
    np.testing.assert_array_equal(target.ravel(), np.arange(100))


def test_an_array_keeps_its_bytes_after_the_message_was_released_and_no_new_one_is_made() -> None:
    kept: list[np.ndarray] = []
    messages: list[Message] = []

    def act(message: Message) -> None:
        messages.append(message)
        if not kept:
            kept.append(message.gather().numpy())

    with session(act) as (sender, _):
        for seed in range(40):  # more than the buffer holds
            sender.send(pattern(MIB // 2, seed))
    np.testing.assert_array_equal(kept[0], pattern(MIB // 2, 0))
    for message in messages:
        with pytest.raises(StaleFragError):
            message.gather()
        with pytest.raises(StaleFragError):
            message.fragments()
    del kept[:]
    gc.collect()


def test_fragments_are_the_message_where_it_lies() -> None:
    array = pattern(MIB)
    options = SoftwareOptions(hostile_seed=3)
    with session(lambda message: b"".join(message.fragments()), receiver={"software": options}) as (sender, driven):
        sender.send(array)
    assert driven.results == [array.tobytes()]


# Slots and series


def test_a_slot_is_filled_in_place_and_sent_as_often_as_wanted() -> None:
    with session(copied) as (sender, driven):
        with sender.reserve((4, 5), "float32") as slot:
            for number in range(3):
                slot.numpy()[:] = number
                slot.send(str(number)).wait(5)
        with pytest.raises(StaleFragError):
            slot.numpy()
    assert [(name, float(array.min()), float(array.max())) for name, array in driven.results] == [
        ("0", 0.0, 0.0),
        ("1", 1.0, 1.0),
        ("2", 2.0, 2.0),
    ]


def test_slots_use_up_the_buffer_and_give_it_back() -> None:
    with session(copied) as (sender, _):
        with sender.reserve(3 * MIB, "uint8"):
            with pytest.raises(OutOfDeviceMemory, match="no room for a slot") as caught:
                sender.reserve(2 * MIB, "uint8")
            assert caught.value.free == MIB
        with sender.reserve(4 * MIB, "uint8"), pytest.raises(OutOfDeviceMemory, match="slots hold it"):
            sender.send(b"no room to stage this")


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("nbytes", [4096, 3 * MIB // 2])
def test_a_series_and_what_follows_it(nbytes: int, lanes: int) -> None:
    with session(copied, receiver={"lanes": lanes}, sender={"lanes": lanes}) as (sender, driven):
        with sender.reserve(nbytes, "uint8") as slot, sender.series(nbytes, "uint8", "step") as series:
            for number in range(10):
                slot.numpy()[:] = number
                series.send(slot).wait(5)
            with sender.reserve(3, "uint8") as other, pytest.raises(ValueError, match="the series is of"):
                series.send(other)
            with pytest.raises(LocalProtocolError, match="series is under way"):
                sender.send(b"in between")
        with pytest.raises(ClosedError):
            series.send(slot)
        sender.send(b"after", "after")
    assert [name for name, _ in driven.results] == ["step"] * 10 + ["after"]
    assert [int(array[-1]) for name, array in driven.results if name == "step"] == list(range(10))


# Confirmation, requests, ends


@pytest.mark.parametrize("kind", sorted(kind.value for kind in available_checksums()) or [None])
def test_a_checksum_is_verified_and_delivery_confirmed(kind: str | None) -> None:
    with session(copied) as (sender, driven):
        sent = sender.send(pattern(3 * MIB), "sum", checksum=kind, confirm=True)
        sent.wait_delivered(10)
        assert sent.delivered
        assert sent.done
    assert len(driven.results) == 1


def test_what_cannot_be_sent_is_said_before_anything_is() -> None:
    with session(copied) as (sender, driven):
        with pytest.raises(ValueError, match="contiguous"):
            sender.send(np.zeros((4, 4))[:, ::2])
        sender.send(np.arange(16.0).reshape(4, 4)[:, ::2], copy=True)
        with pytest.raises((TypeError, ValueError), match="object"):
            sender.send(np.array([None]))
        with pytest.raises(ValueError, match="name"):
            sender.send(b"x", "new\nline")
        with pytest.raises(ValueError, match="JSON"):
            sender.send(b"x", metadata={"no": object()})
        with pytest.raises(ValueError, match="is not a valid ChecksumKind"):
            sender.send(b"x", checksum="md5")
    ((_, arrived),) = driven.results
    np.testing.assert_array_equal(arrived, np.arange(16.0).reshape(4, 4)[:, ::2])


def test_a_receiver_goes_to_a_sender_that_listens() -> None:
    with (
        dmt.open_nic("soft1", backend="software") as far,
        open_sender(far, listen=("127.0.0.1", 0), size=MIB) as sender,
        dmt.open_nic("soft0", backend="software") as near,
    ):
        results: list[Any] = []

        def receive() -> None:
            with open_receiver(near, to=sender.address, size=MIB) as receiver:
                for message in receiver:
                    with message:
                        results.append(copied(message)[0])

        thread = threading.Thread(target=receive)
        thread.start()
        assert sender.wait_connected(10)[0] == "127.0.0.1"
        sender.send(b"hello", "hello")
        sender.close()
        thread.join(10)
    assert results == ["hello"]


def test_several_senders_at_once_and_one_too_many() -> None:
    with receiving(max_peers=3, size=8 * MIB) as receiver:
        driven = Driven(receiver, copied)
        with sending(receiver) as a, sending(receiver) as b, sending(receiver) as c:
            with pytest.raises(RemoteProtocolError, match="max_peers"), sending(receiver):
                pass
            for round_number in range(5):
                for name, sender in (("a", a), ("b", b), ("c", c)):
                    sender.send(pattern(100_000, round_number), name)
        results = driven.join()
        assert receiver.refused == 1
        assert "max_peers" in receiver.last_refusal
    assert sorted(name for name, _ in results) == ["a"] * 5 + ["b"] * 5 + ["c"] * 5


@pytest.mark.parametrize("keys", [(KEY, KEY + b"!"), (KEY, None), (None, KEY)], ids=["other", "none", "extra"])
def test_a_sender_without_the_right_key_gets_nowhere(keys: tuple[bytes | None, bytes | None]) -> None:
    with receiving(key=keys[0]) as receiver:
        driven = Driven(receiver, copied)
        with pytest.raises(AuthenticationFailed), sending(receiver, key=keys[1]):
            pass
        with sending(receiver, key=keys[0]) as sender:
            sender.send(b"the right one")
        assert len(driven.join()) == 1


def test_nobody_listens() -> None:
    with receiving() as receiver:
        address = receiver.address
    assert address is not None
    with (
        dmt.open_nic("soft1", backend="software") as nic,
        pytest.raises(ConnectionRefusedError, match=r"connect 127\.0\.0\.1"),
        open_sender(nic, to=address, size=MIB),
    ):
        pass


def test_a_time_limit_on_receiving_changes_nothing() -> None:
    with receiving() as receiver:
        with pytest.raises(Timeout, match="no message came in 0 s"):
            receiver.receive(timeout_s=0)
        driven = Driven(receiver, copied)
        with sending(receiver) as sender:
            sender.send(b"later")
        assert len(driven.join()) == 1


def test_ten_thousand_small_arrays_pass_through_a_small_buffer() -> None:
    with session(lambda message: int(message.gather().numpy()[-1]), receiver={"size": MIB}) as (sender, driven):
        for number in range(10_000):
            sender.send(np.full(1024, number % 251, np.uint8))
    assert driven.results == [number % 251 for number in range(10_000)]


def test_arguments_that_do_not_go_together() -> None:
    with dmt.open_nic("soft0", backend="software") as nic:
        with pytest.raises(ValueError, match="exactly one"):
            open_receiver(nic)
        with pytest.raises(ValueError, match="exactly one"):
            open_sender(nic, to=("::1", 1), listen=("::1", 1))
        with pytest.raises(ValueError, match="easily guessed"):
            open_receiver(nic, listen=("::1", 0), key=b"short")
        with pytest.raises(ValueError, match="lanes"):
            open_receiver(nic, listen=("::1", 0), lanes=65)
        with pytest.raises(OutOfDeviceMemory, match="share"):
            open_receiver(nic, listen=("::1", 0), size=4096)
        with pytest.raises(ValueError, match="different ports"):
            open_receiver(nic, listen=("::1", 7000), data_port=7000)
        assert nic.ntuple_rules == ()


def test_settings_and_memory_are_given_back() -> None:
    with dmt.open_nic("soft0", backend="software") as nic:
        before = nic.header_split, nic.rss_table, nic.ntuple_rules
        with open_receiver(nic, listen=("127.0.0.1", 0), size=MIB) as receiver:
            assert nic.ntuple_rules != ()
        assert (nic.header_split, nic.rss_table, nic.ntuple_rules) == before
        with pytest.raises(ClosedError):
            receiver.receive()
        receiver.close()


def test_a_sender_that_is_closed_by_an_error_tells_the_receiver_so() -> None:
    def fail(sender: Sender) -> None:
        sender.send(b"a session stands", confirm=True).wait_delivered(10)
        raise RuntimeError("the program's own")

    with receiving() as receiver:
        driven = Driven(receiver, copied)
        with pytest.raises(RuntimeError, match="the program's own"), sending(receiver) as sender:
            fail(sender)
        with pytest.raises(BrokenError, match="the sender was closed"):
            driven.join()


@pytest.mark.parametrize("hostile", [None, 4], ids=["placed", "in frags"])
def test_messages_can_be_read_after_their_session_has_ended(hostile: int | None) -> None:
    messages: list[Message] = []
    with receiving(software=SoftwareOptions(hostile_seed=hostile), size=16 * MIB) as receiver:
        thread = threading.Thread(target=lambda: messages.extend(receiver))
        thread.start()
        with sending(receiver) as sender:
            for seed in range(3):
                sender.send(pattern(20_000, seed))
        thread.join(30)
        assert receiver.peers == ()
        for seed, message in enumerate(messages):
            with message:
                np.testing.assert_array_equal(message.gather().numpy(), pattern(20_000, seed))
    assert len(messages) == 3
