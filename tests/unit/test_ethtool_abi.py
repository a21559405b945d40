"""The ethtool ABI in Python against golden bytes, and these against this machine's C compiler and headers."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from devmem_tcp.kernel.ntuple import flow_spec
from devmem_tcp.types import Family, FlowRule
from devmem_tcp.uapi import ethtool as abi

HERE = Path(__file__).parent
SOURCE = HERE / "ethtool_abi.c"
GOLDEN = HERE / "ethtool_abi.golden"

PLAIN_NAMES = [
    "SIOCETHTOOL",
    "SIOCGIFHWADDR",
    "IFNAMSIZ",
    "ETHTOOL_GDRVINFO",
    "ETHTOOL_GPERMADDR",
    "ETHTOOL_GRXRINGS",
    "ETHTOOL_GRXCLSRLCNT",
    "ETHTOOL_GRXCLSRULE",
    "ETHTOOL_GRXCLSRLALL",
    "ETHTOOL_SRXCLSRLDEL",
    "ETHTOOL_SRXCLSRLINS",
    "ETHTOOL_GRSSH",
    "ETHTOOL_SRSSH",
    "TCP_V4_FLOW",
    "TCP_V6_FLOW",
    "FLOW_EXT",
    "FLOW_MAC_EXT",
    "FLOW_RSS",
    "RX_CLS_LOC_SPECIAL",
    "RX_CLS_LOC_ANY",
    "ETH_RXFH_INDIR_NO_CHANGE",
]
ENUMS = {
    "ETHTOOL_MSG_": abi.Command,
    "ETHTOOL_A_HEADER_": abi.Header,
    "ETHTOOL_A_RINGS_": abi.Rings,
    "ETHTOOL_A_CHANNELS_": abi.Channels,
    "ETHTOOL_A_FEATURES_": abi.Features,
    "ETHTOOL_A_BITSET_": abi.Bitset,
    "ETHTOOL_A_BITSET_BIT_": abi.BitsetBit,
}
NEWER_THAN_MANY_HEADERS = {"ETHTOOL_A_RINGS_HDS_THRESH": 17, "ETHTOOL_A_RINGS_HDS_THRESH_MAX": 18}
TCP4_RULE = FlowRule(
    queue=15,
    family=Family.TCP4,
    src_ip="10.1.2.3",
    dst_ip="10.0.0.0/8",
    src_port=0x1234,
    dst_port=5201,
    src_port_mask=0xFF00,
    location=1023,
)
TCP6_RULE = FlowRule(3, Family.TCP6, "fd77::1", "fd77::2", 40000, 443)


def golden() -> dict[str, str]:
    return dict(line.split("=", 1) for line in GOLDEN.read_text().splitlines())


def our_numbers() -> dict[str, int]:
    numbers: dict[str, int] = {name: getattr(abi, name) for name in PLAIN_NAMES}
    for prefix, enum in ENUMS.items():
        numbers |= {prefix + member.name: member.value for member in enum}
    numbers["ETHTOOL_A_BITSET_BITS_BIT"] = abi.BITSET_BITS_BIT
    for mode in ("UNKNOWN", "DISABLED", "ENABLED"):
        numbers[f"ETHTOOL_TCP_DATA_SPLIT_{mode}"] = getattr(abi, f"TCP_DATA_SPLIT_{mode}")
    return numbers | {
        "sizeof(struct ifreq)": abi.IFREQ_SIZE,
        "sizeof(struct ethtool_drvinfo)": abi.DRVINFO.size,
        "sizeof(struct ethtool_perm_addr)": abi.PERM_ADDR.size,
        "sizeof(struct ethtool_rxfh)": abi.RXFH.size,
        "sizeof(struct ethtool_tcpip4_spec)": abi.TCPIP4_SPEC.size,
        "sizeof(struct ethtool_tcpip6_spec)": abi.TCPIP6_SPEC.size,
        "sizeof(struct ethtool_rx_flow_spec)": abi.FLOW_SPEC.size,
        "sizeof(struct ethtool_rxnfc)": abi.RXNFC_SIZE,
        "offsetof(struct ethtool_rxnfc, fs)": abi.RXNFC_HEAD.size,
        "offsetof(struct ethtool_rxnfc, rule_cnt)": abi.RULE_CNT_OFFSET,
        "offsetof(struct ethtool_rxnfc, rule_locs)": abi.RULE_LOCS_OFFSET,
    }


def our_bytes() -> dict[str, bytes]:
    tcp4 = flow_spec(TCP4_RULE)
    odd = abi.FLOW_SPEC.pack(0x02 | abi.FLOW_EXT, b"", b"", b"", b"", abi.RX_CLS_FLOW_DISC, 7)
    listed = abi.pack_rxnfc(abi.ETHTOOL_GRXCLSRLALL, rule_cnt=3)
    struct.pack_into("=Q", listed, 8, 1024)
    struct.pack_into("=III", listed, abi.RULE_LOCS_OFFSET, 1021, 1022, 1023)
    rss = abi.pack_rxfh(abi.ETHTOOL_SRSSH, indir=(0, 1, 2, 0x01020304), key=bytes(range(1, 9)), context=5)
    driver = abi.DRVINFO.pack(abi.ETHTOOL_GDRVINFO, b"gve", b"7.3", b"fw", b"0000:00:03.0", b"", 0, 9, 0, 0, 0)
    return {
        "ethtool_rx_flow_spec tcp4": tcp4,
        "ethtool_rx_flow_spec tcp6": flow_spec(TCP6_RULE),
        "ethtool_rx_flow_spec odd": odd,
        "ethtool_rxnfc insert": bytes(abi.pack_rxnfc(abi.ETHTOOL_SRXCLSRLINS, spec=tcp4)),
        "ethtool_rxnfc all": bytes(listed),
        "ethtool_rxfh": bytes(rss),
        "ethtool_drvinfo": driver,
        "ifreq": bytes(abi.pack_ifreq("eth1", 0x0102030405060708)),
    }


def test_every_golden_line_equals_ours() -> None:
    numbers = our_numbers()
    assert {name: numbers.pop(name) for name in NEWER_THAN_MANY_HEADERS} == NEWER_THAN_MANY_HEADERS
    ours = {name: str(number) for name, number in numbers.items()}
    ours |= {name: data.hex() for name, data in our_bytes().items()}
    assert ours == golden()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: golden bytes checked only")
def test_golden_is_what_a_c_program_prints(tmp_path: Path) -> None:
    program = tmp_path / "ethtool_abi"
    compiled = subprocess.run(
        ["cc", "-std=gnu11", "-Wall", "-o", program, SOURCE], capture_output=True, text=True, timeout=50, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
    printed = subprocess.run([program], capture_output=True, text=True, timeout=10, check=True).stdout
    assert printed == GOLDEN.read_text()


def test_answers_are_read_as_the_kernel_writes_them() -> None:
    answer = abi.unpack_rxnfc(bytes.fromhex(golden()["ethtool_rxnfc all"]))
    assert (answer.data, answer.rule_cnt, answer.locations) == (1024, 3, (1021, 1022, 1023))
    inserted = abi.unpack_rxnfc(bytes.fromhex(golden()["ethtool_rxnfc insert"]))
    assert inserted.spec == flow_spec(TCP4_RULE)
    rss = abi.unpack_rxfh(bytes.fromhex(golden()["ethtool_rxfh"]))
    assert (rss.indir, rss.key) == ((0, 1, 2, 0x01020304), bytes(range(1, 9)))
    assert (rss.indir_size, rss.key_size, rss.hfunc, rss.input_xfrm) == (4, 8, 0, 0)


def test_more_rules_than_there_was_room_for_are_not_read_past_the_end() -> None:
    answer = abi.pack_rxnfc(abi.ETHTOOL_GRXCLSRLALL, rule_cnt=2)
    struct.pack_into("=I", answer, abi.RULE_CNT_OFFSET, 1000)
    assert len(abi.unpack_rxnfc(answer).locations) == 2


def test_location_is_in_its_place() -> None:
    tcp4 = flow_spec(TCP4_RULE)
    assert abi.FLOW_SPEC.unpack(abi.with_location(tcp4, 77))[-1] == 77
    assert abi.with_location(abi.with_location(tcp4, 77), 1023) == tcp4
    request = abi.pack_rxnfc(abi.ETHTOOL_SRXCLSRLDEL, location=77)
    assert abi.FLOW_SPEC.unpack(abi.unpack_rxnfc(request).spec)[-1] == 77


def test_what_is_too_short_or_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="192 bytes, not 10"):
        abi.unpack_rxnfc(bytes(10))
    with pytest.raises(ValueError, match="168 bytes, not 3"):
        abi.pack_rxnfc(1, spec=b"abc")
    with pytest.raises(ValueError, match="ethtool_rxnfc"):
        abi.pack_rxnfc(1, location=1 << 32)
    with pytest.raises(ValueError, match="ethtool_rxfh"):
        abi.pack_rxfh(1, indir=(-1,))
    with pytest.raises(ValueError, match="4 entries"):
        abi.unpack_rxfh(bytes.fromhex(golden()["ethtool_rxfh"])[:-1])


@pytest.mark.parametrize("name", ["", "a" * 16])
def test_names_no_interface_can_have_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 15 bytes"):
        abi.pack_ifreq(name)


def test_hardware_address_is_read() -> None:
    ifreq = abi.pack_ifreq("eth1")
    ifreq[16:24] = b"\x01\x00\x02\x00\x00\x00\x00\x07"
    assert abi.unpack_hardware_address(ifreq) == b"\x02\x00\x00\x00\x00\x07"
