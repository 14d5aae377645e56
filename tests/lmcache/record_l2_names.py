"""Records what LMCache calls objects in its L2 adapters, for host/l2/tests/names.rs.

Run with the Python of an LMCache 0.5.6 installation:

    python tests/lmcache/record_l2_names.py > tests/golden/l2_names.json
"""

import json
import sys

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import _object_key_to_filename
from lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter import (
    _object_key_to_string as native_name,
)
from lmcache.v1.distributed.l2_adapters.s3_l2_adapter import (
    _format_safe_path,
    _object_key_to_string as s3_name,
)


def main() -> None:
    """Prints one record per line of a JSON array."""
    rank = ObjectKey.ComputeKVRank(
        world_size=2, global_rank=1, local_world_size=2, local_rank=1
    )
    cases = [
        ("meta-llama/Llama-3.1-8B", rank, 0, bytes(range(32)), "tenant-a"),
        ("meta-llama/Llama-3.1-8B", rank, 0, bytes(range(32)), ""),
        ("m", 0, 0, bytes(32), ""),
        ("org/sub/model", 0xFFFFFFFF, 255, b"\xff" * 32, "s"),
        ("model with space", 0x01000100, 10, b"\x01" * 32, "Ümlaut ~#%"),
        ("a.b_c-d", 0x08070807, 16, b"\xab" * 32, ".."),
        ("{tagged}", 0x01000100, 0, b"\x10" * 32, "x" * 128),
    ]
    records = []
    for model, kv_rank, group, chunk_hash, salt in cases:
        key = ObjectKey(
            chunk_hash=chunk_hash,
            model_name=model,
            kv_rank=kv_rank,
            object_group_id=group,
            cache_salt=salt,
        )
        assert native_name(key) == s3_name(key)
        records.append(
            {
                "model_name": model,
                "kv_rank": kv_rank,
                "object_group_id": group,
                "chunk_hash": chunk_hash.hex(),
                "cache_salt": salt,
                "key": native_name(key),
                "file": _object_key_to_filename(key),
                "s3_path": _format_safe_path(s3_name(key)),
            }
        )
    json.dump(records, sys.stdout, indent=1, ensure_ascii=False)
    print()


if __name__ == "__main__":
    main()
