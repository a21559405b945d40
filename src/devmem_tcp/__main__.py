"""Run the command as ``python -m devmem_tcp``."""

from devmem_tcp.cli.main import main

if __name__ == "__main__":
    main()
