# Every target sets up what it needs: on a fresh Debian with python3, make and git, one command is enough.
# ARGS= goes to the command itself: make demo ARGS="--file x.iso", make test ARGS="-k tokens".

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench lab lab-soak lab-test fuzz clean
MAKEFLAGS += --no-print-directory

help:
	@echo "make demo    move a file into registered memory over TCP, verify it, and explain what happened"
	@echo "make test    every check: style, formatting, types, layering, tests"
	@echo "make lint    the same without the tests"
	@echo "make bench   measure the software backend on loopback against plain C and plain Python (bench/README.md)"
	@echo "make lab     boot a real kernel on NICs written in Python, and move data by devmem TCP in it (docs/lab.md)"
	@echo "make lab-soak  one minute of traffic in the lab while its NICs and their driver are changed in every way"
	@echo "make lab-test  the contract, and all else that needs it, tested on the kernel backend in the lab"
	@echo "make fuzz    1,000,000 inputs each for the lab's vfio-user server, its NIC, and sessions (CONTRIBUTING.md)"
	@echo "make clean   remove what the others made: .venv, caches, build outputs"
	@echo 'ARGS="..." goes to the command: make demo ARGS="--file some.iso", make test ARGS="-k tokens"'

demo:
	@tools/setup.sh core
	@.venv/bin/devmem-tcp demo $(ARGS)

test:
	@tools/setup.sh dev
	@tools/check.sh all $(ARGS)

lint:
	@tools/setup.sh dev
	@tools/check.sh lint

bench:
	@tools/setup.sh dev
	@.venv/bin/python bench/throughput.py $(ARGS)
	@.venv/bin/python bench/connections.py
	@.venv/bin/python bench/per_frag.py

lab:
	@tools/setup.sh core
	@tools/lab.sh full

lab-soak:
	@tools/setup.sh core
	@tools/lab.sh soak $(ARGS)

lab-test:
	@tools/setup.sh dev
	@tools/lab.sh test $(ARGS)

fuzz:
	@tools/setup.sh dev
	@.venv/bin/python tests/lab/fuzz.py vfio $(ARGS)
	@.venv/bin/python tests/lab/fuzz.py gvnic $(ARGS)
	@.venv/bin/python tests/lab/fuzz.py handshake $(ARGS)
	@.venv/bin/python tests/lab/fuzz.py session $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist bench/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
