"""The private apt: what it reads out of apt's output, and the settings that keep it within its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.vm.apt import deb_path, first_error, mirror_from_targets, planned_packages, settings_text

TARGETS = """\
|Other|stable|https://other.example/apt/
Debian|Debian-Security|bookworm-security|http://mirror.example/debian-security/
Debian|Debian|bookworm|http://mirror.example/debian/
Debian|Debian|bookworm-updates|http://second.example/debian/
"""

SIMULATION = """\
Reading package lists...
The following NEW packages will be installed:
  libc6 qemu-system-x86
Inst libc6 (2.41-12+deb13u5 Debian:13.1/stable [amd64])
Inst zlib1g [1:1.2.13] (1:1.3.1-1 Debian:13.1/stable [amd64])
Inst qemu-system-x86 (1:11.1.3+ds-1~bpo13+1 Debian Backports:stable-backports [amd64])
Conf libc6 (2.41-12+deb13u5 Debian:13.1/stable [amd64])
"""


def test_the_mirror_is_that_of_the_debian_archive() -> None:
    assert mirror_from_targets(TARGETS) == "http://mirror.example/debian/"


@pytest.mark.parametrize("origin", ["", "$(ORIGIN)"])
def test_a_suite_name_decides_where_lists_were_never_fetched(origin: str) -> None:
    unknown = f"{origin}||nodistro|http://other.example/\n{origin}||bookworm-security|http://mirror.example/security/\n"
    assert mirror_from_targets(unknown) is None
    assert mirror_from_targets(f"{unknown}{origin}||trixie|http://mirror.example/debian/\n") == (
        "http://mirror.example/debian/"
    )


@pytest.mark.parametrize("text", ["", "garbage\n", "Ubuntu|Ubuntu|noble|http://mirror.example/ubuntu/\n"])
def test_without_a_debian_archive_there_is_no_mirror(text: str) -> None:
    assert mirror_from_targets(text) is None


def test_the_plan_is_what_would_be_installed() -> None:
    assert planned_packages(SIMULATION) == {
        "libc6": "2.41-12+deb13u5",
        "zlib1g": "1:1.3.1-1",
        "qemu-system-x86": "1:11.1.3+ds-1~bpo13+1",
    }


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("Hit:1 x\nErr:2 y trixie\n  Could not resolve 'y'\nE: later", "Err:2 y trixie Could not resolve 'y'"),
        ("W: something\nE: Unable to locate package q", "E: Unable to locate package q"),
        ("Reading...\nlast words", "last words"),
        ("", "apt said nothing"),
    ],
)
def test_the_line_that_says_most_is_shown(output: str, said: str) -> None:
    assert first_error(output) == said


def test_settings_keep_apt_in_its_folder_and_the_hosts_hooks_out() -> None:
    folder = Path("/cache folder/apt")
    text = settings_text(folder, 'Acquire::http::Proxy "http://proxy.example:3128";\nAcquire::Languages "en";\n')
    assert 'Dir::State "/cache folder/apt/state";' in text
    assert 'Dir::Cache "/cache folder/apt/cache";' in text
    assert 'Dir::Etc::parts "/dev/null";' in text
    assert 'APT::Get::AllowUnauthenticated "false";' in text
    assert 'Acquire::http::Proxy "http://proxy.example:3128";' in text
    assert text.count("Acquire::Languages") == 1


def test_a_package_file_is_found_by_the_name_apt_gives_it(tmp_path: Path) -> None:
    for name in ("qemu_1%3a11.1_amd64.deb", "seabios_1.17_all.deb"):
        (tmp_path / name).touch()
    assert deb_path(tmp_path, "qemu", "1:11.1").name == "qemu_1%3a11.1_amd64.deb"
    assert deb_path(tmp_path, "seabios", "1.17").name == "seabios_1.17_all.deb"
    with pytest.raises(DevmemError, match=r"libc6_2\.41"):
        deb_path(tmp_path, "libc6", "2.41")
