"""TCP socket options of the control connection: include/uapi/linux/tcp.h and asm-generic/socket.h, as data."""

from __future__ import annotations

from typing import Final

SO_ERROR: Final = 4
SO_KEEPALIVE: Final = 9
TCP_NODELAY: Final = 1
TCP_KEEPIDLE: Final = 4  # seconds of silence before the first probe
TCP_KEEPINTVL: Final = 5  # seconds between probes
TCP_KEEPCNT: Final = 6  # probes without answer before the connection is given up
TCP_USER_TIMEOUT: Final = 18  # milliseconds that sent data may go without acknowledgement
