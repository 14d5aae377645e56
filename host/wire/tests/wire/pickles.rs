//! Pickled tensors: what torch wrote, what we write, and what neither would.

use proptest::collection::vec;
use proptest::prelude::*;
use stockade_wire::{Dtype, PickleError, PickledTensor, read_tensors, write_tensors};

use crate::golden_path;
use crate::hostile::mutate;

/// Name and bytes of the pickles that torch 2.15 wrote: lists of two tensors of shape
/// (2, 1, 4, 2), with the elements 0..16 and 100..116.
pub(crate) fn golden_pickles() -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(golden_path("pickle")).unwrap();
    let mut pickles: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            (
                path.file_stem().unwrap().to_str().unwrap().to_owned(),
                std::fs::read(path).unwrap(),
            )
        })
        .collect();
    pickles.sort();
    pickles
}

fn dense(tensor: &PickledTensor<'_>) -> Vec<u8> {
    tensor.parts().collect::<Vec<_>>().concat()
}

fn rewrite(tensors: &[PickledTensor<'_>]) -> Vec<u8> {
    let dense: Vec<_> = tensors.iter().map(dense).collect();
    let list: Vec<_> = tensors
        .iter()
        .zip(&dense)
        .map(|(tensor, bytes)| (tensor.dtype, &*tensor.shape, &bytes[..]))
        .collect();
    write_tensors(&list).unwrap()
}

#[test]
fn pickles_that_torch_wrote_are_read_in_place() {
    type Element = fn(u16) -> Vec<u8>;
    let elements: [(&str, Dtype, Element); 5] = [
        ("list2_bfloat16", Dtype::BFloat16, |n| {
            f32::from(n).to_le_bytes()[2..].to_vec()
        }),
        ("list2_float16", Dtype::Float16, |n| match n {
            0 => vec![0, 0],
            n => {
                let exponent = 15 + n.ilog2();
                let mantissa = (u32::from(n) << 10 >> n.ilog2()) & 0x3ff;
                u16::try_from(exponent << 10 | mantissa)
                    .unwrap()
                    .to_le_bytes()
                    .to_vec()
            }
        }),
        ("list2_float32", Dtype::Float32, |n| {
            f32::from(n).to_le_bytes().to_vec()
        }),
        ("list2_float8_e4m3fn", Dtype::Float8E4m3fn, |_| vec![]),
        ("list2_uint8", Dtype::UInt8, |n| {
            vec![u8::try_from(n).unwrap()]
        }),
    ];
    let pickles = golden_pickles();
    assert_eq!(pickles.len(), elements.len());
    for ((name, pickle), (expected, dtype, element)) in pickles.iter().zip(elements) {
        assert_eq!(name, expected);
        let tensors = read_tensors(pickle).unwrap();
        assert_eq!(tensors.len(), 2);
        for (tensor, first) in tensors.iter().zip([0, 100]) {
            assert_eq!((tensor.dtype, &*tensor.shape), (dtype, &[2, 1, 4, 2][..]));
            assert_eq!(tensor.strides(), [8, 8, 2, 1]);
            assert_eq!(tensor.byte_len(), 16 * dtype.item_size());
            let bytes = tensor.contiguous().unwrap();
            assert!(
                pickle.as_ptr_range().contains(&bytes.as_ptr()),
                "{name} was copied"
            );
            let values: Vec<u8> = (first..first + 16).flat_map(element).collect();
            if dtype != Dtype::Float8E4m3fn {
                assert_eq!(bytes, values, "{name}");
            }
        }
    }
    // float8_e4m3fn rounds: 100 and 101 to 96 and 104.
    let float8 = read_tensors(&pickles[3].1).unwrap();
    assert_eq!(
        float8[0].contiguous().unwrap()[..4],
        [0x00, 0x38, 0x40, 0x44]
    );
}

#[test]
fn empty_lists_are_read_and_written() {
    for empty in [
        &b"\x80\x04]\x94."[..],
        b"\x80\x05]\x94.",
        b"\x80\x03]q\x00.",
    ] {
        assert!(read_tensors(empty).unwrap().is_empty());
    }
    assert_eq!(write_tensors(&[]).unwrap(), b"\x80\x04].");
}

#[test]
fn what_is_written_stays_the_same() {
    // A change here changes what older readers get: run tests/torch_roundtrip.py.
    let pickle = write_tensors(&[
        (Dtype::UInt8, &[1, 2], b"\x01\x02"),
        (Dtype::UInt16, &[], b"\x03\x04"),
    ]);
    let inner = |elements: u8, bytes: &str| {
        format!(
            "\\x80\\x02\\x8a\\nl\\xfc\\x9cF\\xf9 j\\xa8P\\x19.\\x80\\x02M\\xe9\\x03.\\x80\\x02}}(\
             X\\x10\\x00\\x00\\x00protocol_versionM\\xe9\\x03X\\r\\x00\\x00\\x00little_endian\\x88\
             X\\n\\x00\\x00\\x00type_sizes}}(X\\x05\\x00\\x00\\x00shortK\\x02X\\x03\\x00\\x00\\x00intK\\x04\
             X\\x04\\x00\\x00\\x00longK\\x04uu.\\x80\\x02(X\\x07\\x00\\x00\\x00storage\
             ctorch\\nByteStorage\\nX\\x01\\x00\\x00\\x000X\\x03\\x00\\x00\\x00cpu\
             K\\x0{elements}NtQ.\\x80\\x02]X\\x01\\x00\\x00\\x000a.\
             \\x0{elements}\\x00\\x00\\x00\\x00\\x00\\x00\\x00{bytes}"
        )
    };
    let expected = [
        "\\x80\\x04](\\x8c\\x0ctorch._utils\\x8c\\x12_rebuild_tensor_v2\\x93q\\x00(",
        "\\x8c\\rtorch.storage\\x8c\\x10_load_from_bytes\\x93q\\x02B\\xc4\\x00\\x00\\x00",
        &inner(2, "\\x01\\x02"),
        "\\x85RK\\x00(K\\x01K\\x02t(K\\x02K\\x01t\\x89",
        "\\x8c\\x0bcollections\\x8c\\x0bOrderedDict\\x93q\\x03)RtR",
        "\\x8c\\x0ctorch._utils\\x8c\\x12_rebuild_tensor_v3\\x93q\\x01(h\\x02B\\xc4\\x00\\x00\\x00",
        &inner(2, "\\x03\\x04"),
        "\\x85RK\\x00(t(t\\x89h\\x03)R\\x8c\\x05torch\\x8c\\x06uint16\\x93tRe.",
    ];
    assert_eq!(
        pickle.unwrap().escape_ascii().to_string(),
        expected.concat()
    );
}

#[test]
fn bytes_that_are_not_what_the_shape_says_are_not_written() {
    let error = write_tensors(&[
        (Dtype::Float16, &[2], b"1234"),
        (Dtype::Float16, &[3], b"1234"),
    ]);
    assert_eq!(
        error,
        Err(PickleError::Length {
            index: 1,
            got: 4,
            needed: Some(6)
        })
    );
    let error = write_tensors(&[(Dtype::Float16, &[u64::MAX, 2], b"")]);
    assert_eq!(
        error,
        Err(PickleError::Length {
            index: 0,
            got: 0,
            needed: None
        })
    );
}

/// Replaces bytes within the first of torch's pickles of float16.
fn tampered(from: &[u8], to: &[u8]) -> PickleError {
    let (_, pickle) = &golden_pickles()[1];
    let at = pickle
        .windows(from.len())
        .position(|window| window == from)
        .unwrap();
    let tampered = [&pickle[..at], to, &pickle[at + from.len()..]].concat();
    read_tensors(&tampered).unwrap_err()
}

#[test]
fn code_is_named_and_not_run() {
    let system = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.";
    let error = read_tensors(system).unwrap_err();
    assert_eq!(
        error.to_string(),
        "pickle names `os.system`, which has no place in a list of tensors"
    );
    let eval = b"cbuiltins\neval\n(X\x01\0\0\x001tR.";
    assert!(matches!(
        read_tensors(eval),
        Err(PickleError::Global { .. })
    ));
    let long = [b"c", &[b'm'; 5000][..], b"\n\x1b\n."].concat();
    let shown = read_tensors(&long).unwrap_err().to_string();
    assert!(shown.len() < 200 && shown.contains("\\x1b"), "{shown}");
    // BUILD, INST, OBJ, NEWOBJ, POP, DUP, EXT1, NEXT_BUFFER.
    for opcode in [b'b', b'i', b'o', 0x81, b'0', b'2', 0x82, 0x97] {
        let error = read_tensors(&[0x80, 4, b']', opcode, b'.']).unwrap_err();
        assert_eq!(error, PickleError::Opcode { opcode, offset: 3 });
    }
}

#[test]
fn disagreements_are_refused() {
    // Rebuilding as a storage, loading from a tuple of no bytes, a class that is none.
    assert!(matches!(
        tampered(b"\x12_rebuild_tensor_v2", b"\x12_rebuild_qtensor_x"),
        PickleError::Global { .. }
    ));
    assert!(matches!(
        tampered(b"HalfStorage", b"EvilStorage"),
        PickleError::Global { .. }
    ));
    assert!(matches!(
        tampered(b"HalfStorage", b"LongStorage"),
        PickleError::Storage { .. }
    ));
    assert!(matches!(
        tampered(b"\x03\0\0\0cpu", b"\x03\0\0\0mps"),
        PickleError::Unsupported { .. }
    ));
    // NEWTRUE after little_endian becomes NEWFALSE.
    assert!(matches!(
        tampered(b"q\x02\x88", b"q\x02\x89"),
        PickleError::Storage { .. }
    ));
    // The announced and the counted number of elements.
    assert!(matches!(
        tampered(b"K\x10Nt", b"K\x11Nt"),
        PickleError::Storage { .. }
    ));
    assert!(matches!(
        tampered(b"a.\x10\0\0\0\0\0\0\0", b"a.\x0f\0\0\0\0\0\0\0"),
        PickleError::Storage { .. }
    ));
    assert!(matches!(
        tampered(b"M\xe9\x03.", b"M\xea\x03."),
        PickleError::Storage { .. }
    ));
    assert!(matches!(
        tampered(b"\x8a\x0al", b"\x8a\x0am"),
        PickleError::Malformed { .. }
    ));
    // The key in the list of keys.
    assert!(matches!(
        tampered(b"]q\0X\x0e\0\0\x009", b"]q\0X\x0e\0\0\x008"),
        PickleError::Storage { .. }
    ));
    // One element further, one dimension more, a stride more.
    assert_eq!(
        tampered(b"R\x94K\0", b"R\x94K\x01"),
        PickleError::OutOfBounds { storage_bytes: 32 }
    );
    assert_eq!(
        tampered(b"(K\x02K\x01K\x04K\x02t", b"(K\x03K\x01K\x04K\x02t"),
        PickleError::OutOfBounds { storage_bytes: 32 }
    );
    assert_eq!(
        tampered(b"(K\x08K\x08K\x02K\x01t", b"(K\x08K\x08K\x02K\x02t"),
        PickleError::OutOfBounds { storage_bytes: 32 }
    );
    assert!(matches!(
        tampered(b"(K\x08K\x08K\x02K\x01t", b"(K\x08K\x08K\x02K\x01K\x01t"),
        PickleError::Unsupported { .. }
    ));
    // Metadata, as torch writes it for a lazily conjugated tensor.
    assert!(matches!(
        tampered(b")R\x94t", b")R\x94}\x8c\x04conj\x88st"),
        PickleError::Unsupported { .. }
    ));
    // A list in a list, a number in a list, a lone tensor, a frame longer than the rest.
    assert!(matches!(
        read_tensors(b"\x80\x04]]a."),
        Err(PickleError::Malformed { .. })
    ));
    assert!(matches!(
        read_tensors(b"\x80\x04]K\x01a."),
        Err(PickleError::Malformed { .. })
    ));
    assert!(matches!(
        read_tensors(b"\x80\x04N."),
        Err(PickleError::Malformed { .. })
    ));
    assert!(matches!(
        read_tensors(b"\x80\x04\x95\x09\0\0\0\0\0\0\0]."),
        Err(PickleError::Truncated { .. })
    ));
    assert!(matches!(
        read_tensors(b"\x80\x04].\0"),
        Err(PickleError::TrailingBytes { count: 1 })
    ));
    assert!(matches!(
        read_tensors(b"\x80\x06]."),
        Err(PickleError::Protocol { version: 6 })
    ));
    assert!(matches!(
        read_tensors(b"\x80\x04]"),
        Err(PickleError::Truncated { .. })
    ));
    assert!(matches!(
        read_tensors(b"c_codecs\nencode\n."),
        Err(PickleError::TextBytes)
    ));
}

#[test]
fn a_storage_inside_a_storage_is_refused() {
    let inner = write_tensors(&[(Dtype::UInt8, &[1], b"x")]).unwrap();
    let mut outer = b"\x80\x04](\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93B".to_vec();
    outer.extend(u32::try_from(inner.len()).unwrap().to_le_bytes());
    outer.extend(&inner);
    outer.extend(b"\x85Re.");
    assert!(matches!(
        read_tensors(&outer),
        Err(PickleError::Malformed { .. })
    ));
}

#[test]
fn every_cut_of_a_pickle_is_refused() {
    for (name, pickle) in golden_pickles() {
        for end in 0..pickle.len() {
            assert!(read_tensors(&pickle[..end]).is_err(), "{name} cut at {end}");
        }
    }
}

#[test]
fn a_stride_of_zero_makes_no_tensor_larger_than_its_pickle() {
    let one = write_tensors(&[(Dtype::UInt8, &[1], b"x")]).unwrap();
    let at = one
        .windows(10)
        .position(|window| window == b"(K\x01t(K\x01t\x89\x8c")
        .unwrap();
    let expanded = |dim: u8| {
        [
            &one[..at],
            &[b'(', b'J', 0, dim, 0, 0, b't', b'(', b'K', 0, b't'],
            &one[at + 8..],
        ]
        .concat()
    };
    assert_eq!(dense(&read_tensors(&expanded(1)).unwrap()[0]), [b'x'; 256]);
    assert!(matches!(
        read_tensors(&expanded(2)),
        Err(PickleError::Expands { .. })
    ));
}

/// Elements of a strided view, one at a time, by the definition.
fn elements_by_index(
    bytes: &[u8],
    item: usize,
    offset: usize,
    shape: &[u64],
    strides: &[u64],
) -> Vec<u8> {
    let count: u64 = shape.iter().product();
    let mut out = Vec::new();
    for flat in 0..count {
        let (mut left, mut at) = (flat, offset);
        for (dim, stride) in shape.iter().zip(strides).rev() {
            at += usize::try_from(left % dim * stride).unwrap();
            left /= dim;
        }
        out.extend(&bytes[at * item..(at + 1) * item]);
    }
    out
}

/// A pickle of one view of a storage, as torch would write it.
fn pickle_of_view(
    dtype: Dtype,
    storage: &[u8],
    offset: u64,
    shape: &[u64],
    strides: &[u64],
) -> Vec<u8> {
    let count = storage.len() as u64 / dtype.item_size();
    let dense = write_tensors(&[(dtype, &[count], storage)]).unwrap();
    // The tail after the storage's bytes: TUPLE1 REDUCE, offset, shape, strides, ...
    let tail = dense
        .windows(4)
        .rposition(|window| window == b"\x85RK\0")
        .unwrap();
    let hooks = dense[tail..].iter().position(|&byte| byte == 0x89).unwrap() + tail;
    let int = |value: &u64| [b"J", &i32::try_from(*value).unwrap().to_le_bytes()[..]].concat();
    let tuple = |values: &[u64]| {
        [
            b"(",
            &values.iter().flat_map(int).collect::<Vec<_>>()[..],
            b"t",
        ]
        .concat()
    };
    [
        &dense[..tail],
        b"\x85R",
        &int(&offset),
        &tuple(shape),
        &tuple(strides),
        &dense[hooks..],
    ]
    .concat()
}

fn any_dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(Dtype::ALL)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn tensors_come_out_as_they_went_in(
        tensors in vec((any_dtype(), vec(0..5_u64, 0..5), any::<u8>()), 0..6),
    ) {
        let bytes: Vec<_> = tensors
            .iter()
            .map(|(dtype, shape, fill)| {
                let len = usize::try_from(dtype.byte_len(shape).unwrap()).unwrap();
                (0..len).map(|at| fill.wrapping_add(at.to_le_bytes()[0])).collect::<Vec<u8>>()
            })
            .collect();
        let list: Vec<_> = tensors
            .iter()
            .zip(&bytes)
            .map(|((dtype, shape, _), bytes)| (*dtype, &shape[..], &bytes[..]))
            .collect();
        let pickle = write_tensors(&list).unwrap();
        prop_assert_eq!(pickle.len(), pickle.capacity());
        let read = read_tensors(&pickle).unwrap();
        prop_assert_eq!(read.len(), list.len());
        for (tensor, (dtype, shape, bytes)) in read.iter().zip(&list) {
            prop_assert_eq!(tensor.dtype, *dtype);
            prop_assert_eq!(&*tensor.shape, *shape);
            prop_assert_eq!(tensor.contiguous(), Some(*bytes));
        }
        prop_assert_eq!(rewrite(&read), pickle);
    }

    #[test]
    fn views_are_read_in_the_order_of_their_indices(
        dtype in prop::sample::select(&[Dtype::UInt8, Dtype::Float16, Dtype::Complex128][..]),
        axes in vec((1..5_u64, 0..9_u64), 0..5),
        offset in 0..4_u64,
        spare in 0..3_u64,
    ) {
        let (shape, strides): (Vec<_>, Vec<_>) = axes.into_iter().unzip();
        let last: u64 = shape.iter().zip(&strides).map(|(dim, stride)| (dim - 1) * stride).sum();
        let item = usize::try_from(dtype.item_size()).unwrap();
        let len = usize::try_from(offset + last + 1 + spare).unwrap() * item;
        let storage: Vec<u8> = (0..len).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect();
        let pickle = pickle_of_view(dtype, &storage, offset, &shape, &strides);
        match read_tensors(&pickle) {
            Ok(tensors) => {
                let start = usize::try_from(offset).unwrap();
                let expected = elements_by_index(&storage, item, start, &shape, &strides);
                prop_assert_eq!(dense(&tensors[0]), expected.clone());
                let sizes = tensors[0].parts().map(|part| part.len() as u64);
                prop_assert_eq!(sizes.sum::<u64>(), tensors[0].byte_len());
                if let Some(slice) = tensors[0].contiguous() {
                    prop_assert_eq!(slice, &expected[..]);
                }
            }
            Err(PickleError::Expands { .. }) => {
                prop_assert!(dtype.byte_len(&shape).unwrap() > pickle.len() as u64);
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
        // One element less, and the last one is outside.
        let short = &storage[..usize::try_from(offset + last).unwrap() * item];
        let pickle = pickle_of_view(dtype, short, offset, &shape, &strides);
        let refused = matches!(
            read_tensors(&pickle),
            Err(PickleError::OutOfBounds { .. } | PickleError::Expands { .. })
        );
        prop_assert!(refused);
    }

    #[test]
    fn arbitrary_bytes_are_no_pickle(bytes in vec(any::<u8>(), 0..200)) {
        // A list of no tensors is the only pickle that short.
        prop_assert!(read_tensors(&bytes).map_or(true, |tensors| tensors.is_empty()));
    }

    #[test]
    fn arbitrary_opcodes_do_not_panic(
        opcodes in vec(prop::sample::select(&b"\x80\x95(N\x88\x89KMJ\x8a\x8cXCB\x8e]})\x85\x86\x87t\x94qrhjc\x93RQaesu.\x01\x02\x04"[..]), 0..200),
    ) {
        drop(read_tensors(&opcodes));
    }

    #[test]
    fn mutated_pickles_do_not_panic_and_what_is_read_stays_within_them(
        pickle in prop::sample::select(golden_pickles()),
        edits in vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 1..6),
    ) {
        let pickle = mutate(&pickle.1, &edits);
        for tensor in read_tensors(&pickle).unwrap_or_default() {
            let bytes = dense(&tensor);
            prop_assert_eq!(bytes.len() as u64, tensor.byte_len());
            prop_assert!(bytes.len() <= pickle.len());
        }
    }
}
