"""Every example runs alone, as it stands in its file, and says what it should."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from processes import Finished, running

EXAMPLES = Path(__file__).parents[2] / "examples"
TESTED_HERE = {
    "numpy_tensors.py": [
        "received activations: float64 (512, 1024), mean 0.001",
        "with {'layer': 7}, by <PathBytes dmabuf=4194304 linear=0 host=0 copied=",
        "received weights: float32 (1024, 1024), mean 0.500",
        "sent weights: the receiver has them",
    ],
    "fetch_weights.py": [
        "model.layers.1.weight: float32 (256, 512), 524,288 bytes, ",
        "path: dmabuf 1,048,576, linear 0, host 0",
        "served 2 tensors, 1,048,576 bytes",
    ],
    "asyncio_server.py": [f"sender {number}: 25 arrays, sum 1,228,800" for number in range(4)],
}


def run(name: str) -> Finished:
    with running(program=["-W", "error", str(EXAMPLES / name)]) as example:
        return example.finish()


@pytest.mark.parametrize("name", TESTED_HERE)
def test_an_example_says_what_it_should(name: str) -> None:
    ended = run(name)
    assert (ended.status, ended.stderr) == (0, "")
    text = ended.stdout.decode()
    for line in TESTED_HERE[name]:
        assert line in text


def test_torch_tensors_or_what_to_install() -> None:
    ended = run("torch_tensors.py")
    if importlib.util.find_spec("torch") is None:
        assert (ended.status, ended.stdout) == (2, b"")
        assert ended.stderr == "this example needs PyTorch: pip install torch\n"
        return
    assert ended.status == 0, ended.stderr
    lines = ended.stdout.decode().splitlines()
    assert lines == [
        "received weights: torch.bfloat16 (1024, 1024), sum 1048576",
        "received weights, next step: torch.bfloat16 (1024, 1024), sum 2097152",
        "received indices: torch.int64 (1000,), sum 499500",
    ]


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"torch_tensors.py", *TESTED_HERE}
