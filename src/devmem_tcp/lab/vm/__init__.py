"""The virtual machine: fetch a stock kernel and QEMU, boot them on the host's own root, run one job, end everything."""
