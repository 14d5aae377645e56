#!/usr/bin/env python3
"""A transformers model on CPU that keeps its KV cache in Stockade, through LMCache's own adapters.

    engine.py store URL      computes the KV of a prompt and stores it
    engine.py load URL       another process: retrieves it, and compares logits

The model is small and made of random numbers from a fixed seed, so both processes have the same
one and nothing is downloaded. LMCache's worker and scheduler adapters are those that vLLM uses; the
paged KV cache that vLLM would own is a few tensors here.
"""

import os
import sys
import time

os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_MP_TRANSFER_MODE", "engine_driven")

import torch
import zmq
from lmcache.integration.vllm.vllm_multi_process_adapter import (
    LMCacheMPSchedulerAdapter,
    LMCacheMPWorkerAdapter,
    LoadStoreOp,
    ParallelStrategy,
)
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

MODEL = "tiny-llama-of-random-numbers"
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 16
BLOCK = 16           # tokens per block of the paged cache
PROMPT = 600         # tokens; two chunks of 256 are cached, the rest is computed
PATIENCE = 30.0      # seconds


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=2048, attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def prompt():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 1000, (PROMPT,), generator=generator)


class Paged:
    """A paged KV cache: per layer [keys and values, blocks, heads, tokens of a block, head]."""

    def __init__(self, blocks):
        shape = (2, blocks, KV_HEADS, BLOCK, HEAD_DIM)
        self.layers = {f"layer.{i}": torch.zeros(shape) for i in range(LAYERS)}

    def write(self, cache, block_ids):
        tokens = len(block_ids) * BLOCK
        for layer, paged in zip(cache.layers, self.layers.values()):
            for plane, whole in enumerate((layer.keys, layer.values)):
                blocks = whole[0, :, :tokens].reshape(KV_HEADS, -1, BLOCK, HEAD_DIM)
                paged[plane, block_ids] = blocks.transpose(0, 1)

    def read(self, block_ids):
        cache = DynamicCache()
        for index, paged in enumerate(self.layers.values()):
            keys, values = (
                paged[plane, block_ids].transpose(0, 1).reshape(1, KV_HEADS, -1, HEAD_DIM)
                for plane in range(2)
            )
            cache.update(keys.contiguous(), values.contiguous(), index)
        return cache


class Engine:
    """What vLLM's connector does with LMCache's adapters, less the scheduling."""

    def __init__(self, url, blocks=128):
        rank = ParallelStrategy(
            mla_only=False, vllm_world_size=1, vllm_worker_id=0, tp_size=1, pp_size=1, n_servers=1
        )
        context = zmq.Context.instance()
        settings = {"mq_timeout": PATIENCE, "heartbeat_interval": 1.0}
        self.scheduler = LMCacheMPSchedulerAdapter([url], context, MODEL, BLOCK, rank, **settings)
        self.worker = LMCacheMPWorkerAdapter(url, context, MODEL, BLOCK, rank, **settings)
        self.kv = Paged(blocks)
        self.worker.register_kv_caches(self.kv.layers, layout_hints={"kv_layout": "HND"})

    def chunk_tokens(self):
        return self.scheduler.lmcache_tokens_per_chunk

    def cached_tokens(self, request, tokens):
        """Tokens at the start of the prompt that the server has, locked for this request."""
        self.scheduler.maybe_submit_lookup_request(request, tokens)
        deadline = time.monotonic() + PATIENCE
        while (found := self.scheduler.check_lookup_result(request)) is None:
            assert time.monotonic() < deadline, "the lookup is not answered"
            time.sleep(0.005)
        return found

    def store(self, request, tokens, block_ids):
        """Stores whole chunks; whether the server took them."""
        op = LoadStoreOp(tokens, [block_ids], 0, len(block_ids) * BLOCK)
        self.worker.submit_store_request(request, op, self.worker.create_recorded_event())
        future = self.worker.store_futures.pop(request, None)
        return future is not None and future.result(timeout=PATIENCE)

    def retrieve(self, request, tokens, block_ids):
        """Fills the blocks; whether it came."""
        op = LoadStoreOp(tokens, [block_ids], 0, len(block_ids) * BLOCK)
        self.worker.submit_retrieve_request(request, op, self.worker.create_recorded_event())
        future, _ = self.worker.retrieve_futures.pop(request, (None, None))
        return future is not None and future.result(timeout=PATIENCE)

    def close(self):
        self.worker.shutdown()
        self.scheduler.shutdown()


@torch.no_grad()
def main(what, url):
    net, ids = model(), prompt()
    tokens = ids.tolist()
    engine = Engine(url)
    cached = PROMPT // engine.chunk_tokens() * engine.chunk_tokens()
    blocks = list(range(5, 5 + cached // BLOCK))
    if what == "store":
        computed = net(ids[None, :cached], use_cache=True).past_key_values
        engine.kv.write(computed, blocks)
        assert engine.store("store-1", tokens[:cached], blocks), "the server did not take the KV"
        print(f"stored the KV of {cached} tokens")
    else:
        found = engine.cached_tokens("load-1", tokens)
        assert found == cached, f"{found} of {cached} tokens are cached"
        assert engine.retrieve("load-1", tokens[:cached], blocks), "the KV did not come"
        engine.scheduler.end_session("load-1")
        with_cache = net(ids[None, cached:], past_key_values=engine.kv.read(blocks)).logits
        # Without cache, in the same two steps: the same numbers, bit for bit.
        computed = net(ids[None, :cached], use_cache=True).past_key_values
        without_cache = net(ids[None, cached:], past_key_values=computed).logits
        assert torch.equal(with_cache, without_cache), "the logits differ"
        # And in one step, where sums are taken in another order.
        whole = net(ids[None]).logits[:, cached:]
        assert torch.allclose(with_cache, whole, atol=1e-4), (with_cache - whole).abs().max()
        print(
            f"retrieved {found} tokens, computed {PROMPT - found}: logits of {with_cache.shape[1]} "
            f"positions are bit for bit those without cache"
        )
    engine.close()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("store", "load"):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
