"""Send PyTorch tensors, bfloat16 too, from one thread to another, without a copy on either side.

    pip install torch
    python examples/torch_tensors.py

Runs on any machine: see numpy_tensors.py on backends. Two threads stand for two hosts here; each has a NIC of its own.
"""

import sys
import threading

import devmem_tcp as dmt
from devmem_tcp.transport import Receiver, open_receiver, open_sender

try:
    import torch
except ImportError:
    print("this example needs PyTorch: pip install torch", file=sys.stderr)
    sys.exit(2)

MIB = 1 << 20


def receive(receiver: Receiver) -> None:
    for message in receiver:
        with message:
            tensor = torch.from_dlpack(message.gather())  # the bytes where they landed, as a tensor
            print(f"received {message.name}: {tensor.dtype} {tuple(tensor.shape)}, sum {tensor.float().sum():.0f}")
            # A tensor made of a message keeps its bytes as they are for as long as it lives, and with them memory that
            # the next messages need: clone() what is kept for long, and drop the rest.
            del tensor


def send(to: tuple[str, int] | None) -> None:
    with (
        dmt.open_nic("soft1", backend="software") as nic,
        open_sender(nic, to=to, size=16 * MIB) as sender,
    ):
        # A slot is a window of the bound memory: a tensor made in it is sent from there.
        with sender.reserve((1024, 1024), torch.bfloat16) as slot:
            weights = torch.from_dlpack(slot)
            weights.fill_(1.0)
            slot.send("weights").wait()  # after wait the slot may be changed again
            weights.fill_(2.0)
            slot.send("weights, next step")
            del weights

        # A tensor that lies elsewhere is copied into the bound memory as it goes.
        sender.send(torch.arange(1000), "indices")


def main() -> None:
    with (
        dmt.open_nic("soft0", backend="software") as nic,
        open_receiver(nic, listen=("127.0.0.1", 0), size=16 * MIB) as receiver,
    ):
        sending = threading.Thread(target=send, args=(receiver.address,))
        sending.start()
        receive(receiver)  # until the sender has said goodbye
        sending.join()


if __name__ == "__main__":
    main()
