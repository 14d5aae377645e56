//! Attacks with modules that are too big in some way, before they run.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{COMPILE, Proof, arena::Arena};
use crate::limit::Limit;

impl Arena<'_> {
    /// A module that is too big in one way.
    pub(super) fn module_form(&self, limit: Limit) -> Proof {
        let form = self.declared.form;
        let one_more = |limit: u64| {
            usize::try_from(limit)
                .unwrap_or(usize::MAX)
                .saturating_add(1)
        };
        let (declared, module) = match limit {
            Limit::Functions => {
                let module = module_of(one_more(form.functions), 0, &[], &[]);
                (form.functions, module)
            }
            Limit::Names => (form.names, module_of_exports(one_more(form.names))),
            _ => {
                let mut large = b"\0asm\x01\0\0\0".to_vec();
                large.resize(one_more(form.bytes), 0);
                (form.bytes, large)
            }
        };
        let refused = self.runtime.check("attacker", &module).err();
        Proof {
            what: limit.name(),
            declared: declared.to_string(),
            measured: match &refused {
                Some(error) => format!("one more: {error}"),
                None => "one more was taken".to_owned(),
            },
            holds: refused.and_then(|error| error.limit()) == Some(limit),
        }
    }

    /// A function that takes the compiler longer or more memory than it may; which of the two
    /// ends it depends on the machine.
    pub(super) async fn compile(&self) -> Proof {
        let declared = self.declared.compile;
        let bomb = compile_bomb(self.applied.bomb_depth);
        let runtime = Arc::clone(&self.runtime);
        let begun = Instant::now();
        let compiled = tokio::task::spawn_blocking(move || runtime.prepare("bomb", &bomb)).await;
        let took = begun.elapsed();
        let limit = match &compiled {
            Ok(Err(error)) => error.limit(),
            _ => None,
        };
        let measured = match compiled {
            Ok(Ok(_)) => "it was compiled".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        Proof {
            what: COMPILE,
            declared: format!("{}, {}", declared.time.as_millis(), declared.memory_bytes),
            measured: format!("{:.1} s: {measured}", took.as_secs_f64()),
            holds: matches!(limit, Some(Limit::CompileTime | Limit::CompileMemory))
                && took <= declared.time + Duration::from_secs(5),
        }
    }
}

/// A section of a module: its number, its length, its content.
fn section(id: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![id];
    number(content.len(), &mut bytes);
    bytes.extend_from_slice(content);
    bytes
}

/// An unsigned number as modules hold them.
fn number(mut value: usize, bytes: &mut Vec<u8>) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// A module whose functions all have this body, and so many local variables of 64 bits.
fn module_of(functions: usize, locals: usize, body: &[u8], exports: &[u8]) -> Vec<u8> {
    let mut module = b"\0asm\x01\0\0\0".to_vec();
    module.extend(section(1, &[1, 0x60, 0, 0]));
    let mut types = Vec::new();
    number(functions, &mut types);
    types.resize(types.len() + functions, 0);
    module.extend(section(3, &types));
    if !exports.is_empty() {
        module.extend(section(7, exports));
    }
    let mut function = vec![1];
    number(locals, &mut function);
    function.push(0x7e);
    function.extend_from_slice(body);
    function.push(0x0b);
    let mut code = Vec::new();
    number(functions, &mut code);
    for _ in 0..functions {
        number(function.len(), &mut code);
        code.extend_from_slice(&function);
    }
    module.extend(section(10, &code));
    module
}

fn module_of_exports(count: usize) -> Vec<u8> {
    let mut exports = Vec::new();
    number(count, &mut exports);
    for export in 0..count {
        let name = format!("e{export}");
        number(name.len(), &mut exports);
        exports.extend_from_slice(name.as_bytes());
        exports.extend_from_slice(&[0, 0]);
    }
    module_of(1, 0, &[], &exports)
}

/// As many loops within each other as there are local variables, all of which change in the
/// innermost and live on in every other: work and memory grow with a power of the size.
fn compile_bomb(depth: usize) -> Vec<u8> {
    let mut body = [0x03, 0x40].repeat(depth);
    for local in 0..depth {
        // local.get, i64.const 1, i64.add, local.set
        body.push(0x20);
        number(local, &mut body);
        body.extend_from_slice(&[0x42, 1, 0x7c, 0x21]);
        number(local, &mut body);
    }
    for level in 0..depth {
        // local.get 0, i32.wrap_i64, br_if
        body.extend_from_slice(&[0x20, 0, 0xa7, 0x0d]);
        number(level, &mut body);
    }
    body.resize(body.len() + depth, 0x0b);
    let start = [b"\x01\x06_start".as_slice(), &[0, 0]].concat();
    module_of(1, depth, &body, &start)
}
