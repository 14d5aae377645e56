//! What can be told of a module's bytes before a compiler sees them.

use super::error::WasmError;

/// The most bytes a module may have.
pub(super) const MODULE_LIMIT: u64 = 16 << 20;

/// The most bytes a module in text form may have; text is for tests and takes many times its
/// size to parse.
const TEXT_LIMIT: u64 = 1 << 20;

/// The most functions a module may define: tiny functions are what makes a compiler take the
/// most memory per byte.
const FUNCTION_LIMIT: u64 = 100_000;

const MAGIC: &[u8] = b"\0asm";
const CORE_VERSION: [u8; 4] = [1, 0, 0, 0];
const FUNCTION_SECTION: u8 = 3;

/// Refuses what is too big to compile and what is no core module; text passes unparsed.
pub(super) fn inspect(name: &str, bytes: &[u8]) -> Result<(), WasmError> {
    let not_a_module = |reason: &str| WasmError::NotAModule {
        name: name.to_owned(),
        reason: reason.to_owned(),
    };
    let binary = bytes.starts_with(MAGIC);
    let limit = if binary { MODULE_LIMIT } else { TEXT_LIMIT };
    let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if !binary && !looks_like_text(bytes) {
        return Err(not_a_module("it starts neither with \\0asm nor with a ("));
    }
    if size > limit {
        return Err(WasmError::TooLarge {
            name: name.to_owned(),
            bytes: size,
            limit,
        });
    }
    if !binary {
        return Ok(());
    }
    let header = bytes
        .get(4..8)
        .ok_or_else(|| not_a_module("it ends within its header"))?;
    if header.get(2..) == Some(&[1, 0]) {
        return Err(WasmError::Component {
            name: name.to_owned(),
        });
    }
    if header != CORE_VERSION {
        return Err(not_a_module("its version is not 1"));
    }
    let functions = declared_functions(bytes.get(8..).unwrap_or_default())
        .ok_or_else(|| not_a_module("it ends within a section"))?;
    if functions > FUNCTION_LIMIT {
        return Err(WasmError::TooManyFunctions {
            name: name.to_owned(),
            functions,
            limit: FUNCTION_LIMIT,
        });
    }
    Ok(())
}

/// Whether the bytes could be the text form: UTF-8 whose first sign opens a list or a comment.
fn looks_like_text(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| text.trim_start().starts_with(['(', ';']))
}

/// Adds up the counts of all function sections; a valid module has one.
fn declared_functions(mut sections: &[u8]) -> Option<u64> {
    let mut functions = 0_u64;
    while let Some((&id, rest)) = sections.split_first() {
        let (size, rest) = leb128(rest)?;
        let (body, rest) = rest.split_at_checked(usize::try_from(size).ok()?)?;
        if id == FUNCTION_SECTION {
            functions = functions.saturating_add(leb128(body)?.0);
        }
        sections = rest;
    }
    Some(functions)
}

/// An unsigned number of up to 32 bits and what follows it.
fn leb128(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0_u64;
    for (index, &byte) in bytes.iter().enumerate().take(5) {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, bytes.get(index + 1..)?));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]

    use super::*;

    fn module_of(functions: u32) -> Vec<u8> {
        let mut bytes = b"\0asm\x01\0\0\0".to_vec();
        let mut body = Vec::new();
        let mut rest = functions;
        while rest >= 0x80 {
            body.push((rest & 0x7f) as u8 | 0x80);
            rest >>= 7;
        }
        body.push(rest as u8);
        bytes.extend([0, 2, 0, 0]);
        bytes.push(FUNCTION_SECTION);
        bytes.push(body.len() as u8);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn counts_functions_past_other_sections() {
        assert!(inspect("edge", &module_of(100_000)).is_ok());
        assert!(matches!(
            inspect("many", &module_of(100_001)),
            Err(WasmError::TooManyFunctions {
                functions: 100_001,
                ..
            })
        ));
    }

    #[test]
    fn refuses_by_the_header() {
        let refused = |bytes: &[u8]| inspect("x", bytes).unwrap_err().to_string();
        assert!(refused(b"\x7fELF....").contains("is not a WebAssembly module"));
        assert!(refused(b"\0asm").contains("ends within its header"));
        assert!(refused(b"\0asm\x0d\0\x01\0").contains("is a component"));
        assert!(refused(b"\0asm\x02\0\0\0").contains("version"));
        assert!(refused(b"\0asm\x01\0\0\0\x03\xff\xff\xff\xff\x7f").contains("within a section"));
        assert!(refused(b"\0asm\x01\0\0\0\x03\xff\xff\xff\xff\xff\xff").contains("within"));
        let big = vec![b'('; usize::try_from(TEXT_LIMIT).unwrap() + 1];
        assert!(matches!(
            inspect("x", &big),
            Err(WasmError::TooLarge { .. })
        ));
        assert!(inspect("x", b";; c\n(module)").is_ok());
    }

    #[test]
    fn every_prefix_of_a_module_is_answered() {
        let whole = module_of(7);
        for end in 0..whole.len() {
            let _ = inspect("prefix", &whole[..end]);
        }
    }
}
