"""``devmem-tcp serve`` and ``fetch``, each in a process of its own: what comes, what is said, and what is kept."""

from __future__ import annotations

import os
import random
import signal
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import devmem_tcp as dmt
from devmem_tcp.cli.main import program
from devmem_tcp.errors import DevmemError
from devmem_tcp.safetensors.fetching import fetch_tensors
from devmem_tcp.safetensors.source_file import SourceFile
from processes import LIMIT_S, Finished, Running, running
from safetensors_fetch import in_child
from safetensors_files import claim, some_tensors, with_header, write_file

MIB = 1 << 20
METADATA = {"format": "pt"}
SERVER = ("--backend", "software", "--buffer", "16M", "--max-peers", "2")
CLIENT = ("--backend", "software", "--buffer", "4M")


def write_large(path: Path, count: int) -> Path:
    """Write a file of tensors of 1 MiB, no two alike."""
    claims = {f"block.{i}": claim("U8", [MIB], i * MIB, (i + 1) * MIB) for i in range(count)}
    pattern = bytes(range(251)) * (MIB // 251 + 2)
    with open(path, "wb") as file:
        file.write(with_header({"__metadata__": METADATA} | claims))
        for i in range(count):
            file.write(i.to_bytes(2, "little") + pattern[: MIB - 2])
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write_file(tmp_path / f"{name}.safetensors", some_tensors(f"{name}."), METADATA) for name in "ab"]


def contents(*files: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in files:
        with SourceFile(path) as file:
            found |= {name: bytes(file.data(name)) for name in file.tensors}
    return found


@contextmanager
def serving(*arguments: str | Path) -> Iterator[tuple[Running, str]]:
    """A server, and where it is."""
    with running("serve", *arguments, "--listen", "127.0.0.1:0", *SERVER) as server:
        yield server, f"127.0.0.1:{server.port()}"


def fetch(*arguments: str | Path) -> Finished:
    with running("fetch", *arguments, *CLIENT) as client:
        return client.finish()


def stopped(server: Running) -> Finished:
    server.process.send_signal(signal.SIGINT)
    return server.finish()


# --- what comes, and what is said ---


def test_a_file_and_its_figures(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(*files) as (server, where):
        done = fetch(where, "--out", out, "--verbose")
        said = server.stderr_line("10 tensors")
        end = stopped(server)
    assert done.status == 0, done.stderr
    assert contents(out) == contents(*files)
    total = sum(map(len, contents(*files).values()))
    assert f"fetched 10 tensors, {total:,} bytes" in done.stderr
    assert f"dmabuf {total:,} bytes, linear 0, host 0" in done.stderr
    assert "a.embed.weight: bfloat16 [90, 50], 9,000 bytes" in done.stderr
    assert "b.layers.1.empty: int64 [0, 4], 0 bytes" in done.stderr
    assert f"software to software, dmabuf {total:,} bytes, host 0" in said
    assert (end.status, end.stderr) == (130, "devmem-tcp: interrupted\n")


def test_reports_as_json(files: list[Path], tmp_path: Path) -> None:
    with serving(*files, "--json") as (server, where):
        listed = fetch(where, "--list", "--json", "--only", "a.*").report
        done = fetch(where, "--only", "a.*", "--json", "-o", tmp_path / "out").report
        sessions = [server.json_line() for _ in range(2)]
    assert listed["event"] == "catalog"
    assert [entry["name"] for entry in listed["catalog"]["entries"]] == list(contents(files[0]))
    assert (done["event"], done["summary"]["tensors"], done["summary"]["backend"]) == ("fetched", 5, "software")
    assert [figures["name"] for figures in done["summary"]["figures"]] == list(contents(files[0]))
    assert [(event["event"], event["session"]["tensors"]) for event in sessions] == [("served", 0), ("served", 5)]


def test_the_catalog_as_a_table(files: list[Path]) -> None:
    with serving(*files) as (_, where):
        listed = fetch(where, "--list", "--only", "a.*")
        lines = [line.split() for line in listed.stdout.decode().splitlines()]
        assert ["a.embed.weight", "bfloat16", "90", "×", "50", "8.789", "KiB", "a.safetensors"] in lines
        assert ["a.layers.0.scale", "float64", "one", "8", "bytes", "a.safetensors"] in lines
        assert fetch(where, "--only", "a.*").stderr.splitlines()[-1].endswith("nowhere: --out FILE keeps them")
        wrong = fetch(where, "--only", "a.layer*.7")
    assert (listed.status, wrong.status) == (0, 1)
    assert "error: no tensor matches 'a.layer*.7'; near names: " in wrong.stderr


def test_the_example(files: list[Path]) -> None:
    example = Path(__file__).parents[2] / "examples" / "fetch_weights.py"
    with serving(*files) as (_, where):
        arguments = (*where.split(":"), "a.layers.*", "b.embed.weight")
        with running(*arguments, program=("-W", "error", str(example))) as program_:
            done = program_.finish()
    assert (done.status, done.stderr) == (0, "")
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith("a.layers.0.weight: float32 (5, 7), 140 bytes, ")
    assert lines[5].startswith("5 tensors, 9,151 bytes in ")
    assert lines[6] == "path: dmabuf 9,151, linear 0, host 0"


# --- keys ---


def test_keys(files: list[Path], tmp_path: Path) -> None:
    key, other, short = tmp_path / "key", tmp_path / "other", tmp_path / "short"
    for path, secret in ((key, b"k" * 32 + b"\n"), (other, b"o" * 32), (short, b"short")):
        path.write_bytes(secret)
        path.chmod(0o600)
    with serving(*files, "--key-file", key) as (server, where):
        wrong = fetch(where, "--list", "--key-file", other)
        server.stderr_line("turned away 1 connection")
        key.chmod(0o640)
        right = fetch(where, "--list", "--key-file", key)
        none = fetch(where, "--list")
    assert (wrong.status, right.status, none.status) == (1, 0, 1)
    assert "error: " in wrong.stderr
    assert "can be read or written by others than you (mode 0640): chmod 600 it" in right.stderr
    assert "has 5 bytes: at least 16 are needed" in fetch(where, "--key-file", short).stderr


def test_tls(files: list[Path], tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    name = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    make = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subprocess.run([*make, *name, "-keyout", key, "-out", cert], check=True, capture_output=True, timeout=LIMIT_S)
    with serving(*files, "--tls-cert", cert, "--tls-key", key) as (_, where):
        assert fetch(where, "--list", "--tls-ca", cert).status == 0
        untrusted = fetch(where, "--list", "--tls-ca", ssl.get_default_verify_paths().cafile or cert)
        plain = fetch(where, "--list", "--timeout", "5")
    assert untrusted.status == plain.status == 1


# --- ends, and what is kept ---


def test_a_client_killed_at_any_instant_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)  # the children inherit it: a kill is no power cut
    source, out = write_large(tmp_path / "source", 40), tmp_path / "out"
    seed = random.randrange(1 << 30)
    chance, kept, killed = random.Random(seed), 0, 0
    with serving(source) as (_, where):
        address = ("127.0.0.1", int(where.rpartition(":")[2]))

        def attempt() -> dict[str, Any]:
            with dmt.open_nic("soft1", backend="software") as nic:
                done = fetch_tensors(nic, address, out=out, size=4 * MIB, checkpoint_bytes=MIB)
            return {"resumed": done.resumed_tensors, "tensors": done.tensors}

        def doomed() -> None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process as SIGKILL does: nothing is cleaned up
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.005, 0.08))
            attempt()

        for _ in range(10):
            chance.random()  # in this process: the children's copies differ
            if in_child(doomed) == -signal.SIGALRM:
                killed += 1
                with suppress(FileNotFoundError):
                    now = len((tmp_path / "out.part.json").read_bytes().splitlines()) - 1
                    assert now >= kept, f"seed {seed}: {kept} tensors were kept, and {now} are"
                    kept = now
        if not out.exists():
            done = attempt()
            assert done["resumed"] >= kept, f"seed {seed}"
            assert done["resumed"] + done["tensors"] == 40
    assert killed, f"seed {seed}"
    assert contents(out) == contents(source)


def test_ctrl_c_keeps_what_is_there_and_says_how_to_go_on(tmp_path: Path) -> None:
    source, out = write_large(tmp_path / "source", 160), tmp_path / "out"
    with serving(source) as (_, where):
        command = ("fetch", where, "--out", out, "--json", "--progress", "json", "--checkpoint", "1M", *CLIENT)
        with running(*command) as client:
            while client.json_line()["bytes"] < 8 * MIB:
                pass
            client.process.send_signal(signal.SIGINT)
            ended = client.finish()
        done = fetch(where, "--out", out, "--json")
    assert ended.status == 130
    assert "of 160 tensors are kept in" in ended.stderr
    assert "the same command goes on from there\ndevmem-tcp: interrupted\n" in ended.stderr
    assert done.report["summary"]["resumed_tensors"] > 0
    assert contents(out) == contents(source)


def test_a_server_that_is_killed_and_started_again(tmp_path: Path) -> None:
    source, out = write_large(tmp_path / "source", 160), tmp_path / "out"
    with serving(source) as (server, where):
        command = ("fetch", where, "--out", out, "--json", "--progress", "json", *CLIENT)
        with running(*command) as client:
            while client.json_line()["bytes"] < 8 * MIB:
                pass
            server.process.kill()
            ended = client.finish()
    assert ended.status == 1
    assert "error: the peer ended the control connection without a goodbye" in ended.stderr
    with serving(source) as (_, where):
        assert fetch(where, "--out", out, "--json").report["summary"]["resumed_tensors"] > 0
    assert contents(out) == contents(source)


def test_a_file_that_changed(files: list[Path], tmp_path: Path) -> None:
    with serving(*files) as (_, where):
        os.utime(files[0], ns=(0, 1_000_000_000))
        refused = fetch(where, "--out", tmp_path / "out")
    assert refused.status == 1
    assert "error: the server refused: a.safetensors has changed on the server's disk" in refused.stderr
    assert not list(tmp_path.glob("out*"))


# --- command lines ---


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["serve"], 2, "Missing argument 'FILE...'"),
        (["serve", "none"], 1, "none: ENOENT (No such file or directory)"),
        (["serve", __file__], 1, "is no sound safetensors file"),
        (["serve", "--tls-key", __file__, __file__], 2, "--tls-key goes with --tls-cert"),
        (["serve", "--max-peers", "0", "none"], 2, "max-peers"),
        (["fetch"], 2, "Missing argument 'HOST:PORT'"),
        (["fetch", "127.0.0.1:1"], 1, "connect 127.0.0.1:1"),
        (["fetch", "127.0.0.1:1", "--list", "-o", "x"], 2, "--list or --out"),
        (["fetch", "127.0.0.1:1", "--progress", "json"], 2, "--progress json goes with --json"),
        (["fetch", "127.0.0.1:1", "--key-file", "/none"], 2, "does not exist"),
        (["fetch", "192.0.2.1:1", "--queue", "99"], 1, "soft0 has RX queues 0 to 15, got 99"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments: list[str], status: int, words: str) -> None:
    options = ["--backend", "software", "--buffer", "2M", "--lanes", "1"] if arguments[1:] else []
    options += ["--max-peers", "1"] if arguments[0] == "serve" and "--max-peers" not in arguments else []
    result = CliRunner().invoke(program, [*arguments, *options], prog_name="devmem-tcp")
    assert result.exit_code == status, result.output
    assert words in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("verb", ["serve", "fetch"])
def test_the_options_of_the_kernel_backend(verb: str, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def open_nic(name: str, **options: Any) -> None:
        seen.append({"name": name} | options)
        raise DevmemError("no such NIC here")

    monkeypatch.setattr("devmem_tcp.cli.setup.open_nic", open_nic)
    what = str(files[0]) if verb == "serve" else "127.0.0.1:1"
    kernel = ["--nic", "eth1", "--backend", "kernel", "--via", "/run/broker", "--memory", "udmabuf", "--buffer", "256M"]
    result = CliRunner().invoke(program, [verb, what, *kernel], prog_name="devmem-tcp")
    assert "error: no such NIC here" in result.output
    assert (seen[0]["name"], seen[0]["backend"], seen[0]["via"]) == ("eth1", "kernel", "/run/broker")
