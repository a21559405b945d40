"""What a NIC does to packets and settings, as pure values and decisions: no I/O, no clock, no sockets, no threads."""
