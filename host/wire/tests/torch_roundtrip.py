#!/usr/bin/env python3
"""Round trips pickled tensors between the real torch and stockade-wire.

    cargo build --release -p stockade-wire --example pickle_roundtrip
    python3 host/wire/tests/torch_roundtrip.py target/release/examples/pickle_roundtrip

Ends with 0 and a count if all agree, with 0 and a note if torch is not installed, with 1 on
the first difference.
"""

import ctypes
import pickle
import random
import struct
import subprocess
import sys
import warnings

try:
    import torch
except ImportError:
    print("skipped: torch is not installed")
    sys.exit(0)

warnings.filterwarnings("ignore")

DTYPES = sorted(
    {getattr(torch, n) for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)},
    key=str,
)
SHAPES = [
    (), (1,), (0,), (5,), (2, 0, 3), (3, 4), (2, 1, 4, 2), (1, 1, 1), (2, 3, 4, 5),
    (2, 2, 16, 16), (300, 7), (7, 300), (1, 70000), (2, 2, 64, 129), (1, 2, 1, 2, 1, 2, 1),
]


class Peer:
    def __init__(self, binary):
        self.child = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, data):
        self.child.stdin.write(struct.pack("<Q", len(data)))
        self.child.stdin.write(data)
        self.child.stdin.flush()
        (length,) = struct.unpack("<Q", self.child.stdout.read(8))
        answer = self.child.stdout.read(length & ~(1 << 63))
        return (None, answer.decode()) if length >> 63 else (answer, None)


def filled(dtype, shape, rng):
    """A tensor of random bits, whatever the dtype makes of them."""
    count = 1
    for dim in shape:
        count *= dim
    size = dtype.itemsize
    raw = torch.frombuffer(bytearray(rng.randbytes(max(1, count) * size)), dtype=torch.uint8)
    if dtype == torch.bool:
        raw = raw & 1
    tensor = torch.empty(0, dtype=dtype)
    strides = torch.empty(shape, dtype=torch.uint8).stride()
    tensor.set_(raw.untyped_storage(), 0, shape, strides)
    return tensor


def bits(tensor):
    """Row-major bytes of a tensor of any dtype, without arithmetic on its elements."""
    size = tensor.dtype.itemsize
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * size
    shape = (*tensor.shape, size)
    if 0 in shape:
        return b""
    strides = (*(stride * size for stride in tensor.stride()), 1)
    dense = raw.as_strided(shape, strides, start).contiguous()
    return ctypes.string_at(dense.data_ptr(), dense.numel())


def variants(dtype, rng):
    """Lists of dense and strided tensors of one dtype."""
    for shape in SHAPES:
        yield [filled(dtype, shape, rng)]
    yield [filled(dtype, shape, rng) for shape in SHAPES]
    base = filled(dtype, (6, 4, 5), rng)
    views = [
        base, base.transpose(0, 2), base.permute(1, 0, 2), base[1:3], base[:, 1], base[..., ::2],
        base[2:, 1:3, 3:], base[0, 0, 0], base[:0], base[::3, ::2], base.as_strided((4, 3), (3, 7), 2),
        base.as_strided((5, 3), (0, 1), 1), base.as_strided((3, 3), (1, 1), 4),
        base.unsqueeze(1).transpose(1, 3), base.as_strided((2, 1, 3), (60, 999, 1), 0),
    ]
    for view in views:
        yield [view]
    yield views
    yield [base, base]
    yield [base[0], base, base[0]]



def check(peer, tensors, protocol):
    expected = [(t.dtype, tuple(t.shape), bits(t)) for t in tensors]
    answer, refusal = peer.ask(pickle.dumps(tensors, protocol=protocol))
    if refusal:
        raise AssertionError(f"refused: {refusal} ({[e[:2] for e in expected]}, {protocol=})")
    loaded = pickle.loads(answer)
    assert type(loaded) is list, type(loaded)
    got = [(t.dtype, tuple(t.shape), bits(t)) for t in loaded]
    assert got == expected, (got, expected)
    assert all(t.is_contiguous() and not t.requires_grad for t in loaded)
    second, refusal = peer.ask(answer)
    assert second == answer, f"not stable: {refusal}"


def refused():
    """What torch can pickle and a KV cache never holds."""
    yield "conj", [torch.zeros(2, dtype=torch.complex64).conj()]
    yield "neg", [torch.zeros(4, dtype=torch.complex64).conj().imag]
    yield "parameter", [torch.nn.Parameter(torch.zeros(2))]
    tagged = torch.zeros(2)
    tagged.note = 1
    yield "attribute", [tagged]
    yield "sparse", [torch.eye(3).to_sparse()]
    yield "meta", [torch.empty(3, device="meta")]
    yield "not a tensor", [torch.zeros(2), 1]
    yield "a tuple", (torch.zeros(2),)
    yield "a lone tensor", torch.zeros(2)
    yield "a dict", {"a": torch.zeros(2)}
    yield "a nested list", [[torch.zeros(2)]]
    yield "an expansion", [torch.zeros(1).expand(1 << 40)]
    yield "code", [eval]
    yield "a class", [Peer]


def main():
    peer = Peer(sys.argv[1])
    rng = random.Random(5)
    passed, skipped = 0, {}
    for dtype in DTYPES:
        for protocol in (3, 4, 5):
            for tensors in variants(dtype, rng):
                try:
                    pickle.dumps(tensors, protocol=protocol)
                except Exception as error:  # torch itself cannot pickle this dtype
                    skipped[str(dtype)] = f"{type(error).__name__}: {error}"
                    break
                check(peer, tensors, protocol)
                passed += 1
    for count in (0, 1, 2, 999, 1000, 1001, 2500):
        check(peer, [torch.full((2,), float(i)) for i in range(count)], 4)
        passed += 1
    for requires_grad in (True, False):
        answer, _ = peer.ask(pickle.dumps([torch.ones(3, requires_grad=requires_grad)]))
        assert pickle.loads(answer)[0].tolist() == [1, 1, 1]
        passed += 1
    big = torch.frombuffer(bytearray(rng.randbytes(32 << 20)), dtype=torch.bfloat16)
    check(peer, [big.view(2, 16, 256, -1), big.view(2, 16, 256, -1).transpose(1, 2)], 4)
    passed += 1
    refusals = 0
    for name, value in refused():
        answer, refusal = peer.ask(pickle.dumps(value))
        assert refusal, f"{name} was not refused"
        refusals += 1
    answer, refusal = peer.ask(pickle.dumps([torch.zeros(2)], protocol=2))
    assert refusal and "protocol 3" in refusal, refusal
    for name, reason in skipped.items():
        print(f"torch cannot pickle {name}: {reason}")
    dtypes = len(DTYPES) - len(skipped)
    print(f"torch {torch.__version__}: {passed} lists of {dtypes} dtypes agree, "
          f"{refusals + 1} other objects refused")


main()
