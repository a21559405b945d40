"""The benchmark: every figure with its backend and byte counts, in a table, as JSON and as a page that stands alone."""

from __future__ import annotations

import re
import shlex
import signal
import socket
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from devmem_tcp.benchmark import results
from devmem_tcp.benchmark.plan import Driver, Form, Kind, Work
from devmem_tcp.benchmark.results import Report, Row
from processes import Finished, children, exists, running

TINY = ("--rounds", "1", "--seconds", "0.01", "--buffer", "4M")
ONE = (*TINY, "--only", "throughput,blocking,messages", "--sizes", "4K")
LONG = ("--rounds", "1", "--seconds", "600", "--buffer", "4M", "--only", "throughput,blocking,series", "--sizes", "4K")


def bench(*arguments: str | Path, program: Sequence[str] = ("-m", "devmem_tcp")) -> Finished:
    with running("bench", *arguments, program=program) as process:
        return process.finish()


def read(path: Path) -> Report:
    return msgspec.json.decode(path.read_bytes(), type=Report)


def received(row: Row) -> int:
    return row.receiver.received_dmabuf + row.receiver.received_linear + row.receiver.received_host


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and notes what there is."""

    VOID = frozenset(("meta", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Report, str]:
    """All that can be measured, small, alone on this machine."""
    folder = tmp_path_factory.mktemp("bench")
    sized = ("--sizes", "4K,64K", "--connections", "1,3", "--rounds", "2", "--seconds", "0.01", "--buffer", "4M")
    ended = bench(*sized, "--seed", "5", "--json", folder / "r.json", "--html", folder / "r.html")
    assert ended.status == 0, ended.stderr
    return ended, read(folder / "r.json"), (folder / "r.html").read_text(encoding="utf-8")


def test_everything_is_measured(whole: tuple[Finished, Report, str]) -> None:
    _, report, _ = whole
    ways = [(driver, form) for driver in Driver for form in Form]
    assert [row.work for row in report.rows] == [
        *(Work(Kind.THROUGHPUT, size, *way) for size in (4096, 65536) for way in ways),
        *(Work(Kind.ROUND_TRIP, 4096, *way) for way in ways),
        *(Work(Kind.CONNECTIONS, 65536, connections=count) for count in (1, 3)),
    ]
    assert (report.format, report.same_machine, report.lanes, report.failed, report.left_out) == (1, True, 1, [], [])


def test_every_byte_is_counted_at_both_ends(whole: tuple[Finished, Report, str]) -> None:
    for row in whole[1].rows:
        assert row.rounds == 2
        assert row.messages >= row.rounds * row.work.connections
        assert row.payload_bytes == row.messages * row.work.size_bytes == received(row) == row.sender.sent_dmabuf
        assert row.receiver.received_dmabuf == row.payload_bytes
        assert (row.sender.backend, row.receiver.backend) == ("software", "software")
        assert row.sender.congestion_controls
        assert row.receiver.congestion_controls
        back = row.payload_bytes if row.work.kind is Kind.ROUND_TRIP else 0
        assert row.receiver.sent_dmabuf == row.sender.received_dmabuf == back


def test_figures_are_medians_between_the_least_and_the_most(whole: tuple[Finished, Report, str]) -> None:
    for row in whole[1].rows:
        found = [getattr(row, field.name) for field in msgspec.structs.fields(Row)]
        ranges = [value for value in found if isinstance(value, results.Range)]
        assert len(ranges) == (8 if row.work.kind is Kind.ROUND_TRIP else 6)
        assert all(0 <= one.least <= one.median <= one.most for one in ranges)
        assert row.gb_per_s.least > 0
        if row.round_trip_us is not None:
            assert row.round_trip_p99_us is not None
            assert 0 < row.round_trip_us.least <= row.round_trip_p99_us.least


def test_the_table_has_the_backend_and_the_bytes(whole: tuple[Finished, Report, str]) -> None:
    ended, report, _ = whole
    text = ended.stdout.decode()
    total = sum(row.payload_bytes for row in report.rows)
    for words in (
        "throughput by size",
        "round trip, two sessions",
        "senders to one receiver",
        "series, asyncio",
        "64 KiB × 3",
        "software to software, NIC soft1 to soft0",
        f"dmabuf {total:,}, linear 0, host 0, copied ",
    ):
        assert words in text
    assert "zero copy" not in text.lower()
    assert "28 measurements of about 0.01 s, binding up to " in ended.stderr


def test_the_page_stands_alone(whole: tuple[Finished, Report, str]) -> None:
    _, report, text = whole
    page = Page(text)
    assert page.seen.count("svg") == 4
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.seen)
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in page.attributes}
    assert not re.search(r"//|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    for row in report.rows:
        assert f"{row.payload_bytes:,}" in text
        assert f"software: dmabuf {row.receiver.received_dmabuf:,}, linear 0, host 0, copied " in text
    assert "<pre>devmem-tcp bench --sizes 4096,65536 --connections 1,3 --rounds 2 --seconds 0.01 " in text
    assert "--seed 5</pre>" in text
    assert report.receiver.machine.kernel in text
    assert "zero copy" not in text.lower()


def test_the_fields_of_the_json_are_those_of_format_1() -> None:
    """A change here needs another FORMAT, unless it only adds."""
    fields = {
        kind.__name__: [field.name for field in msgspec.structs.fields(kind)]
        for kind in (Report, Row, results.Range, results.Path, results.End, results.LeftOut, Work)
    }
    assert results.FORMAT == 1
    assert fields == {
        "Report": [
            *("format", "began_at", "took_s", "command", "same_machine", "lanes", "plan"),
            *("sender", "receiver", "rows", "left_out", "failed"),
        ],
        "Row": [
            *("work", "rounds", "messages", "payload_bytes", "gb_per_s", "messages_per_s"),
            *("cpu_s_per_gib", "cpu_s_per_gib_sender", "cpu_s_per_gib_receiver", "cpu_us_per_message"),
            *("round_trip_us", "round_trip_p99_us", "sender", "receiver"),
        ],
        "Range": ["median", "least", "most"],
        "Path": [
            *("backend", "congestion_controls", "received_dmabuf", "received_linear", "received_host", "copied"),
            *("sent_dmabuf", "sent_host"),
        ],
        "End": ["nic", "backend", "buffer_bytes", "machine"],
        "LeftOut": ["work", "words"],
        "Work": ["kind", "size_bytes", "driver", "form", "connections"],
    }


def test_bytes_in_host_memory_are_said_aloud(tmp_path: Path) -> None:
    only = ("--only", "throughput,blocking,messages", "--sizes", "64K")
    ended = bench(*TINY, *only, "--hostile", "3", "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert ended.status == 0, ended.stderr
    (row,) = read(tmp_path / "r.json").rows
    elsewhere = row.receiver.received_linear + row.receiver.received_host
    assert 0 < elsewhere < row.payload_bytes == received(row)
    assert row.receiver.copied > 0
    assert f"{elsewhere:,} bytes landed in host memory" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_does_not_fit_is_left_out_and_said_so(tmp_path: Path) -> None:
    ended = bench(*TINY, "--only", "throughput,blocking,series", "--sizes", "4K,16M", "--json", tmp_path / "r.json")
    assert ended.status == 0, ended.stderr
    report = read(tmp_path / "r.json")
    assert [row.work.size_bytes for row in report.rows] == [4096]
    assert [one.work.size_bytes for one in report.left_out] == [16 << 20]
    words = "series of 16 MiB, blocking: needs a Buffer of 16 MiB; --buffer is 4 MiB"
    assert f"left out: {words}" in ended.stderr
    assert f"left out    {words}" in ended.stdout.decode()


def test_too_few_open_files_are_said_so() -> None:
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200));"
        "from devmem_tcp.cli.main import main; main()"
    )
    ended = bench(*TINY, "--only", "connections", "--connections", "2,64", program=["-c", limited])
    assert ended.status == 0, ended.stderr
    assert "64 KiB × 2 " in ended.stdout.decode()
    assert "64 connections: needs 320 open files, and the limit is 200: raise it with ulimit -Hn" in ended.stderr


def test_json_on_stdout_is_all_there(key: Path) -> None:
    ended = bench(*ONE, "--quiet", "--json", "-", "--key-file", key)
    assert (ended.status, ended.stderr) == (0, "")
    assert len(msgspec.json.decode(ended.stdout, type=Report).rows) == 1


def test_the_command_in_the_report_measures_the_same_once_more(tmp_path: Path) -> None:
    given = [*TINY, "--only", "throughput,asyncio,series", "--sizes", "4K,12345", "--lanes", "2", "--hostile", "-1"]
    first = bench(*given, "--json", tmp_path / "first.json")
    assert first.status == 0, first.stderr
    program, verb, *arguments = shlex.split(read(tmp_path / "first.json").command)
    assert (program, verb) == ("devmem-tcp", "bench")
    again = bench(*arguments, "--json", tmp_path / "again.json")
    assert again.status == 0, again.stderr
    reports = [read(tmp_path / name) for name in ("first.json", "again.json")]
    assert reports[0].plan == reports[1].plan
    assert reports[0].lanes == reports[1].lanes == 2
    assert reports[0].command == reports[1].command


# --- two machines ---


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(b"thirty-two bytes are a good key!")
    path.chmod(0o600)
    return path


def free_ports(count: int) -> int:
    """Return the first of so many TCP ports in a row that nobody listens at now."""
    for first in range(20000, 30000, count):
        held = []
        try:
            for port in range(first, first + count):
                held.append(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue
        else:
            return first
        finally:
            for server in held:
                server.close()
    raise AssertionError("no TCP ports are free")


def test_one_end_here_and_one_there(tmp_path: Path, key: Path) -> None:
    common = ("--backend", "software", "--buffer", "4M", "--key-file", key)
    port = free_ports(6)
    with running("bench", "--listen", f"127.0.0.1:{port}", *common) as end:
        assert f"listening on 127.0.0.1:{port} (software backend, soft0)" in end.stderr_line("listening on ")
        sizes = ("--sizes", "4K", "--connections", "2", "--rounds", "2", "--seconds", "0.01", "--lanes", "2")
        ended = bench("--to", f"127.0.0.1:{port}", *common, *sizes, "--json", tmp_path / "r.json")
        assert ended.status == 0, ended.stderr
        assert end.finish().status == 0
    report = read(tmp_path / "r.json")
    assert len(report.rows) == 9
    assert all(received(row) == row.payload_bytes for row in report.rows)
    assert report.command.startswith(f"devmem-tcp bench --listen {port}   # at the receiving end, with its NIC\n")


def test_a_wrong_key_gets_nothing_and_costs_nothing(tmp_path: Path, key: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"another key of enough bytes")
    with running(
        "bench", "--listen", "127.0.0.1:0", "--backend", "software", "--buffer", "4M", "--key-file", key, "--json", "-"
    ) as end:
        to = f"127.0.0.1:{end.port()}"
        refused = bench("--to", to, "--backend", "software", *ONE, "--key-file", wrong)
        assert refused.status == 1
        assert "key" in refused.stderr
        ended = bench("--to", to, "--backend", "software", *ONE, "--key-file", key)
        assert ended.status == 0, ended.stderr
        assert end.finish().status == 0


def test_a_measurement_that_fails_there_is_said_here(tmp_path: Path) -> None:
    port = free_ports(6)
    with (
        running("bench", "--listen", f"127.0.0.1:{port}", "--backend", "software", "--json", "-") as end,
        socket.create_server(("127.0.0.1", port + 2)),
    ):
        end.port()
        ended = bench("--to", f"127.0.0.1:{port}", "--backend", "software", *ONE, "--json", tmp_path / "r.json")
        assert end.finish().status == 0
    assert ended.status == 1
    assert "error: 1 of 1 measurements failed" in ended.stderr
    (failed,) = read(tmp_path / "r.json").failed
    assert failed.words.startswith("the listening end: ")
    assert "in use" in failed.words
    assert failed.words in ended.stdout.decode()


# --- endings ---


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_both_ends_are_gone(number: signal.Signals, status: int) -> None:
    with running("bench", *LONG) as process:
        process.stderr_line("1 measurements of about 600 s")
        started = children(process.process.pid)
        assert len(started) == 1
        process.process.send_signal(number)
        ended = process.finish()
    assert ended.status == status
    assert "error" not in ended.stderr
    assert not any(exists(pid) for pid in started)


@pytest.mark.parametrize("first", ["listening", "measuring"])
def test_an_end_that_is_interrupted_ends_the_other(first: str) -> None:
    with (
        running("bench", "--listen", "127.0.0.1:0", "--backend", "software", "--json", "-") as there,
        running("bench", "--to", f"127.0.0.1:{there.port()}", "--backend", "software", *LONG) as here,
    ):
        here.stderr_line("1 measurements of about 600 s")
        one, other = (there, here) if first == "listening" else (here, there)
        one.process.send_signal(signal.SIGINT)
        assert one.finish().status == 130
        ended = other.finish()
    assert ended.status == 1
    assert ended.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--only", "connections,asyncio"], 2, "nothing is all of that at once"),
        (["--only", "latency"], 2, "'latency' is not one of"),
        (["--sizes", "4K,lots"], 2, "'lots' is not a size"),
        (["--backend", "kernel"], 2, "reach each other over loopback, by neither of them"),
        (["--listen", "5201", "--to", "host:5201"], 2, "--listen at one end and --to at the other"),
        (["--listen", "65535"], 2, "--listen takes 6 TCP ports"),
        (["--listen", "5201", "--sizes", "4K"], 2, "--sizes is for the end that measures"),
        (["--listen", "5201", "--html", "x.html"], 2, "--html is for the end that measures"),
        (["--html", "/no/such/folder/x.html"], 1, "/no/such/folder/x.html: No such file or directory"),
        (["--key-file", "/no/such/key"], 2, "'/no/such/key' does not exist"),
        (["--key-file", __file__, "--lanes", "0"], 2, "0 is not in the range 1<=x<=64"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(arguments: list[str], status: int, words: str) -> None:
    ended = bench(*arguments)
    assert (ended.status, ended.stdout) == (status, b"")
    assert words in " ".join(ended.stderr.split())


def test_nobody_listens() -> None:
    ended = bench("--to", f"127.0.0.1:{free_ports(1)}", "--backend", "software", *ONE)
    assert (ended.status, ended.stdout) == (1, b"")
    assert "refused" in ended.stderr
