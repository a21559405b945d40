"""Tokens: how they are numbered, how they go back, and the limits of SO_DEVMEM_DONTNEED."""

from __future__ import annotations

import errno
from itertools import pairwise

from devmem_tcp.errors import KernelError, StaleFragError, Timeout, TokenError
from devmem_tcp.testing.contract.collector import token_ranges
from devmem_tcp.testing.contract.expect import raises
from devmem_tcp.testing.contract.rig import STARVE_WAIT_S, BoundPair, Rig
from devmem_tcp.types import FragBatch, FragKind
from devmem_tcp.uapi.socket import MAX_DONTNEED_FRAGS, MAX_DONTNEED_TOKENS

UNKNOWN = 1 << 30  # a token no test ever gets


def hold_many(rig: Rig, pair: BoundPair, wanted: int) -> int:
    """Hold ``wanted`` tokens, a byte each, or as many as the pool can give; they are 1 to the number returned."""
    collector = pair.collector
    pair.sock.settimeout(STARVE_WAIT_S)
    try:
        while (missing := wanted - len(collector.live)) > 0:
            pair.peer.sendall(rig.payload(missing))  # again where a NIC puts some packets into host memory
            collector.recv_exactly(missing, hold=True, max_bytes=1)
    except Timeout:
        pass  # out of pages: a NIC may use a whole page for every byte
    pair.sock.settimeout(rig.patience_s)
    assert collector.live
    return len(collector.live)


def hold_batch(rig: Rig, pair: BoundPair) -> FragBatch:
    """Receive until a batch has tokens; return it, unreleased, with no other token out."""
    while True:
        pair.peer.sendall(rig.payload(3000))
        batch = pair.sock.recv_frags()
        if pair.sock.stats.tokens_out:
            return batch


def out(pair: BoundPair) -> int:
    return pair.sock.stats.tokens_out


def test_start_at_one_and_count_up(rig: Rig) -> None:
    pair = rig.bound_pair()
    tokens = rig.hold_tokens(pair.collector, pair.peer, 3)
    assert tokens == list(range(1, len(tokens) + 1))


def test_are_numbered_per_socket(rig: Rig) -> None:
    rx = rig.bind()
    first, second = rig.pair_on(rx), rig.pair_on(rx)
    for pair in (first, second):
        assert rig.hold_tokens(pair.collector, pair.peer, 1, max_bytes=10)[0] == 1


def test_lowest_free_comes_first(rig: Rig) -> None:
    pair = rig.bound_pair()
    pair.peer.sendall(rig.payload(30))
    pair.collector.recv_exactly(20, hold=True, max_bytes=1)
    held = list(pair.collector.live)
    assert held == list(range(1, len(held) + 1))
    back = held[1::2]
    if back:
        assert pair.collector.dontneed(reversed(back)) == len(back)
    pair.collector.recv_exactly(10, hold=True, max_bytes=1)
    fresh = list(pair.collector.live)[len(held) - len(back) :]
    beyond = range(len(held) + 1, len(held) + 1 + len(fresh))
    assert fresh == [*back, *beyond][: len(fresh)]


def test_are_free_again_from_one(rig: Rig) -> None:
    pair = rig.bound_pair()
    for _ in range(3):
        assert rig.hold_tokens(pair.collector, pair.peer, 2, max_bytes=50)[0] == 1
        pair.collector.release()
        assert out(pair) == 0


def test_dontneed_frees_what_it_says(rig: Rig) -> None:
    pair = rig.bound_pair()
    count = hold_many(rig, pair, 10)
    assert pair.sock.dontneed(token_ranges((1, 1))) == 1
    assert out(pair) == count - 1
    assert pair.sock.dontneed(token_ranges((2, count - 1)) if count > 1 else token_ranges((2, 1))) == count - 1
    assert out(pair) == 0
    assert pair.rx.drained


def test_dontneed_takes_raw_bytes(rig: Rig) -> None:
    pair = rig.bound_pair()
    count = hold_many(rig, pair, 5)
    assert pair.sock.dontneed(token_ranges((1, count)).tobytes()) == count
    assert out(pair) == 0


def test_returned_twice_counts_nothing(rig: Rig) -> None:
    pair = rig.bound_pair()
    hold_many(rig, pair, 2)
    assert pair.sock.dontneed(token_ranges((1, 1))) == 1
    assert pair.sock.dontneed(token_ranges((1, 1))) == 0
    held = out(pair)
    assert pair.sock.dontneed(token_ranges((2, 1), (2, 1))) == min(held, 1)


def test_unknown_counts_nothing(rig: Rig) -> None:
    pair = rig.bound_pair()
    count = hold_many(rig, pair, 2)
    for start, number in ((UNKNOWN, 1), (0, 1), (count + 1, 5), (1, 0), (0xFFFF_FFFF, 1)):
        assert pair.sock.dontneed(token_ranges((start, number))) == 0, f"range ({start}, {number}) freed something"
    assert out(pair) == count


def test_ranges_go_on_at_zero(rig: Rig) -> None:
    """Token numbers are 32 bits wide, and a range may go past the last."""
    pair = rig.bound_pair()
    count = hold_many(rig, pair, 3)
    assert pair.sock.dontneed(token_ranges((0xFFFF_FFFF, 3))) == 1  # the last number, 0, and 1
    assert pair.sock.dontneed(token_ranges((UNKNOWN, 1), (0xFFFF_FFFE, 0xFFFF_FFFF))) == count - 1
    assert out(pair) == 0


def test_of_another_socket_counts_nothing(rig: Rig) -> None:
    rx = rig.bind()
    first, second = rig.pair_on(rx), rig.pair_on(rx)
    count = hold_many(rig, first, 3)
    assert second.sock.dontneed(token_ranges((1, count))) == 0
    assert out(first) == count
    assert first.sock.dontneed(token_ranges((1, count))) == count


def test_unsteered_socket_has_none(rig: Rig) -> None:
    rig.bind()
    sock, peer, _ = rig.pair(steer=False)
    peer.sendall(b"ordinary")
    rig.collect(sock).recv_exactly(8)
    assert sock.dontneed(token_ranges((1, 10))) == 0


def test_no_range_is_einval(rig: Rig) -> None:
    pair = rig.bound_pair()
    hold_many(rig, pair, 1)
    with raises(KernelError, errno.EINVAL):
        pair.sock.dontneed(token_ranges())
    with raises(KernelError, errno.EINVAL):
        pair.sock.dontneed(b"")
    assert out(pair) >= 1


def test_odd_length_is_einval(rig: Rig) -> None:
    pair = rig.bound_pair()
    count = hold_many(rig, pair, 1)
    raw = token_ranges((1, count)).tobytes()
    for wrong in (raw[:7], raw + b"\0", raw[:4]):
        with raises(KernelError, errno.EINVAL):
            pair.sock.dontneed(wrong)
    assert out(pair) == count


def test_128_ranges_are_the_limit(rig: Rig) -> None:
    pair = rig.bound_pair()
    count = hold_many(rig, pair, 1)
    padding = [(UNKNOWN + 2 * index, 1) for index in range(MAX_DONTNEED_TOKENS)]
    with raises(KernelError, errno.EINVAL):
        pair.sock.dontneed(token_ranges((1, 1), *padding))
    assert out(pair) == count, "a refused call freed tokens"
    assert pair.sock.dontneed(token_ranges(*padding[1:], (1, 1))) == 1
    assert out(pair) == count - 1


def test_1024_tokens_are_the_limit_in_one_range(rig: Rig) -> None:
    pair = rig.bound_pair()
    count = hold_many(rig, pair, MAX_DONTNEED_FRAGS + 50)
    freed = pair.sock.dontneed(token_ranges((1, count)))
    assert freed == min(count, MAX_DONTNEED_FRAGS)
    assert out(pair) == count - freed
    assert pair.sock.dontneed(token_ranges((1 + freed, max(count - freed, 1)))) == count - freed


def test_1024_tokens_are_the_limit_over_all_ranges(rig: Rig) -> None:
    pair = rig.bound_pair()
    count = hold_many(rig, pair, MAX_DONTNEED_FRAGS + 50)
    size = -(-count // 100)
    ranges = [(start, min(size, count + 1 - start)) for start in range(1, count + 1, size)]
    assert pair.sock.dontneed(token_ranges(*ranges)) == min(count, MAX_DONTNEED_FRAGS)


def test_unknown_tokens_use_up_the_limit(rig: Rig) -> None:
    pair = rig.bound_pair()
    hold_many(rig, pair, 1)
    assert pair.sock.dontneed(token_ranges((UNKNOWN, MAX_DONTNEED_FRAGS), (1, 1))) == 0
    assert pair.sock.dontneed(token_ranges((UNKNOWN, MAX_DONTNEED_FRAGS - 1), (1, 1))) == 1


def test_release_returns_the_batch(rig: Rig) -> None:
    pair = rig.bound_pair()
    with hold_batch(rig, pair) as batch:
        assert out(pair) == sum(batch.kinds == FragKind.DMABUF)
    assert batch.released
    assert out(pair) == 0
    assert pair.rx.drained
    batch.release()


def test_released_batch_is_stale(rig: Rig) -> None:
    pair = rig.bound_pair()
    batch = hold_batch(rig, pair)
    nbytes = batch.nbytes
    batch.release()
    for column in ("frags", "inline", "offsets", "sizes", "tokens", "kinds", "dmabuf_ids"):
        with raises(StaleFragError):
            getattr(batch, column)
    with raises(StaleFragError):
        list(batch)
    assert batch.nbytes == nbytes


def test_release_in_any_order(rig: Rig) -> None:
    pair = rig.bound_pair()
    batches: list[FragBatch] = []
    data = rig.payload(300)
    pair.peer.sendall(data)
    while sum(batch.nbytes for batch in batches) < len(data):
        batches.append(pair.sock.recv_frags(100))
    for batch in reversed(batches):
        batch.release()
    assert out(pair) == 0


def test_release_needs_few_calls(rig: Rig) -> None:
    """Every second token is free, so that a batch's tokens are as scattered as they can be."""
    pair = rig.bound_pair()
    count = hold_many(rig, pair, 600)
    pair.collector.forget(range(1, count + 1, 2))
    for start in range(1, count + 1, 2 * MAX_DONTNEED_TOKENS):
        some = range(start, min(start + 2 * MAX_DONTNEED_TOKENS, count + 1), 2)
        assert pair.sock.dontneed(token_ranges(*((token, 1) for token in some))) == len(some)
    before = out(pair)
    pair.peer.sendall(rig.payload(150_000))
    pair.sock.settimeout(STARVE_WAIT_S)
    batch = pair.sock.recv_frags()
    held = sorted(int(token) for token in batch.tokens if token)
    ranges = bool(held) + sum(high != low + 1 for low, high in pairwise(held))
    calls = pair.sock.stats.dontneed_calls
    batch.release()
    needed = -(-ranges // MAX_DONTNEED_TOKENS) + len(held) // MAX_DONTNEED_FRAGS
    assert bool(held) <= pair.sock.stats.dontneed_calls - calls <= needed
    assert out(pair) == before


def test_release_after_dontneed_is_a_token_error(rig: Rig) -> None:
    pair = rig.bound_pair()
    batch = hold_batch(rig, pair)
    held = [int(token) for token in batch.tokens if token]
    assert pair.sock.dontneed(token_ranges((held[0], 1))) == 1
    with raises(TokenError) as caught:
        batch.release()
    assert (caught.error.asked, caught.error.freed) == (len(held), len(held) - 1)
    assert out(pair) == 0


def test_release_of_a_foreign_batch_frees_nothing_here(rig: Rig) -> None:
    rx = rig.bind()
    first, second = rig.pair_on(rx), rig.pair_on(rx)
    batch = hold_batch(rig, first)
    held = out(first)
    hold_many(rig, second, 1)
    mine = out(second)
    batch.release()
    assert (out(first), out(second)) == (0, mine)
    assert held >= 1


def test_batch_after_its_socket_closed(rig: Rig) -> None:
    pair = rig.bound_pair()
    batch = hold_batch(rig, pair)
    pair.sock.close()
    assert pair.rx.drained
    with raises(StaleFragError):
        _ = batch.frags
    batch.release()  # the kernel has the tokens already: no error
