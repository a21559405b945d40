"""The contract over ordinary TCP sockets, on any machine, unprivileged: a verified fake that is also useful.

Payload of a flow that is steered to a bound queue is read straight into free pages of the bound Buffer; everything an
application can see follows ``docs/kernel-contract.md``. It is not zero copy: the kernel copies from its socket buffers.
"""
