//! Decodes requests given as lines of hexadecimal frames, for captures and comparisons.
//!
//! Each line is the frames after the peer's identity, separated by blanks, an empty one as
//! `-`. The answer is one line: `ok` and the request, or the reason label and the error.
//! `tests/lmcache_differential.py` compares the answers with LMCache's own.

use std::io::{self, BufRead, Write};

use bytes::Bytes;
use stockade_wire::{Limits, decode};

fn main() -> io::Result<()> {
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let line = line?;
        let Some(frames) = line
            .split_whitespace()
            .map(unhex)
            .collect::<Option<Vec<_>>>()
        else {
            writeln!(output, "not_hex")?;
            continue;
        };
        match decode(frames, &Limits::default()) {
            Ok((_, request)) => writeln!(output, "ok {request:?}")?,
            Err(rejected) => writeln!(output, "{} {rejected}", rejected.error.reason())?,
        }
        output.flush()?;
    }
    Ok(())
}

fn unhex(frame: &str) -> Option<Bytes> {
    if frame == "-" {
        return Some(Bytes::new());
    }
    let digits = frame.chars().map(|digit| digit.to_digit(16));
    let digits = digits.collect::<Option<Vec<u32>>>()?;
    let bytes = digits.chunks(2).map(|pair| match *pair {
        [high, low] => u8::try_from(high << 4 | low).ok(),
        _ => None,
    });
    bytes.collect::<Option<Vec<u8>>>().map(Bytes::from)
}
