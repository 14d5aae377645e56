//! Chunk hashes and ranks as LMCache 0.5.6 computes them.

use std::num::NonZeroUsize;

use serde_json::Value;
use stockade_cache::{ChunkHash, TokenHasher, kv_rank};

fn vectors() -> Value {
    serde_json::from_str(include_str!("../golden/hash_vectors.json")).unwrap()
}

fn hasher(vector: &Value) -> TokenHasher {
    let chunk_size = vector["chunk_size"].as_u64().unwrap() as usize;
    TokenHasher::new(NonZeroUsize::new(chunk_size).unwrap())
}

fn big_endian(tokens: impl IntoIterator<Item = u32>) -> Vec<u8> {
    tokens.into_iter().flat_map(u32::to_be_bytes).collect()
}

/// The tokens of a vector, which long ones give as a generator with the seed in the name.
fn tokens_of(vector: &Value) -> Vec<u8> {
    if let Some(tokens) = vector["tokens"].as_array() {
        return big_endian(tokens.iter().map(|token| token.as_u64().unwrap() as u32));
    }
    let name = vector["name"].as_str().unwrap();
    let mut x: u64 = name.rsplit_once("seed").unwrap().1.parse().unwrap();
    let count = vector["num_tokens"].as_u64().unwrap();
    let tokens: Vec<u32> = (0..count)
        .map(|_| {
            x = (x * 1_103_515_245 + 12_345) & 0x7fff_ffff;
            (x % 152_064) as u32
        })
        .collect();
    let first = vector["first_tokens"].as_array().unwrap();
    assert!(tokens.iter().zip(first).all(|(&token, want)| want == token));
    big_endian(tokens)
}

fn hex(hashes: &[ChunkHash]) -> Vec<String> {
    hashes.iter().map(ChunkHash::to_string).collect()
}

fn strings(value: &Value) -> Vec<String> {
    let texts = value.as_array().unwrap().iter();
    texts
        .map(|text| text.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn every_vector_matches() {
    let vectors = vectors();
    let all = vectors["vectors"].as_array().unwrap();
    assert_eq!(all.len(), 30);
    for vector in all {
        let (hasher, tokens) = (hasher(vector), tokens_of(vector));
        let mut hashes = Vec::new();
        hasher.chunk_hashes(&tokens, &mut hashes, usize::MAX);
        assert_eq!(
            hashes.len() as u64,
            vector["num_chunks"],
            "{}",
            vector["name"]
        );
        let all_bytes: Vec<u8> = hashes.iter().flat_map(|hash| hash.0).collect();
        let (hashes, want) = (hex(&hashes), &vector["chunk_hashes_hex"]);
        if let Some(parts) = want.as_object() {
            for (part, want) in parts {
                match part.as_str() {
                    "first" => assert!(hashes.starts_with(&strings(want))),
                    "last" => assert!(hashes.ends_with(&strings(want))),
                    "blake3_of_all_concatenated" => {
                        assert_eq!(want, blake3::hash(&all_bytes).to_hex().as_str());
                    }
                    other => panic!("unknown part {other}"),
                }
            }
        } else {
            assert_eq!(hashes, strings(want), "{}", vector["name"]);
        }
    }
}

#[test]
fn the_none_hash_and_the_ranges_match() {
    let vectors = vectors();
    for range in vectors["ranges"].as_array().unwrap() {
        let hasher = hasher(range);
        assert_eq!(vectors["none_hash_hex"], hasher.none_hash().to_string());
        assert_eq!(range["tokens"], "0..63");
        let mut hashes = Vec::new();
        let size = hasher.chunk_size() as u64;
        let bound = |name: &str| (range[name].as_u64().unwrap() / size) as usize;
        hasher.chunk_hashes(&big_endian(0..64), &mut hashes, bound("end"));
        assert_eq!(
            hex(&hashes[bound("start")..]),
            strings(&range["hashes_hex"])
        );
    }
}

#[test]
fn a_session_that_grows_gets_the_same_hashes_as_one_that_starts_over() {
    // 700 tokens take the path for chunks that do not fit on the stack.
    for chunk_size in [1, 16, 256, 512, 513, 700] {
        let hasher = TokenHasher::new(NonZeroUsize::new(chunk_size).unwrap());
        let tokens = big_endian(0..4 * 700);
        let mut whole = Vec::new();
        hasher.chunk_hashes(&tokens, &mut whole, usize::MAX);
        assert_eq!(whole.len(), 4 * 700 / chunk_size);
        let mut grown = Vec::new();
        for end in (0..=tokens.len()).step_by(1234).chain([tokens.len()]) {
            hasher.chunk_hashes(&tokens[..end], &mut grown, usize::MAX);
            assert_eq!(grown.len(), end / 4 / chunk_size);
        }
        assert_eq!(grown, whole);
        let mut limited = Vec::new();
        hasher.chunk_hashes(&tokens, &mut limited, 2);
        hasher.chunk_hashes(&tokens, &mut limited, 1);
        assert_eq!(limited, whole[..2]);
    }
}

#[test]
fn both_paths_of_the_hasher_agree_with_the_definition() {
    for chunk_size in [512_usize, 513] {
        let hasher = TokenHasher::new(NonZeroUsize::new(chunk_size).unwrap());
        let tokens = big_endian((0..chunk_size as u32).map(|token| token * 7));
        let mut joined = hasher.none_hash().0.to_vec();
        joined.extend_from_slice(&tokens);
        let mut hashes = Vec::new();
        hasher.chunk_hashes(&tokens, &mut hashes, usize::MAX);
        assert_eq!(hashes[0].0, *blake3::hash(&joined).as_bytes());
    }
}

#[test]
fn absurd_sizes_give_no_hashes() {
    let mut hashes = Vec::new();
    TokenHasher::new(NonZeroUsize::MAX).chunk_hashes(&[0; 64], &mut hashes, usize::MAX);
    TokenHasher::new(NonZeroUsize::MIN).chunk_hashes(&[0; 3], &mut hashes, usize::MAX);
    assert!(hashes.is_empty());
}

#[test]
fn ranks_match_where_lmcaches_do_not_overlap() {
    for vector in vectors()["kv_rank"].as_array().unwrap() {
        let number = |name: &str| vector[name].as_u64().unwrap();
        let world_size = number("world_size") as u32;
        let rank = kv_rank(world_size, number("worker_id") as u32).map(u64::from);
        let want = (world_size <= 255).then(|| number("kv_rank"));
        assert_eq!(rank, want, "world size {world_size}");
    }
}
