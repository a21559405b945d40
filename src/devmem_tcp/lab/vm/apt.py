"""A private apt: other suites than the host's, from the host's own mirror, without touching the host's packages.

Everything apt writes is in one folder of the user; nothing is installed. Signatures are checked with Debian's archive
keyring, and the host's hooks never run (its ``Acquire`` settings, proxies for instance, are kept).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from devmem_tcp.errors import DevmemError

SUITES: Final = ("trixie", "trixie-backports")
Progress: TypeAlias = Callable[[str, float], None]
"""Told what is being done, and the part of it that is, 0 to 1."""

_KEYRINGS: Final = (
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
)
_TARGET_FORMAT: Final = "$(ORIGIN)|$(LABEL)|$(RELEASE)|$(REPO_URI)"
_DEBIAN_SUITE: Final = re.compile(r"(?:bullseye|bookworm|trixie|forky|duke|sid|(?:old)*stable|testing|unstable)")
_INSTALL: Final = re.compile(r"^Inst (?P<name>\S+) (?:\[\S+\] )?\((?P<version>\S+) ", re.MULTILINE)
_DOWNLOAD_STATUS: Final = re.compile(rb"dlstatus:\d+:(?P<percent>[\d.]+):")
_BRING_YOUR_OWN: Final = "bring your own with --kernel and --qemu, or name a Debian mirror with --mirror"


def mirror_from_targets(text: str) -> str | None:
    """Return the address of the Debian archive among the host's own package sources, or None.

    Args:
        text: what ``apt-get indextargets`` prints in ``_TARGET_FORMAT``. Where the lists were never fetched, origin and
            label are empty or unexpanded: then a plain Debian suite name decides.
    """
    targets = [fields for line in text.splitlines() if len(fields := line.split("|")) == 4]
    for origin, label, _, address in targets:
        if (origin, label) == ("Debian", "Debian"):
            return address
    for origin, _, release, address in targets:
        if origin in ("", "$(ORIGIN)") and _DEBIAN_SUITE.fullmatch(release):
            return address
    return None


def planned_packages(text: str) -> dict[str, str]:
    """Return the packages (name to version) that ``apt-get --simulate install`` would install, in its order."""
    return {match["name"]: match["version"] for match in _INSTALL.finditer(text)}


def first_error(text: str) -> str:
    """Return the line of apt's output that says best what went wrong."""
    lines = [line.strip() for line in text.splitlines()]
    for start in ("Err:", "E: Failed to fetch", "E:", "W:"):
        for index, line in enumerate(lines):
            if line.startswith(start):
                cause = lines[index + 1] if start == "Err:" and index + 1 < len(lines) else ""
                return f"{line} {cause}".strip()
    return lines[-1] if lines else "apt said nothing"


class PrivateApt:
    """apt with directories of its own.

    Args:
        folder: where apt keeps its lists and settings.
        mirror: the archive's address; by default the one the host's own apt uses.

    Raises:
        DevmemError: no apt on this machine, no Debian mirror among its sources, or no keyring to check signatures with.
    """

    def __init__(self, folder: Path, *, mirror: str | None = None) -> None:
        self._folder: Final = folder
        if shutil.which("apt-get") is None:
            raise DevmemError(
                "this machine has no apt-get: the lab fetches its parts as Debian packages", hint=_BRING_YOUR_OWN
            )
        keyring = next((path for path in _KEYRINGS if path.exists()), None)
        if keyring is None:
            raise DevmemError(
                "no Debian keyring to check signatures with", hint="apt-get install debian-archive-keyring"
            )
        self.mirror: Final = mirror or _host_mirror()
        self._write_settings(keyring)

    def update(self) -> None:
        """Fetch the lists of the suites.

        Raises:
            DevmemError: a suite cannot be reached, or its signature is wrong.
        """
        done = self._run("apt-get", "update", "--quiet")
        if done.returncode:
            raise DevmemError(
                f"the suites {' and '.join(SUITES)} cannot be had from {self.mirror}: "
                f"{first_error(done.stdout + done.stderr)}",
                hint=f"check the network and its proxy; {_BRING_YOUR_OWN}",
            )

    def names(self, pattern: str) -> list[str]:
        """Return the names of packages that match an extended regular expression."""
        text = self._checked("apt-cache", "search", "--names-only", pattern)
        return [line.partition(" ")[0] for line in text.splitlines()]

    def versions(self, name: str) -> list[str]:
        """Return the versions of a package there are, as ``apt-cache madison`` orders them: newest first."""
        text = self._checked("apt-cache", "madison", name)
        return [fields[1].strip() for line in text.splitlines() if len(fields := line.split("|")) == 3]

    def plan(self, wanted: Sequence[str]) -> dict[str, str]:
        """Return all packages (name to version) that ``wanted`` and what they depend on come to, on an empty machine.

        Args:
            wanted: package names, or ``name=version``; where no version is named, backports go first.
        """
        options = ("--simulate", "--no-install-recommends", "--target-release", SUITES[1])
        return planned_packages(self._checked("apt-get", *options, "install", *wanted))

    def download(self, packages: Mapping[str, str], folder: Path, progress: Progress, what: str) -> list[Path]:
        """Fetch packages into ``folder`` and return their files; those that are there already, whole, stay.

        Raises:
            DevmemError: a package cannot be had, or its checksum is wrong.
        """
        folder.mkdir(parents=True, exist_ok=True)
        readable, writable = os.pipe()
        wanted = [f"{name}={version}" for name, version in packages.items()]
        command = self._command("apt-get", "download", "--quiet", "-o", f"APT::Status-Fd={writable}", *wanted)
        with open(readable, "rb") as status, (folder / "apt.log").open("w+", encoding="utf-8") as log:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=self._environment(),
                    pass_fds=(writable,),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            finally:
                os.close(writable)
            with process:  # waits, also on Ctrl-C, which the terminal sends to apt too
                for line in status:
                    if match := _DOWNLOAD_STATUS.match(line):
                        progress(what, float(match["percent"]) / 100)
            log.seek(0)
            if process.returncode:
                raise DevmemError(
                    f"packages cannot be had from {self.mirror}: {first_error(log.read())}",
                    hint="the same command goes on where this one stopped",
                )
        return [deb_path(folder, name, version) for name, version in packages.items()]

    def _write_settings(self, keyring: Path) -> None:
        for name in ("etc", "state/lists/partial", "cache/archives/partial"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()  # an empty machine: every library is fetched, none taken from the host
        (self._folder / "etc" / "lab.sources").write_text(
            f"Types: deb\nURIs: {self.mirror}\nSuites: {' '.join(SUITES)}\nComponents: main\n"
            f"Architectures: amd64\nSigned-By: {keyring}\n",
            encoding="utf-8",
        )
        acquire = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True).stdout
        (self._folder / "apt.conf").write_text(settings_text(self._folder, acquire), encoding="utf-8")

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "APT_CONFIG": str(self._folder / "apt.conf"), "LC_ALL": "C.UTF-8"}

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [program, "-o", "APT::Update::Error-Mode=any", *arguments]

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command(program, *arguments),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def _checked(self, program: str, *arguments: str) -> str:
        done = self._run(program, *arguments)
        if done.returncode:
            raise DevmemError(
                f"{program} {' '.join(arguments)}: {first_error(done.stdout + done.stderr)}", hint=_BRING_YOUR_OWN
            )
        return done.stdout


def settings_text(folder: Path, acquire: str) -> str:
    """Return an apt.conf that keeps apt within ``folder``; ``acquire`` is the host's own settings of that tree.

    It is read before the host's files (apt.conf(5): APT_CONFIG comes first), and so can turn those off, hooks included.
    """
    settings = {
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::sourcelist": folder / "etc" / "lab.sources",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "APT::Architecture": "amd64",
        "APT::Get::AllowUnauthenticated": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    if os.geteuid() == 0:
        settings["APT::Sandbox::User"] = "root"  # apt's own user has no way into a folder below /root
    own = "".join(f'{name} "{value}";\n' for name, value in settings.items())
    kept = "".join(f"{line}\n" for line in acquire.splitlines() if not line.startswith("Acquire::Languages"))
    return f'{kept}{own}APT::Architectures {{ "amd64"; }};\n'


def deb_path(folder: Path, name: str, version: str) -> Path:
    """Return the file that ``apt-get download`` makes of a package: an epoch's colon is written ``%3a``.

    Raises:
        DevmemError: it is not there.
    """
    stem = f"{name}_{version.replace(':', '%3a')}"
    for architecture in ("amd64", "all"):
        path = folder / f"{stem}_{architecture}.deb"
        if path.exists():
            return path
    raise DevmemError(f"apt did not leave {stem}_amd64.deb in {folder}")


def unpack(debs: Iterable[Path], folder: Path, progress: Progress, what: str) -> None:
    """Unpack packages into ``folder``, without installing them."""
    files = list(debs)
    for done, deb in enumerate(files):
        progress(what, done / len(files))
        subprocess.run(["dpkg-deb", "--extract", deb, folder], check=True, stdin=subprocess.DEVNULL)


def _host_mirror() -> str:
    done = subprocess.run(
        ["apt-get", "indextargets", "--format", _TARGET_FORMAT, "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    mirror = mirror_from_targets(done.stdout)
    if mirror is None:
        raise DevmemError("apt on this machine names no Debian mirror", hint=_BRING_YOUR_OWN)
    return mirror
