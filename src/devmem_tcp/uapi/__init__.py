"""The kernel's ABI as data: constants, layouts, parsing into columns. No syscalls."""
