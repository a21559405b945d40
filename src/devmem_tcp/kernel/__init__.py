"""The contract with Linux itself: devmem TCP on a NIC whose driver has it."""
