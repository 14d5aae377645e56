//! What a plugin prints: nothing panics, lines are bounded and cannot forge others, nothing is
//! lost uncounted, and the pieces in which bytes come change nothing.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use stockade_fuzz as _;
use stockade_sandbox::{LogCounts, LogLimits, LogStream, OutputStream};

/// No line of an input is dropped for coming too fast.
const LIMITS: LogLimits = LogLimits {
    lines_per_second: u32::MAX,
    bytes_per_second: u32::MAX,
    line_bytes: MAX_LINE_BYTES,
};
/// Where lines are cut: much earlier than by default, so that short inputs reach it.
const MAX_LINE_BYTES: u32 = 64;
/// The longest escape of one byte, and what is said about a cut line.
const LINE_BYTES: usize = MAX_LINE_BYTES as usize * 6 + 100;

fn lines(bytes: &[u8], piece: usize) -> (Vec<(OutputStream, Arc<str>)>, LogCounts) {
    let stream = LogStream::new(Arc::from("fuzz"), LIMITS);
    for piece in bytes.chunks(piece) {
        stream.push(OutputStream::Stdout, piece);
    }
    stream.finish();
    let tail = stream.tail(usize::MAX);
    let lines = tail.into_iter().map(|line| (line.stream, line.text));
    (lines.collect(), stream.counts())
}

fuzz_target!(|input: &[u8]| {
    let Some((&choice, bytes)) = input.split_first() else {
        return;
    };
    // Repeated, so that short inputs make lines that are too long.
    let bytes = &bytes.repeat(1 + usize::from(choice >> 5));
    let (whole, counts) = lines(bytes, usize::MAX);
    assert_eq!(counts.bytes, bytes.len() as u64);
    let ends = bytes.iter().filter(|&&byte| byte == b'\n').count();
    let has_rest = bytes.last().is_some_and(|&byte| byte != b'\n');
    let expected = (ends + usize::from(has_rest)) as u64;
    assert_eq!((counts.lines, counts.dropped_lines), (expected, 0));
    for (_, text) in &whole {
        assert!(text.len() <= LINE_BYTES, "{}", text.len());
        let is_safe = |character: char| !character.is_control() || character == '\t';
        assert!(text.chars().all(is_safe), "{text:?}");
    }
    let pieces = lines(bytes, 1 + usize::from(choice & 31) * 7);
    assert_eq!((whole, counts), pieces);
});
