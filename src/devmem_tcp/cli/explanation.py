"""What happened in a demo, in a dozen lines with the figures in them."""

from __future__ import annotations

from devmem_tcp.cli.report import DemoReport, ReceivedReport, SentReport, amount, binary, frag_sizes


def explain(report: DemoReport) -> list[str]:
    """Return the lines that tell a demo's story, in the order of the work."""
    story = [
        ("file", _file(report)),
        *_set_up(report.received),
        *_way(report.sent, report.received),
        ("verified", "SHA-256 equal at the file, the sender and the receiver:"),
        ("", report.sha256),
    ]
    if report.kept is not None:
        story += [("kept", f"sent: {report.file}"), ("", f"received: {report.kept}")]
    width = max(len(label) for label, _ in story)
    lines = [f"{label:<{width}}  {text}" for label, text in story]
    if report.received.path.backend == "software":
        lines += [
            "",
            "The software backend carried it: the contract of device memory TCP over ordinary TCP sockets.",
            "The system copied every byte into the bound buffer; a NIC with devmem TCP puts it there itself.",
        ]
    return lines


def _file(report: DemoReport) -> str:
    what = "pseudo-random, made for this" if report.made else report.file
    return f"{amount(report.bytes)}, {what}"


def _set_up(received: ReceivedReport) -> list[tuple[str, str]]:
    port = received.local.rpartition(":")[2]
    memory = f"{binary(received.buffer_bytes)} ({received.memory})"
    return [
        ("NIC", f"{received.nic}, {received.path.backend}: header split on, so that payload lands apart from headers"),
        ("steering", f"an ntuple rule for TCP port {port}: the flow arrived on queue {received.rx_queue}"),
        ("memory", f"{memory} bound to queue {received.queue} as dmabuf id {received.dmabuf_id}"),
    ]


def _way(sent: SentReport, received: ReceivedReport) -> list[tuple[str, str]]:
    tx, rx = sent.path, received.path
    return [
        ("sending", f"{tx.send_calls:,} sendmsg calls, by offset into a bound buffer of {binary(sent.buffer_bytes)}"),
        (
            "completions",
            f"{sent.completions:,} ranges; a window of {binary(sent.window_bytes)} is refilled only after its own",
        ),
        ("receiving", f"{rx.recv_calls:,} recvmsg calls gave {rx.frags:,} frags of {frag_sizes(received)}"),
        ("path", f"{rx.dmabuf_bytes:,} bytes in the dmabuf, {rx.linear_bytes:,} linear, {rx.host_bytes:,} host"),
        ("tokens", f"returned in {rx.dontneed_calls:,} DONTNEED calls; {rx.tokens_out:,} out at the end"),
        (
            "rate",
            f"{received.gigabytes_per_second:.2f} GB/s for {received.seconds:.2f} s, both ends hashing every byte",
        ),
        ("congestion", tx.congestion_control),
    ]
