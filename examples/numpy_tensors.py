"""Send NumPy arrays from one process to another, into the memory that a NIC would write to.

    python examples/numpy_tensors.py

Needs devmem-tcp alone, and no special hardware: the software backend does over ordinary TCP what a NIC with devmem TCP
does by itself. Between two hosts with such NICs it is backend="kernel", the NIC's name, and a key= that both share.
"""

import multiprocessing
import sys
from multiprocessing.connection import Connection

import numpy as np

import devmem_tcp as dmt
from devmem_tcp.transport import open_receiver, open_sender

MIB = 1 << 20


def receive(parent: Connection) -> None:
    # A receiver binds memory to a queue of the NIC, steers connections there, and listens. Port 0 is any free one.
    with (
        dmt.open_nic("soft0", backend="software") as nic,
        open_receiver(nic, listen=("127.0.0.1", 0), size=16 * MIB) as receiver,
    ):
        parent.send(receiver.address)  # where it listens: the sender has to know

        for message in receiver:  # until every sender that came has said goodbye
            with message:  # at the end of the block its memory goes back, and takes the next message
                array = message.gather().numpy()  # contiguous; not copied if it landed that way
                print(f"received {message.name}: {array.dtype} {array.shape}, mean {array.mean():.3f}")
                print(f"    with {message.metadata}, by {message.path}")


def send(to: tuple[str, int]) -> None:
    rng = np.random.default_rng(0)
    with (
        dmt.open_nic("soft1", backend="software") as nic,
        open_sender(nic, to=to, size=16 * MIB) as sender,
    ):
        # Any array: it is copied into the bound memory as it goes, and may be larger than that.
        sender.send(rng.normal(size=(512, 1024)), "activations", metadata={"layer": 7})

        # An array made in the bound memory is sent from there. confirm has the receiver say that it has it.
        with sender.reserve((1024, 1024), "float32") as slot:
            slot.numpy()[:] = rng.random((1024, 1024))
            sent = slot.send("weights", metadata={"step": 100}, confirm=True)
            sent.wait_delivered(timeout_s=5.0)
            print("sent weights: the receiver has them")


def main() -> None:
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    receiver = processes.Process(target=receive, args=(theirs,))
    receiver.start()
    theirs.close()
    send(ours.recv())
    receiver.join()
    sys.exit(receiver.exitcode)


if __name__ == "__main__":
    main()
