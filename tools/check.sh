#!/bin/sh
# Check this tree: `make lint` and `make test`, once tools/setup.sh dev has run.
#
#     tools/check.sh lint               style, formatting, types, layering
#     tools/check.sh all [PYTEST ARG]   the same, then the tests
#
# Every check runs, whatever an earlier one said; the exit status is 0 only if all passed.

set -u
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
failed=

check() {
    title=$1
    shift
    printf '\n== %s\n' "$title"
    "$@" || failed="$failed, $title"
}

what=${1-}
case $what in
lint | all) shift ;;
*) echo "usage: tools/check.sh lint|all [PYTEST ARG ...]" >&2 && exit 2 ;;
esac

check "style (ruff check)" ruff check --quiet
check "formatting (ruff format)" ruff format --check --quiet
check "types (mypy, strict)" mypy
check "types of tests/guest" mypy tests/guest/*.py
check "layering (lint-imports)" lint-imports --no-logo
[ "$what" = lint ] || check "tests (pytest)" pytest "$@"

[ -z "$failed" ] || { printf '\nfailed: %s\n' "${failed#, }" >&2 && exit 1; }
