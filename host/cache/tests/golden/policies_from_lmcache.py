#!/usr/bin/env python3
"""Makes policies_lmcache.txt: what the policies of an installed LMCache 0.5.6 evict.

    python3 host/cache/tests/golden/policies_from_lmcache.py

The policies are driven as LMCache's L1 drives them (`v1/distributed/eviction.py`): a store is
reserved and created, a hit and the end of a session touch, an eviction removes what it chose.
"""

import pathlib
import random

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.eviction import L1EvictionPolicy
from lmcache.v1.distributed.eviction_policy.arc import ARCEvictionPolicy
from lmcache.v1.distributed.eviction_policy.lru import LRUEvictionPolicy

OUT = pathlib.Path(__file__).with_name("policies_lmcache.txt")


def keys(names):
    return [ObjectKey(name.encode().ljust(32, b"\0"), "m", 0) for name in names]


def script(name, policy, seed):
    rng = random.Random(seed)
    listener, resident, lines = L1EvictionPolicy(policy), [], [f"{name} seed {seed}"]

    def prefix():
        start = rng.choice("abcdefgh")
        return [f"{start}{n}" for n in range(1, rng.randint(1, 4) + 1)]

    for _ in range(40):
        verb = rng.choices(["store", "hit", "end", "evict", "remove"], [6, 4, 3, 4, 1])[0]
        if verb == "evict":
            count = rng.randint(1, 3)
            if len(resident) < count:
                continue
            actions = policy.get_eviction_actions((count + 0.5) / len(resident))
            victims = [key.chunk_hash.rstrip(b"\0").decode() for a in actions for key in a.keys]
            listener.on_l1_keys_deleted_by_manager(keys(victims))
            resident = [key for key in resident if key not in victims]
            lines.append(f"  evict {count}: {' '.join(victims)}")
            continue
        names = prefix()
        if verb == "store":
            names = [name for name in names if name not in resident]
            listener.on_l1_keys_reserved_write(keys(names))
            listener.on_l1_keys_write_finished(keys(names))
            resident += names
        elif verb == "remove":
            names = [name for name in names if name in resident]
            listener.on_l1_keys_deleted_by_manager(keys(names))
            resident = [name for name in resident if name not in names]
        else:
            names = [name for name in names if name in resident]
            listener.on_l1_keys_accessed(keys(names))
        if names:
            lines.append(f"  {verb} {' '.join(names)}")
    return "\n".join(lines)


def main():
    made = []
    for seed in range(12):
        made.append(script("LRU", LRUEvictionPolicy(), seed))
        made.append(script("ARC", ARCEvictionPolicy(), seed))
    OUT.write_text("\n\n".join(made) + "\n")


if __name__ == "__main__":
    main()
