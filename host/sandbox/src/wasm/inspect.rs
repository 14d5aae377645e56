//! What can be told of a module's bytes before a compiler sees them.

use wasmparser::{Parser, Payload};

use super::error::WasmError;

/// The most bytes a module may have.
pub(super) const MODULE_LIMIT: u64 = 16 << 20;

/// The most bytes a module in text form may have; text is for tests and takes many times its
/// size to parse.
const TEXT_LIMIT: u64 = 1 << 20;

/// What a module may be made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModuleForm {
    /// Its size in bytes.
    pub bytes: u64,
    /// Functions it defines: tiny ones are what makes a compiler take the most memory per byte.
    pub functions: u64,
    /// Names it imports and exports; C, Rust and Go have some forty.
    pub names: u64,
}

impl Default for ModuleForm {
    fn default() -> Self {
        Self {
            bytes: MODULE_LIMIT,
            functions: 100_000,
            names: 1000,
        }
    }
}

const MAGIC: &[u8] = b"\0asm";

/// What a module is made of and what it wants of its host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModuleFacts {
    /// A component, rather than a core module.
    pub is_component: bool,
    /// Size of the binary form in bytes.
    pub bytes: u64,
    /// Functions it defines, over all modules inside it.
    pub functions: u64,
    /// Instances of core modules that a run makes: one of a core module; of a component all that are
    /// instantiated in it, those of a component inside it once.
    pub instances: u64,
    /// What it imports: of a core module the module and field, of a component the instance and
    /// an empty text.
    pub imports: Vec<(String, String)>,
    /// What it exports.
    pub exports: Vec<String>,
    /// Names imported and exported, over all modules inside it.
    pub names: u64,
}

/// Refuses what is too big to compile and what is no module; text passes unparsed.
pub(super) fn check(name: &str, bytes: &[u8], form: ModuleForm) -> Result<(), WasmError> {
    let binary = bytes.starts_with(MAGIC);
    let limit = if binary { form.bytes } else { TEXT_LIMIT };
    let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if !binary && !looks_like_text(bytes) {
        return Err(WasmError::NotAModule {
            name: name.to_owned(),
            reason: "it starts neither with \\0asm nor with a (".to_owned(),
        });
    }
    if size > limit {
        return Err(WasmError::TooLarge {
            name: name.to_owned(),
            bytes: size,
            limit,
        });
    }
    if binary {
        facts(name, bytes, form)?;
    }
    Ok(())
}

/// What a module is made of; text is turned into its binary form first, which takes memory
/// that nothing here bounds.
///
/// # Errors
/// [`WasmError`] when it is no module, or over one of the limits on its form.
pub fn inspect(name: &str, bytes: &[u8]) -> Result<ModuleFacts, WasmError> {
    let form = ModuleForm::default();
    check(name, bytes, form)?;
    let binary = wat::parse_bytes(bytes).map_err(|error| WasmError::NotAModule {
        name: name.to_owned(),
        reason: format!("text: {error}"),
    })?;
    facts(name, &binary, form)
}

fn facts(name: &str, binary: &[u8], form: ModuleForm) -> Result<ModuleFacts, WasmError> {
    let mut facts = ModuleFacts {
        bytes: u64::try_from(binary.len()).unwrap_or(u64::MAX),
        ..ModuleFacts::default()
    };
    read(binary, form.names, &mut facts).map_err(|error| WasmError::NotAModule {
        name: name.to_owned(),
        reason: error.to_string(),
    })?;
    if facts.functions > form.functions {
        return Err(WasmError::TooManyFunctions {
            name: name.to_owned(),
            functions: facts.functions,
            limit: form.functions,
        });
    }
    if facts.names > form.names {
        return Err(WasmError::TooManyNames {
            name: name.to_owned(),
            names: facts.names,
            limit: form.names,
        });
    }
    Ok(facts)
}

/// Reads the sections' heads; bodies of functions are passed over. Counts are announced and not
/// yet believed, so nothing is allocated by them, and names are only read while they are few.
fn read(binary: &[u8], most_names: u64, facts: &mut ModuleFacts) -> wasmparser::Result<()> {
    let mut depth = 0_usize;
    for payload in Parser::new(0).parse_all(binary) {
        match payload? {
            Payload::Version { encoding, .. } if depth == 0 => {
                facts.is_component = encoding == wasmparser::Encoding::Component;
                facts.instances = u64::from(!facts.is_component);
            }
            Payload::InstanceSection(section) => {
                for instance in section {
                    if let wasmparser::Instance::Instantiate { .. } = instance? {
                        facts.instances = facts.instances.saturating_add(1);
                    }
                }
            }
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::FunctionSection(section) => {
                facts.functions = facts.functions.saturating_add(section.count().into());
            }
            Payload::ImportSection(section) => {
                facts.names = facts.names.saturating_add(section.count().into());
                if depth == 0 && facts.names <= most_names {
                    for import in section.into_imports() {
                        let import = import?;
                        let path = (import.module.to_owned(), import.name.to_owned());
                        facts.imports.push(path);
                    }
                }
            }
            Payload::ExportSection(section) => {
                facts.names = facts.names.saturating_add(section.count().into());
                if depth == 0 && facts.names <= most_names {
                    for export in section {
                        facts.exports.push(export?.name.to_owned());
                    }
                }
            }
            Payload::ComponentImportSection(section) => {
                facts.names = facts.names.saturating_add(section.count().into());
                if depth == 0 && facts.names <= most_names {
                    for import in section {
                        let name = import?.name.name.to_owned();
                        facts.imports.push((name, String::new()));
                    }
                }
            }
            Payload::ComponentExportSection(section) => {
                facts.names = facts.names.saturating_add(section.count().into());
                if depth == 0 && facts.names <= most_names {
                    for export in section {
                        facts.exports.push(export?.name.name.to_owned());
                    }
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether the bytes could be the text form: UTF-8 whose first sign opens a list or a comment.
fn looks_like_text(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| text.trim_start().starts_with(['(', ';']))
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

    fn check(name: &str, bytes: &[u8]) -> Result<(), WasmError> {
        super::check(name, bytes, ModuleForm::default())
    }

    /// A module of so many functions, without their bodies.
    fn module_of(functions: u32) -> Vec<u8> {
        const FUNCTION_SECTION: u8 = 3;
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
        // Without bodies it is no module, but not for the number of its functions.
        assert!(matches!(
            check("edge", &module_of(100_000)),
            Err(WasmError::NotAModule { .. })
        ));
        let many = format!("(module {})", "(func)".repeat(100_001));
        assert!(matches!(
            inspect("many", many.as_bytes()),
            Err(WasmError::TooManyFunctions {
                functions: 100_001,
                ..
            })
        ));
    }

    #[test]
    fn refuses_by_the_header() {
        let refused = |bytes: &[u8]| check("x", bytes).unwrap_err().to_string();
        assert!(refused(b"\x7fELF....").contains("is not a WebAssembly module"));
        assert!(refused(b"\0asm").contains("unexpected end"));
        assert!(refused(b"\0asm\x02\0\0\0").contains("version"));
        assert!(
            refused(b"\0asm\x01\0\0\0\x03\xff\xff\xff\xff\x7f")
                .contains("is not a WebAssembly module")
        );
        let big = vec![b'('; usize::try_from(TEXT_LIMIT).unwrap() + 1];
        assert!(matches!(check("x", &big), Err(WasmError::TooLarge { .. })));
        assert!(check("x", b";; c\n(module)").is_ok());
    }

    #[test]
    fn every_prefix_of_a_module_is_answered() {
        let whole = module_of(7);
        for end in 0..whole.len() {
            let _ = check("prefix", &whole[..end]);
        }
    }

    #[test]
    fn imports_and_exports_are_listed() {
        let module = b"(module (import \"a\" \"b\" (func)) (import \"a\" \"c\" (memory 1)) (func (export \"_start\")))";
        let facts = inspect("x", module).unwrap();
        let pair = |module: &str, field: &str| (module.to_owned(), field.to_owned());
        assert_eq!(facts.imports, [pair("a", "b"), pair("a", "c")]);
        assert_eq!(
            (facts.exports, facts.functions),
            (vec!["_start".to_owned()], 1)
        );
        assert!(!facts.is_component);

        assert_eq!(facts.instances, 1);

        let component = b"(component (import \"wasi:cli/stdin@0.2.0\" (instance)) (core module $m (func) (func (export \"x\"))) (core instance $i (instantiate $m)) (core instance (instantiate $m)) (core instance (export \"y\" (func $i \"x\"))))";
        let facts = inspect("x", component).unwrap();
        assert_eq!(facts.instances, 2);
        assert_eq!(facts.imports, [pair("wasi:cli/stdin@0.2.0", "")]);
        assert_eq!((facts.is_component, facts.functions), (true, 2));
        assert!(facts.exports.is_empty());
    }

    #[test]
    fn names_are_counted_in_nested_modules_too() {
        let exports: String = (0..=ModuleForm::default().names)
            .map(|number| format!("(export \"e{number}\" (func 0))"))
            .collect();
        let module = format!("(module (func) {exports})");
        let component = format!("(component (core {}", &module[1..]) + ")";
        for text in [module, component] {
            let refused = inspect("many", text.as_bytes());
            assert!(
                matches!(refused, Err(WasmError::TooManyNames { names: 1001, .. })),
                "{refused:?}"
            );
        }
    }
}
