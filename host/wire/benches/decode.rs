//! What decoding costs: lookups by prompt length, commits by bytes of pickled tensors.
#![expect(clippy::unwrap_used, reason = "a bench that cannot start should stop")]

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use stockade_wire::{Dtype, Limits, decode, read_tensors, write_tensors};

/// How token ids are spread, which decides their widths on the wire.
#[derive(Clone, Copy)]
enum Vocabulary {
    /// 32 000 entries: three bytes each, but for the first 256.
    Small,
    /// 128 000 entries, half of them three bytes and half five, in no order.
    Large,
}

impl Vocabulary {
    fn tokens(self, count: usize) -> impl Iterator<Item = u32> {
        let size = match self {
            Self::Small => 32_000,
            Self::Large => 128_000,
        };
        let mut state = 0x9e37_79b9_u32;
        (0..count).map(move |_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state % size
        })
    }
}

fn lookup(vocabulary: Vocabulary, count: usize) -> Vec<Bytes> {
    let mut key = vec![0x87];
    let mut field = |name: &str, value: &[u8]| {
        rmp::encode::write_str(&mut key, name).unwrap();
        key.extend(value);
    };
    let mut tokens = Vec::new();
    rmp::encode::write_array_len(&mut tokens, u32::try_from(count).unwrap()).unwrap();
    for token in vocabulary.tokens(count) {
        rmp::encode::write_uint(&mut tokens, token.into()).unwrap();
    }
    field("model_name", b"\xa5model");
    field("world_size", b"\x01");
    field("worker_id", b"\xc0");
    field("token_ids", &tokens);
    field("start", b"\x00");
    field("end", b"\x00");
    field("request_id", b"\xa5req-1");
    let uid = Bytes::from_static(b"\x01");
    vec![uid.clone(), Bytes::from_static(b"\x08"), key.into(), uid]
}

fn lookups(c: &mut Criterion) {
    let limits = Limits::default();
    let mut group = c.benchmark_group("lookup_tokens");
    for (name, vocabulary) in [
        ("32k_vocabulary", Vocabulary::Small),
        ("128k_vocabulary", Vocabulary::Large),
    ] {
        for count in [1 << 10, 8 << 10, 32 << 10, 128 << 10] {
            let frames = lookup(vocabulary, count);
            group.throughput(Throughput::Elements(count as u64));
            group.bench_with_input(BenchmarkId::new(name, count), &frames, |b, frames| {
                b.iter(|| decode(black_box(frames.clone()), &limits).unwrap());
            });
        }
    }
    group.finish();
}

fn tensors(c: &mut Criterion) {
    const CHUNK_BYTES: usize = 4 << 20;
    let chunk = vec![1_u8; CHUNK_BYTES];
    let list = vec![(Dtype::BFloat16, &[2, 16, 256, 256][..], &chunk[..]); 8];
    let pickle = write_tensors(&list).unwrap();
    let mut group = c.benchmark_group("pickle_32_mib");
    group.throughput(Throughput::Bytes(pickle.len() as u64));
    group.bench_function("read", |b| {
        b.iter(|| read_tensors(black_box(&pickle)).unwrap())
    });
    group.bench_function("write", |b| {
        b.iter(|| write_tensors(black_box(&list)).unwrap())
    });
    group.finish();
}

criterion_group!(benches, lookups, tensors);
criterion_main!(benches);
