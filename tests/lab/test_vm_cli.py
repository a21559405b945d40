"""``devmem-tcp lab``, as far as it goes without a guest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from devmem_tcp.cli.main import program
from devmem_tcp.lab import control
from devmem_tcp.lab.nic_client import NicProcess


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "devmem-tcp/lab"


def lab(*arguments: str) -> Result:
    return CliRunner().invoke(program, ["lab", *arguments])


def test_status_of_nothing_says_what_to_do(cache: Path) -> None:
    result = lab("status")
    assert result.exit_code == 1
    assert f"folder   {cache}" in result.stdout
    assert "kernels  none" in result.stdout
    assert "devmem-tcp lab setup" in result.stderr
    assert not cache.exists(), "asking makes nothing"


def test_status_of_a_complete_cache(cache: Path) -> None:
    release = "7.3.4+deb13-amd64"
    for folder, packages in (
        (cache / "kernels" / release, {f"linux-{part}-{release}": "1" for part in ("base", "binary", "modules")}),
        (cache / "programs", {"qemu-system-x86": "1:11.1.3"}),
    ):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"packages": packages}))
    result = lab("status")
    assert result.exit_code == 0, result.output
    assert f"kernels  {release}" in result.stdout
    assert "1:11.1.3" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Missing argument"),
        (["run", "--fault", "drop", "--", "true"], "is not NAME=NUMBER"),
        (["run", "--drop", "2", "--", "true"], "is not in the range"),
        (["run", "--nics", "17", "--", "true"], "is not in the range"),
        (["run", "--mtu", "9217", "--", "true"], "is not in the range"),
        (["run", "--modules", "/tmp", "--", "true"], "--modules goes with --kernel PATH"),
        (["run", "--two-hosts", "--second-memory", "64M", "/tmp/x", "--", "true"], "is for one guest"),
        (["dance"], "No such command"),
    ],
)
def test_wrong_usage(cache: Path, arguments: list[str], said: str) -> None:
    result = lab(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--kernel", "/nonexistent/bzImage", "--", "true"], "no kernel image"),
        (["run", "--memory", "16M", "--", "true"], "256 MiB"),
        (["run", "--second-memory", "2G", "/tmp/x", "--", "true"], "both sides"),
        (["run", "--two-hosts", "--nics", "9", "--kernel", "IMAGE", "--qemu", "/bin/true", "--", "true"], "virtiofsd"),
        (["fault", "drop=0.1"], "no lab is running"),
        (["link", "nic0", "down"], "no lab is running"),
        (["reset", "nic0"], "no lab is running"),
        (["stats"], "no lab is running"),
    ],
)
def test_what_is_not_there_is_one_line(cache: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    image = tmp_path / "bzImage"
    image.touch()
    result = lab(*(str(image) if argument == "IMAGE" else argument for argument in arguments))
    assert result.exit_code == 1, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_faults_and_counters_of_a_running_lab(cache: Path) -> None:
    run = cache / "runs/20260101-000000-000-1"
    run.mkdir(parents=True)
    plug = control.NicPlug(name="nic0", path="", mac="02:00:00:00:00:01", queues=2, mtu=1500)
    with NicProcess([plug], run):
        result = lab("fault", "--nic", "nic0", "drop=0.25", "unsplit-every=3")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["nic0"]
        assert (found["drop"], found["unsplit_every"]) == (0.25, 3)
        assert json.loads(lab("fault").stdout)["nic0"]["drop"] == 0.25
        assert json.loads(lab("stats").stdout)["nics"]["nic0"]["device"]["link_up"]
        refused = lab("fault", "smell=1")
        assert refused.exit_code == 1
        assert "no such fault" in refused.stderr


def test_link_and_reset_of_a_running_lab(cache: Path) -> None:
    run = cache / "runs/20260101-000000-000-1"
    run.mkdir(parents=True)
    plug = control.NicPlug(name="nic0", path="", mac="02:00:00:00:00:01", queues=2, mtu=1500)
    with NicProcess([plug], run):
        for state in ("down", "up"):
            assert lab("link", "nic0", state).exit_code == 0
            assert json.loads(lab("stats").stdout)["nics"]["nic0"]["device"]["link_up"] == (state == "up")
        assert lab("reset", "nic0").exit_code == 0
        refused = lab("reset", "nic7")
        assert refused.exit_code == 1
        assert "no NIC 'nic7'; there are: nic0" in refused.stderr
