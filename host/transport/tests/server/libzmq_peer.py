"""What libzmq, through pyzmq, does with the server: run as `libzmq_peer.py NULL_ENDPOINT PLAIN_ENDPOINT
CURVE_ENDPOINT` and the CURVE keys: the server's public one, the client's public and secret one.

The server echoes, closes the connection on `close me`, and knows one user, team-a.
"""

import sys
import time

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

null, plain, curve = sys.argv[1:4]
server_key, public_key, secret_key = (z85.encode(bytes.fromhex(key)) for key in sys.argv[4:])
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


keys = {"CURVE_SERVERKEY": server_key, "CURVE_PUBLICKEY": public_key, "CURVE_SECRETKEY": secret_key}
for kind in (zmq.DEALER, zmq.REQ):
    for endpoint, options in ((null, {}), (curve, keys)):
        peer = socket(kind, endpoint, **options)
        for size in (0, 1, 255, 256, 65536, 520_000, 5 << 20):
            echoes(peer, b"uid", b"", bytes(size))
        peer.close()

# A ROUTER must name the peer it sends to, so it is only seen to connect: below.
for endpoint, options in ((null, {}), (curve, keys)):
    peer = socket(zmq.DEALER, endpoint, IDENTITY=b"me", **options)
    for at in range(3000):
        peer.send_multipart([b"%d" % at, b"x" * (at % 700)])
    for at in range(3000):
        assert peer.recv_multipart()[0] == b"%d" % at
    peer.close()

# Heartbeats of the client every 100 ms with a TTL of 1 s, through 3 s of silence.
for endpoint, options in ((curve, keys), (null, {})):
    peer = socket(
        zmq.DEALER, endpoint, HEARTBEAT_IVL=100, HEARTBEAT_TTL=1000, HEARTBEAT_TIMEOUT=2500, **options
    )
    events = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    echoes(peer, b"before")
    time.sleep(3)
    echoes(peer, b"after")
    assert not events.poll(0), "the heartbeats did not keep the connection"
    if endpoint == curve:
        peer.disable_monitor()
        peer.close()
# The server closes; libzmq comes back by itself.
peer.send(b"close me")
assert events.poll(10_000), "the server did not close"
echoes(peer, b"reconnected")
peer.disable_monitor()
peer.close()

# No heartbeats of its own: the server's PINGs must be answered by libzmq.
for endpoint, options in ((null, {}), (curve, keys)):
    peer = socket(zmq.DEALER, endpoint, **options)
    events = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    echoes(peer, b"before")
    time.sleep(3)
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

handshake(curve, IN, **keys)
handshake(curve, IN, kind=zmq.ROUTER, **keys)
handshake(curve, PROTOCOL)
handshake(curve, PROTOCOL, **user)
handshake(null, PROTOCOL, **keys)
# A stranger's key; a key whose secret the client does not have; another server's key.
other_public, other_secret = zmq.curve_keypair()
handshake(curve, AUTH, **{**keys, "CURVE_PUBLICKEY": other_public, "CURVE_SECRETKEY": other_secret})
for wrong in ({"CURVE_SECRETKEY": other_secret}, {"CURVE_SERVERKEY": other_public}):
    peer = socket(zmq.DEALER, curve, **{**keys, **wrong})
    peer.send(b"anybody?")
    assert not peer.poll(500), wrong
    peer.close()
context.destroy()
print("libzmq", zmq.zmq_version(), "is content")
