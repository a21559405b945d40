"""What is fetched: the choice of a kernel, and a cache that is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.vm import kernels, packages
from devmem_tcp.lab.vm.cache import Cache, build_once, read_manifest
from devmem_tcp.lab.vm.packages import Installation
from devmem_tcp.lab.vm.programs import GUEST_TOOLS

NAMES = [
    "linux-base-7.3.4+deb13-amd64",
    "linux-binary-7.3.4+deb13-amd64",
    "linux-modules-7.3.4+deb13-amd64",
    "linux-base-7.2.9+deb13-amd64",
    "linux-binary-7.2.9+deb13-amd64",
    "linux-modules-7.2.9+deb13-amd64",
    "linux-base-7.2.12+deb13-amd64",
    "linux-binary-7.2.12+deb13-amd64",
    "linux-modules-7.2.12+deb13-amd64",
    "linux-base-7.4.1+deb13-amd64",
    "linux-binary-7.4.1+deb13-amd64",  # its modules have gone from the suite
    "linux-binary-7.3.4+deb13-cloud-amd64",
    "linux-modules-7.3.4+deb13-rt-amd64",
    "linux-image-6.12.107+deb13-amd64",
]


def test_a_release_counts_only_with_all_its_packages_and_numbers_are_compared_as_numbers() -> None:
    assert kernels.releases(NAMES) == ["7.3.4+deb13-amd64", "7.2.12+deb13-amd64", "7.2.9+deb13-amd64"]


@pytest.mark.parametrize(
    ("wanted", "release"),
    [
        ("7.2", "7.2.12+deb13-amd64"),
        ("7.2.9", "7.2.9+deb13-amd64"),
        ("7.2.12+deb13-amd64", "7.2.12+deb13-amd64"),
        (None, kernels.PINNED_RELEASE),
    ],
)
def test_choosing_a_kernel(wanted: str | None, release: str) -> None:
    assert kernels.choose(kernels.releases(NAMES), wanted) == release


def test_the_newest_kernel_stands_in_for_the_pinned_one() -> None:
    assert kernels.choose(["8.0.1+deb13-amd64", "7.9.9+deb13-amd64"], None) == "8.0.1+deb13-amd64"


@pytest.mark.parametrize("wanted", ["7.2.1", "6.12", "x"])
def test_a_kernel_that_is_not_there_is_refused_with_those_that_are(wanted: str) -> None:
    with pytest.raises(DevmemError) as caught:
        kernels.choose(kernels.releases(NAMES), wanted)
    assert "7.2.12+deb13-amd64" in caught.value.hint


def test_no_kernel_at_all_is_refused() -> None:
    with pytest.raises(DevmemError, match="no kernel"):
        kernels.choose([], None)


def test_a_kernel_of_ones_own_is_an_image_or_the_tree_it_was_built_in(tmp_path: Path) -> None:
    image = tmp_path / "arch/x86/boot/bzImage"
    image.parent.mkdir(parents=True)
    image.touch()
    assert kernels.brought(tmp_path, None).image == image
    assert kernels.brought(image, None).image == image
    assert kernels.brought(image, None).module_files("gve") == []
    with pytest.raises(DevmemError, match="no kernel image"):
        kernels.brought(tmp_path / "nowhere", None)
    with pytest.raises(DevmemError, match="no folder of modules"):
        kernels.brought(image, tmp_path / "nowhere")


def test_a_module_is_loaded_after_those_it_needs(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("kernel/a/dash-name.ko.xz: kernel/b/near.ko.xz kernel/c/far.ko.xz\nx.ko:\n")
    kernel = kernels.Kernel("test", tmp_path / "vmlinuz", tmp_path)
    assert kernel.module_files("dash_name") == [
        tmp_path / name for name in ("kernel/c/far.ko.xz", "kernel/b/near.ko.xz", "kernel/a/dash-name.ko.xz")
    ]
    assert kernel.module_files("built_in") == []


def test_a_module_is_found_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/gve.ko").touch()
    assert kernels.Kernel("test", tmp_path / "vmlinuz", tmp_path).module_files("gve") == [tmp_path / "deep/gve.ko"]


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_folder_is_made_once_for_the_same_packages(tmp_path: Path) -> None:
    fills: list[str] = []

    def fill(folder: Path) -> None:
        fills.append(folder.name)
        (folder / "content").write_text(str(len(fills)))

    place = tmp_path / "programs"
    assert build_once(place, {"a": "1"}, fill)
    assert not build_once(place, {"a": "1"}, fill)
    assert build_once(place, {"a": "2"}, fill)
    assert (place / "content").read_text() == "2"
    assert read_manifest(place) == {"a": "2"}
    assert len(fills) == 2


def test_an_interrupted_attempt_is_made_anew_and_leaves_no_half_folder(tmp_path: Path) -> None:
    place = tmp_path / "programs"

    def interrupted(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(place, {"a": "1"}, interrupted)
    assert not place.exists()
    assert build_once(place, {"a": "1"}, lambda folder: (folder / "whole").touch())
    assert (place / "whole").exists()
    assert not (place / "half").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"packages": 3}', "{}"])
def test_a_spoilt_manifest_means_nothing_is_there(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert read_manifest(tmp_path) == {}


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache.of_user().root == tmp_path / "devmem-tcp/lab"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Cache.of_user().root == Path("/home/somebody/.cache/devmem-tcp/lab")


def test_old_runs_go_except_those_still_running(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for number in range(15):
        (runs / f"20200101-0000{number:02d}-000-99999999").mkdir(parents=True)  # beyond any process id
    alive = runs / f"20190101-000000-000-{os.getpid()}"
    alive.mkdir()
    made = Cache(tmp_path).new_run()
    left = sorted(runs.iterdir())
    assert made in left
    assert alive in left
    assert len(left) == 11


class FakeApt:
    """Stands for PrivateApt: every package there is, of version 1, is a file that names its content."""

    log: list[str]

    def __init__(self, folder: Path, *, mirror: str | None = None) -> None:
        pass

    def update(self) -> None:
        self.log.append("update")

    def names(self, pattern: str) -> list[str]:
        return NAMES

    def versions(self, name: str) -> list[str]:
        return ["1"]

    def plan(self, wanted: Sequence[str]) -> dict[str, str]:
        return {name.partition("=")[0]: "1" for name in wanted}

    def download(self, packages: Mapping[str, str], folder: Path, progress: object, what: str) -> list[Path]:
        self.log.append(what)
        return [folder / name for name in packages]


def fake_unpack(debs: Iterable[Path], folder: Path, progress: object, what: str) -> None:
    for deb in debs:
        part, _, release = deb.name.removeprefix("linux-").partition("-")
        if part == "binary":
            image = folder / "usr/lib/modules" / release / "vmlinuz"
            image.parent.mkdir(parents=True)
            image.touch()
        elif deb.name == "kmod":
            loader = folder / "usr/lib64/ld-linux-x86-64.so.2"
            loader.parent.mkdir(parents=True)
            loader.write_text('#!/bin/sh\ntouch "$7/depmod-ran"\n')  # --argv0 depmod --library-path L kmod -b ROOT
            loader.chmod(0o755)
            (folder / GUEST_TOOLS["modprobe"]).parent.mkdir(parents=True)
            (folder / GUEST_TOOLS["modprobe"]).touch()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Installation:
    FakeApt.log = []
    monkeypatch.setattr(packages, "PrivateApt", FakeApt)
    monkeypatch.setattr(packages, "unpack", fake_unpack)
    return Installation(Cache(tmp_path), lambda what, part: None)


def test_setting_up_twice_fetches_once(installed: Installation, tmp_path: Path) -> None:
    kernel = installed.kernel()
    assert kernel.name == kernels.PINNED_RELEASE
    assert kernel.image == tmp_path / "kernels" / kernel.name / "usr/lib/modules" / kernel.name / "vmlinuz"
    assert (tmp_path / "kernels" / kernel.name / "usr/depmod-ran").exists()
    assert FakeApt.log == ["update", "fetching QEMU and tools", f"fetching kernel {kernel.name}"]

    again = Installation(Cache(tmp_path), lambda what, part: None)
    assert again.kernel() == kernel
    assert again.programs() == installed.programs()
    assert len(FakeApt.log) == 3


def test_another_kernel_is_fetched_beside_the_first(installed: Installation) -> None:
    installed.kernel()
    assert installed.kernel("7.2").name == "7.2.12+deb13-amd64"
    assert installed.held_kernels() == [kernels.PINNED_RELEASE, "7.2.12+deb13-amd64"]
    assert installed.kernel().name == kernels.PINNED_RELEASE
    assert FakeApt.log.count("update") == 1


def test_tools_are_wrapped_for_the_guest_with_their_final_place(installed: Installation, tmp_path: Path) -> None:
    installed.programs()
    wrapper = tmp_path / "programs/bin/modprobe"
    assert os.access(wrapper, os.X_OK)
    text = wrapper.read_text()
    assert f"{tmp_path}/programs/usr/bin/kmod" in text
    assert "--argv0 modprobe" in text
    assert not (tmp_path / "programs/bin/iperf3").exists()
