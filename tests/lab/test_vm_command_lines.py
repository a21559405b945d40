"""Command lines of QEMU and virtiofsd, and how unpacked programs are started."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import pytest

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.vm import programs
from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.programs import Programs
from devmem_tcp.lab.vm.qemu import CHANNELS, CONSOLE, GuestShape, probe_command, qemu_command, virtiofsd_command

PROGRAMS = Programs(qemu=("ld", "qemu"), virtiofsd=("ld", "virtiofsd"), environment={}, tools=None)
KERNEL = Kernel("7.3.4", Path("/cache/vmlinuz"), None)
FDS = {name: 10 + number for number, name in enumerate((*CHANNELS, CONSOLE))}


def options(command: list[str], name: str) -> list[str]:
    """Return every value of an option."""
    return [value for option, value in itertools.pairwise(command) if option == name]


def qemu(shape: GuestShape, accelerator: str = "tcg", console: Path = Path("/run/console.log")) -> list[str]:
    return qemu_command(
        PROGRAMS,
        KERNEL,
        shape,
        accelerator=accelerator,
        console=console,
        root_socket=Path("/run/root"),
        init=Path("/run/init"),
        channel_fds=FDS,
    )


def test_a_guest_without_nics() -> None:
    command = qemu(GuestShape())
    assert command[:2] == ["ld", "qemu"]
    assert options(command, "-accel") == ["tcg,thread=multi,tb-size=256"]
    assert options(command, "-cpu") == ["max"]
    assert options(command, "-m") == ["1024M"]
    assert options(command, "-object") == ["memory-backend-memfd,id=ram,size=1024M,share=on"]
    assert options(command, "-numa") == ["node,nodeid=0,memdev=ram"]
    assert "vhost-user-fs-pci,chardev=root,tag=hostroot" in options(command, "-device")
    assert options(command, "-run-with") == ["exit-with-parent=on"]
    assert not any("vfio-user" in value for value in options(command, "-device"))
    kernel_arguments = options(command, "-append")[0].split()
    assert {"root=hostroot", "rootfstype=virtiofs", "ro", "init=/run/init", "panic=-1"} <= set(kernel_arguments)
    assert "quiet" not in kernel_arguments, "a WARN must reach the console"


def test_each_channel_has_its_fd_and_its_name() -> None:
    command = qemu(GuestShape())
    for name in CHANNELS:
        assert f"socket,id={name},fd={FDS[name]}" in options(command, "-chardev")
        assert f"virtserialport,chardev={name},name=devmem-lab.{name}" in options(command, "-device")
    assert f"socket,id=console,fd={FDS[CONSOLE]},logfile=/run/console.log" in options(command, "-chardev")
    assert options(command, "-serial") == ["chardev:console"]


def test_nics_keep_their_order_and_their_paths() -> None:
    sockets = (Path("/run/a,b"), Path('/run/"c"'))
    plugs = [json.loads(value) for value in options(qemu(GuestShape(nic_sockets=sockets)), "-device") if "{" in value]
    assert [plug["socket"]["path"] for plug in plugs] == ["/run/a,b", '/run/"c"']
    assert {plug["driver"] for plug in plugs} == {"vfio-user-pci"}


def test_kvm_takes_the_hosts_processor() -> None:
    command = qemu(GuestShape(), accelerator="kvm")
    assert options(command, "-accel") == ["kvm"]
    assert options(command, "-cpu") == ["host"]


def test_second_memory_is_a_node_of_its_own() -> None:
    command = qemu(GuestShape(memory_mib=512, second_memory=Path("/tmp/m,n"), second_memory_mib=256))
    assert options(command, "-m") == ["768M"]
    assert options(command, "-object")[1] == "memory-backend-file,id=second,size=256M,mem-path=/tmp/m,,n,share=on"
    assert options(command, "-numa") == ["node,nodeid=0,memdev=ram", "node,nodeid=1,memdev=second"]


@pytest.mark.parametrize(("memory_mib", "second_memory_mib"), [(1024, 256), (2047, 768), (2048, 2048), (4096, 256)])
def test_second_memory_in_one_range_of_addresses_is_taken(memory_mib: int, second_memory_mib: int) -> None:
    GuestShape(memory_mib=memory_mib, second_memory=Path("/tmp/x"), second_memory_mib=second_memory_mib)


@pytest.mark.parametrize(("memory_mib", "second_memory_mib"), [(1024, 2048), (2047, 769)])
def test_second_memory_on_both_sides_of_4_gib_is_refused(memory_mib: int, second_memory_mib: int) -> None:
    with pytest.raises(ValueError, match="both sides"):
        GuestShape(memory_mib=memory_mib, second_memory=Path("/tmp/x"), second_memory_mib=second_memory_mib)


def test_commas_in_a_path_are_doubled() -> None:
    assert any("logfile=/a,,b" in value for value in options(qemu(GuestShape(), console=Path("/a,b")), "-chardev"))


@pytest.mark.parametrize(
    "shape",
    [{"memory_mib": 255}, {"cpus": 0}, {"second_memory_mib": 256}, {"second_memory": Path("/tmp/x")}],
)
def test_a_shape_that_cannot_be_is_refused(shape: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"guest|second memory"):
        GuestShape(**shape)  # type: ignore[arg-type]


def test_the_root_is_served_read_only() -> None:
    for privileged, sandbox in ((True, "--sandbox=chroot"), (False, "--sandbox=none")):
        command = virtiofsd_command(PROGRAMS, 7, privileged=privileged)
        assert command[:2] == ["ld", "virtiofsd"]
        assert {"--fd=7", "--shared-dir=/", "--readonly", "--cache=always", sandbox} <= set(command)


def test_the_probe_boots_without_a_root() -> None:
    command = probe_command(PROGRAMS, KERNEL, "kvm", Path("/tmp/console"))
    assert options(command, "-accel") == ["kvm"]
    assert "root=" not in options(command, "-append")[0]


# --- programs --------------------------------------------------------------------------------------------------------


def test_an_unpacked_program_runs_with_its_own_loader(tmp_path: Path) -> None:
    made = programs.unpacked(tmp_path)
    assert made.qemu[:4] == (
        f"{tmp_path}/usr/lib64/ld-linux-x86-64.so.2",
        "--library-path",
        f"{tmp_path}/usr/lib/x86_64-linux-gnu",
        f"{tmp_path}/usr/bin/qemu-system-x86_64",
    )
    assert made.environment == {"QEMU_MODULE_DIR": f"{tmp_path}/usr/lib/x86_64-linux-gnu/qemu"}
    assert made.tools == tmp_path / "bin"


def test_a_wrapper_passes_its_arguments_on_from_a_path_with_spaces(tmp_path: Path) -> None:
    root = tmp_path / "the root"
    for name in ("usr/lib64", "usr/bin"):
        (root / name).mkdir(parents=True)
    loader = root / "usr/lib64/ld-linux-x86-64.so.2"
    loader.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    loader.chmod(0o755)
    (root / "usr/bin/ip").touch()
    programs.write_tool_wrappers(root, root)
    done = subprocess.run([root / "bin/ip", "a b", "*"], capture_output=True, text=True, check=True)
    libraries = root / "usr/lib/x86_64-linux-gnu"
    assert done.stdout == f"--argv0|ip|--library-path|{libraries}|{root}/usr/bin/ip|a b|*|"


def test_ones_own_qemu_goes_with_the_hosts_virtiofsd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("qemu-system-x86_64", "virtiofsd"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    made = programs.brought("qemu-system-x86_64", None)
    assert made.qemu == (str(tmp_path / "qemu-system-x86_64"),)
    assert made.virtiofsd == (str(tmp_path / "virtiofsd"),)
    with pytest.raises(DevmemError, match="no such program"):
        programs.brought(str(tmp_path / "nowhere"), None)


def test_ones_own_qemu_goes_with_the_virtiofsd_that_was_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    qemu = tmp_path / "my-qemu"
    qemu.write_text("#!/bin/sh\n")
    qemu.chmod(0o755)
    monkeypatch.setenv("PATH", "/nonexistent")
    fetched = programs.unpacked(tmp_path / "cache")
    made = programs.brought(str(qemu), fetched)
    assert made.qemu == (str(qemu),)
    assert (made.virtiofsd, made.tools) == (fetched.virtiofsd, fetched.tools)
    assert made.environment == {}, "modules of the fetched QEMU are not for another one"
    monkeypatch.setattr(programs, "_VIRTIOFSD_PLACES", ())
    with pytest.raises(DevmemError, match="no virtiofsd"):
        programs.brought(str(qemu), None)
