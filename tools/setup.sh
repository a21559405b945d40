#!/bin/sh
# Set up .venv for this checkout, and for `dev` also what the tests need; `make` runs it before everything else.
#
#     tools/setup.sh core     the package alone: enough for the demo
#     tools/setup.sh dev      the package, the checkers, nc and a C compiler
#
# Needs Python 3.11 or newer; PYTHON= names one. What was set up for stands in .venv/setup, so a second run costs
# milliseconds; while work is under way it says "unfinished", and after an interruption the next run starts over.

set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)
stamp=.venv/setup

say() {
    printf 'setup: %s\n' "$@"
}

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

find_python() {
    found=
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return 0
        ! version=$("$python" --version 2>/dev/null) || found="$found, $python is $version"
    done
    found=${found:-, ${PYTHON:-python3} does not run}
    fail "Python 3.11 or newer is needed, but ${found#, }" \
        "install one, or name it, for instance: make test PYTHON=/usr/local/bin/python3.12"
}

python_has() {
    "$python" -c "import $1" 2>/dev/null
}

# Install Debian packages; false where that needs somebody else (no apt-get, or neither root nor passwordless sudo).
apt_install() {
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -eq 0 ]; then
        as_root=env
    elif sudo -n true 2>/dev/null; then
        as_root='sudo -n env'
    else
        return 1
    fi
    say "installing $* (apt-get, as root)"
    output=$(
        $as_root apt-get -qq update # may fail for a source that is none of ours: install says what matters
        $as_root DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "$@" 2>&1
    ) || {
        printf '%s\n' "$output" >&2
        return 1
    }
}

identity() {
    echo "$(.venv/bin/python --version 2>&1) in $here"
}

usable_venv() {
    .venv/bin/python -c 'import sys' 2>/dev/null || return 1
    [ ! -e "$stamp" ] || grep -qxF "$(identity)" "$stamp" # made by hand, or by us: here, with this Python, to the end
}

make_venv() {
    find_python
    if ! python_has ensurepip && ! python_has pip; then
        apt_install python3-venv && python_has ensurepip || fail \
            "$python has neither venv's ensurepip nor pip, and they could not be installed from here; type:" \
            "    sudo apt-get install python3-venv"
    fi
    say "making .venv with $("$python" --version)"
    rm -rf .venv
    mkdir .venv
    echo unfinished >"$stamp"
    if python_has ensurepip; then
        "$python" -m venv .venv
    else
        "$python" -m venv --without-pip .venv
    fi
}

install_package() {
    say "installing $2 into .venv"
    started=$(date +%s)
    echo unfinished >"$stamp"
    if .venv/bin/python -c 'import pip' 2>/dev/null; then
        pip='.venv/bin/python -m pip'
    else
        find_python
        pip="$python -m pip --python .venv/bin/python"
    fi
    $pip --quiet --disable-pip-version-check install --editable "$1" ||
        fail "pip could not install $2: see above. Is the package index reachable?"
    say "installed in $(($(date +%s) - started)) s"
}

set_up_package() {
    sum=$(cksum <pyproject.toml)
    if usable_venv; then
        ! grep -qxF "$1 $sum" "$stamp" 2>/dev/null || return 0
    else
        make_venv
    fi
    if [ "$1" = dev ]; then
        install_package '.[dev]' 'devmem-tcp, what it needs, and the checkers'
        printf '%s\n' "$(identity)" "core $sum" "dev $sum" >"$stamp"
    else
        install_package . 'devmem-tcp and what it needs'
        printf '%s\n' "$(identity)" "core $sum" >"$stamp"
    fi
}

has_compiler() {
    echo '#include <errno.h>' | cc -E - >/dev/null 2>&1
}

has_netcat() {
    nc -h 2>&1 | grep -q OpenBSD # the traditional one speaks no IPv6
}

set_up_test_tools() {
    missing=
    has_compiler || missing="gcc libc6-dev"
    has_netcat || missing="$missing netcat-openbsd"
    # shellcheck disable=SC2086 # a list of package names
    [ -z "$missing" ] || apt_install $missing || say \
        "missing, and could not be installed from here: $missing" \
        "the tests that need them will be skipped, and listed as expected skips; to run them, type:" \
        "    sudo apt-get install $missing"
}

case ${1-} in
core | dev) ;;
*) fail "usage: tools/setup.sh core|dev" ;;
esac

exec 9<. # one set-up at a time: a second one waits, then finds the work done
flock --nonblock 9 || { say "waiting for another set-up of this checkout" && flock 9; }

set_up_package "$1"
[ "$1" = core ] || set_up_test_tools
