#!/bin/sh
# Try the lab: boot a stock kernel on NICs written in Python, and move data by devmem TCP both ways in it.
#
#     tools/lab.sh short      one boot, 16 MiB each way: for continuous integration
#     tools/lab.sh full       64 MiB each way, at MTU 1500 and 9000, without loss and with 1 % of it
#
# Exit status 0: every byte was right; 75: what the lab needs could not be fetched, so nothing was tried.

set -eu
cd "$(dirname "$0")/.."
lab='.venv/bin/devmem-tcp lab'

trial() {
    size=$1
    shift
    printf '\n== lab: %s bytes each way, %s\n' "$size" "${*:-MTU 1500, no loss}"
    $lab run --quiet --memory 2G --timeout 240 "$@" -- .venv/bin/python -m devmem_tcp.lab.trial --bytes "$size"
}

case ${1-} in
short | full) ;;
*) echo "usage: tools/lab.sh short|full" >&2 && exit 2 ;;
esac

$lab setup || {
    echo "lab: NOT TRIED: kernel and QEMU could not be fetched; see above" >&2
    exit 75
}
if [ "$1" = short ]; then
    trial 16777216
else
    trial 67108864
    trial 67108864 --mtu 9000
    trial 67108864 --drop 0.01
    trial 67108864 --mtu 9000 --drop 0.01
fi
