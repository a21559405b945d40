#!/bin/sh
# Try the lab: boot a stock kernel on NICs written in Python, and move data by devmem TCP both ways in it.
#
#     tools/lab.sh short      one boot, 16 MiB each way: for continuous integration
#     tools/lab.sh full       64 MiB each way, at MTU 1500 and 9000, without loss and with 1 % of it; 16 MiB on an older
#                             kernel; and 4 MiB in a memory that is looked at from outside
#     tools/lab.sh test       tests/guest, the contract on the kernel backend above all, and tests/contract, the same on the
#                             software backend, in the newest kernel and in an older one
#     tools/lab.sh soak       60 s of TCP, UDP and ping while the NICs and their driver are changed in every way
#
# Exit status 0: every byte was right; 75: what the lab needs could not be fetched, so nothing was tried.

set -eu
cd "$(dirname "$0")/.."
lab='.venv/bin/devmem-tcp lab'
OLDER=7.2

trial() {
    size=$1
    shift
    printf '\n== lab: %s bytes each way, %s\n' "$size" "${*:-MTU 1500, no loss}"
    $lab run --quiet --memory 2G --timeout 240 "$@" -- .venv/bin/python -m devmem_tcp.lab.trial --bytes "$size"
}

# The same on an older kernel, if that can still be fetched: suites keep few.
older() {
    if $lab setup --kernel "$OLDER"; then
        "$@" --kernel "$OLDER"
    else
        echo "lab: kernel $OLDER NOT TRIED: it could not be fetched; see above" >&2
    fi
}

# What only the outside can do to a NIC: pull its cable out, and have it ask for a reset. Until the guest is up, and once
# it is off, no lab is running; the soak itself fails if nothing of this came through.
prod() {
    while sleep 2; do
        for nic in nic0 nic1; do
            $lab link $nic down && sleep 0.3
            $lab link $nic up && sleep 2
            $lab reset $nic && sleep 2
        done
    done >/dev/null 2>&1
}

soak() {
    printf '\n== lab: soak\n'
    prod &
    prodder=$!
    trap 'kill $prodder' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    $lab run --quiet --memory 2G --timeout 300 -- .venv/bin/python -m devmem_tcp.lab.soak --prodded "$@"
}

tests() {
    printf '\n== lab: tests/guest%s\n' "${1:+, }$*"
    $lab run --quiet --memory 2G --timeout 1800 "$@" -- sh -c \
        '.venv/bin/python -m pytest tests/guest && .venv/bin/python -m pytest tests/contract'
}

case ${1-} in
short | full | soak | test) ;;
*) echo "usage: tools/lab.sh short|full|soak|test" >&2 && exit 2 ;;
esac

$lab setup || {
    echo "lab: NOT TRIED: kernel and QEMU could not be fetched; see above" >&2
    exit 75
}
if [ "$1" = short ]; then
    trial 16777216
elif [ "$1" = soak ]; then
    shift
    soak "$@"
elif [ "$1" = test ]; then
    tests
    older tests
else
    trial 67108864
    trial 67108864 --mtu 9000
    trial 67108864 --drop 0.01
    trial 67108864 --mtu 9000 --drop 0.01
    older trial 16777216
    printf '\n== lab: device memory, looked at from outside\n'
    .venv/bin/python -m devmem_tcp.lab.outside --bytes 4194304
fi
