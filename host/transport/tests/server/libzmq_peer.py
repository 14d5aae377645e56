"""What libzmq, through pyzmq, does with the server: run as `libzmq_peer.py NULL_ENDPOINT PLAIN_ENDPOINT`.

The server echoes, closes the connection on `close me`, and knows one user, team-a.
"""

import sys
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

null, plain = sys.argv[1:]
context = zmq.Context()
context.setsockopt(zmq.LINGER, 0)


def socket(kind, endpoint, **options):
    made = context.socket(kind)
    made.setsockopt(zmq.RCVTIMEO, 15_000)
    for name, value in options.items():
        made.setsockopt(getattr(zmq, name), value)
    made.connect(endpoint)
    return made


def echoes(peer, *frames):
    peer.send_multipart(frames)
    answer = peer.recv_multipart()
    assert answer == list(frames), (frames, answer)


for kind in (zmq.DEALER, zmq.REQ):
    peer = socket(kind, null)
    for size in (0, 1, 255, 256, 65536, 520_000, 5 << 20):
        echoes(peer, b"uid", b"", bytes(size))
    peer.close()

# A ROUTER must name the peer it sends to, so it is only seen to connect: below.
peer = socket(zmq.DEALER, null, IDENTITY=b"me")
for at in range(3000):
    peer.send_multipart([b"%d" % at, b"x" * (at % 700)])
for at in range(3000):
    assert peer.recv_multipart()[0] == b"%d" % at
peer.close()

# Heartbeats of the client every 20 ms with a TTL of 100 ms, through 1 s of silence.
peer = socket(zmq.DEALER, null, HEARTBEAT_IVL=20, HEARTBEAT_TTL=100, HEARTBEAT_TIMEOUT=500)
events = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
echoes(peer, b"before")
time.sleep(1)
echoes(peer, b"after")
assert not events.poll(0), "the heartbeats did not keep the connection"
# The server closes; libzmq comes back by itself.
peer.send(b"close me")
assert events.poll(10_000), "the server did not close"
echoes(peer, b"reconnected")
peer.disable_monitor()
peer.close()

# No heartbeats of its own: the server's PINGs must be answered by libzmq.
peer = socket(zmq.DEALER, null)
events = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
echoes(peer, b"before")
time.sleep(1)
assert not events.poll(0), "dropped although libzmq answers PING"
echoes(peer, b"after")
peer.disable_monitor()
peer.close()

user = {"PLAIN_USERNAME": b"team-a", "PLAIN_PASSWORD": b"secret"}
peer = socket(zmq.DEALER, plain, **user)
echoes(peer, b"authenticated")
peer.close()


AUTH, PROTOCOL, IN = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_SUCCEEDED,
)


def handshake(endpoint, *expected, kind=zmq.DEALER, **options):
    peer = context.socket(kind)
    for name, value in options.items():
        peer.setsockopt(getattr(zmq, name), value)
    events = peer.get_monitor_socket(AUTH | PROTOCOL | IN)
    peer.connect(endpoint)
    assert events.poll(10_000), f"{options}: nothing happened"
    seen = recv_monitor_message(events)
    assert seen["event"] in expected, seen
    peer.disable_monitor()
    peer.close()


# libzmq 4.3.5 spells the ERROR of PLAIN `^RROR`, so it takes ours for a protocol error.
handshake(plain, AUTH, PROTOCOL, **{**user, "PLAIN_PASSWORD": b"guess"})
handshake(plain, PROTOCOL)
handshake(null, PROTOCOL, **user)
handshake(null, IN, kind=zmq.ROUTER)
context.destroy()
print("libzmq", zmq.zmq_version(), "is content")
