//! Memory follows what arrived: measured by an allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use stockade_wire::{Limits, decode, read_tensors, write_tensors};

use crate::hostile::{Field, key_frame, mutate};
use crate::pickles::golden_pickles;
use crate::{frames, golden_lines, packed_str};

struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    HELD.set(HELD.get() + bytes);
    PEAK.set(PEAK.get().max(HELD.get()));
}

// SAFETY: every call goes on to the system allocator unchanged; counting allocates nothing,
// because the cells are thread-local, const-initialised and without destructors.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that were held at once during the call, beyond those held before.
fn peak_bytes<T>(call: impl FnOnce() -> T) -> (usize, T) {
    let before = HELD.get();
    PEAK.set(before);
    let value = call();
    ((PEAK.get() - before).cast_unsigned(), value)
}

fn check_frames(request: Vec<Bytes>) {
    let sent: usize = request
        .iter()
        .map(|frame| frame.len() + size_of::<Bytes>())
        .sum();
    let (peak, _) = peak_bytes(|| decode(request, &Limits::default()).is_ok());
    assert!(
        peak <= 64 * sent + 1024,
        "{peak} bytes held for {sent} sent"
    );
}

/// A tensor or tuple costs some tens of bytes where two bytes of pickle can repeat it.
fn check_pickle(pickle: &[u8]) -> usize {
    let (peak, _) = peak_bytes(|| read_tensors(pickle).map(|tensors| tensors.len()));
    assert!(
        peak <= 128 * pickle.len() + 4096,
        "{peak} bytes held for {} sent",
        pickle.len()
    );
    peak
}

#[test]
fn announced_lengths_are_not_believed() {
    let huge: [&[u8]; 8] = [
        b"\xdd\xff\xff\xff\xff",
        b"\xdc\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xde\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xdd\xff\xff\xff\xff\x01\x01\x01",
    ];
    for header in huge {
        for field in ["token_ids", "model_name", "request_configs", "unknown"] {
            let key = key_frame(&[Field::is(field, header)]);
            let uid = Bytes::from_static(b"\x01");
            check_frames(vec![uid.clone(), packed_str("lookup"), key, uid]);
        }
        for op in [
            "report_block_allocation",
            "p2p_lookup_and_lock",
            "p2p_unlock_objects",
        ] {
            let mut request = vec![Bytes::from_static(b"\x01"), packed_str(op)];
            request.extend(vec![Bytes::copy_from_slice(header); 3]);
            check_frames(request);
        }
    }
    let announced_bytes = b"\x80\x04]C\xff";
    let announced_more = b"\x80\x04]\x8e\xff\xff\xff\xff\xff\xff\xff\x7f";
    let far_memo = b"\x80\x04]r\xff\xff\xff\xff.";
    for pickle in [&announced_bytes[..], announced_more, far_memo] {
        check_pickle(pickle);
    }
}

#[test]
fn tokens_take_four_bytes_each_at_once() {
    let tokens = [&b"\xdd\x00\x10\x00\x00"[..], &[5; 1 << 20]].concat();
    let key = key_frame(&[Field::is("token_ids", tokens)]);
    let uid = Bytes::from_static(b"\x01");
    let request = vec![uid.clone(), packed_str("lookup"), key, uid];
    let (peak, decoded) = peak_bytes(|| decode(request, &Limits::default()));
    assert!(decoded.is_ok());
    assert!((4 << 20..(4 << 20) + 2048).contains(&peak), "{peak}");
}

#[test]
fn tensors_are_read_in_place() {
    let data = vec![7_u8; 8 << 20];
    let shape = [2, 4, 1 << 10, 1 << 9];
    let list = [(stockade_wire::Dtype::BFloat16, &shape[..], &data[..]); 4];
    let (peak, pickle) = peak_bytes(|| write_tensors(&list).unwrap());
    assert_eq!(pickle.len(), pickle.capacity());
    assert!(peak < pickle.len() + 1024, "writing held {peak} bytes");
    assert!(check_pickle(&pickle) < 16 << 10);
}

#[test]
fn opcodes_that_only_pile_up_stay_bounded() {
    let pile = |opcodes: &[u8]| [b"\x80\x04", &opcodes.repeat(40_000)[..], b"."].concat();
    for opcodes in [
        &b"("[..],
        b"N",
        b"]",
        b"}",
        b")",
        b"]\x94",
        b"N\x85",
        b"K\x01\x85\x94",
        b"(t",
        b"]]]]",
        b"}\x94(u",
        b"](e",
        b"NNN\x87",
    ] {
        // Far less than a value per opcode would take.
        let peak = check_pickle(&pile(opcodes));
        assert!(peak < 1 << 20, "{opcodes:?} held {peak} bytes");
    }
    // One tensor, and then as many more of it as two bytes each can make.
    let one = write_tensors(&[(stockade_wire::Dtype::UInt8, &[1], b"x")]).unwrap();
    let end = one.len() - 2;
    let many = [&one[..end], b"q\x09", &b"h\x09".repeat(1500)[..], b"e."].concat();
    assert_eq!(read_tensors(&many).unwrap().len(), 1501);
    check_pickle(&many);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn mutated_requests_hold_a_bounded_multiple_of_their_bytes(
        line in any::<prop::sample::Index>(),
        frame in any::<prop::sample::Index>(),
        edits in vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 1..4),
    ) {
        let lines = golden_lines("recorded.jsonl");
        let requests: Vec<_> = lines.iter().filter(|line| line["from"] == "client").collect();
        let mut request = frames(&line.get(&requests)["frames"]);
        let frame = frame.get_mut(&mut request);
        *frame = mutate(frame, &edits).into();
        check_frames(request);
    }

    #[test]
    fn mutated_pickles_hold_a_bounded_multiple_of_their_bytes(
        pickle in prop::sample::select(golden_pickles()),
        edits in vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 1..4),
    ) {
        check_pickle(&mutate(&pickle.1, &edits));
    }
}
