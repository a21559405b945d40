"""The table of what Linux refuses: it is unambiguous, and finds what the kernel said."""

from __future__ import annotations

import errno
from collections import Counter

import pytest

from devmem_tcp import refusals
from devmem_tcp.errors import BindError, KernelError, NicSettingError
from devmem_tcp.refusals import REFUSALS, VARIES, Refusal


def test_every_refusal_says_why_where_and_what_next() -> None:
    for refusal in REFUSALS:
        assert refusal.cause, refusal
        assert refusal.fix, refusal
        assert ".c" in refusal.source, refusal


def test_no_two_are_recognised_by_the_same() -> None:
    keys = Counter((refusal.call, refusal.errno, refusal.extack, refusal.attr) for refusal in REFUSALS)
    assert [key for key, count in keys.items() if count > 1] == []


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: f"{refusal.call} {refusal.errno} {refusal.extack}")
def test_each_is_found_by_what_the_kernel_says(refusal: Refusal) -> None:
    said = KernelError(
        refusal.errno,
        f"netdev {refusal.call}",
        extack=refusal.extack.replace(VARIES, "(addr=0x4883000, len=4096)"),
        attr=refusal.attr.replace(VARIES, "ifindex"),
    )
    assert refusals.find(said) is refusal


@pytest.mark.parametrize(
    "error",
    [
        KernelError(errno.EINVAL, "netdev bind-rx", extack="words of a kernel to come"),
        KernelError(errno.EINVAL, "netdev bind-rx", attr="fd"),  # not the same as one without an attribute
        KernelError(errno.EBUSY, "netdev bind-rx"),
        KernelError(errno.ENODEV, "ethtool rings-get"),
        KernelError(errno.ERANGE, "netdev bind-rx", extack="integer out of range", attr="ifindex"),
    ],
)
def test_what_is_not_known_is_not_guessed(error: KernelError) -> None:
    assert refusals.find(error) is None


def test_exact_words_come_before_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Refusal("bind-rx", errno.EIO, "a pattern", "-", "a.c", extack=f"no {VARIES}")
    exact = Refusal("bind-rx", errno.EIO, "exact", "-", "a.c", extack="no luck")
    monkeypatch.setattr(refusals, "REFUSALS", (pattern, exact))
    assert refusals.find(KernelError(errno.EIO, "bind-rx", extack="no luck")) is exact
    assert refusals.find(KernelError(errno.EIO, "bind-rx", extack="no joy")) is pattern


def test_a_model_of_the_kernel_raises_it_in_the_kernels_words() -> None:
    error = refusals.HEADER_SPLIT_OFF.error(BindError)
    assert isinstance(error, BindError)
    assert (error.errno, error.call, error.extack) == (errno.EINVAL, "bind-rx", "tcp-data-split is disabled")
    assert error.hint == refusals.HEADER_SPLIT_OFF.fix
    assert refusals.find(error) is refusals.HEADER_SPLIT_OFF
    own = refusals.HEADER_SPLIT_NEEDED.error(NicSettingError, call="ethtool -G", hint="unbind")
    assert (own.call, own.hint) == ("ethtool -G", "unbind")
