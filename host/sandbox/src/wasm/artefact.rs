//! The one place that maps native code: compiled modules, back from the cache.
#![allow(
    unsafe_code,
    reason = "mapping compiled code is what cannot be checked by the compiler"
)]

use std::{fs::File, os::fd::AsRawFd as _};

use wasmtime::{Engine, Module, Precompiled, component::Component};

/// A file of the cache that passed the checks of `Cache::open`.
pub(super) struct CheckedArtefact {
    /// Open for reading; what is mapped is this file, whatever its name leads to by now.
    pub(super) file: File,
}

/// Compiled code that is mapped.
pub(super) enum Compiled {
    /// Of a core module.
    Module(Module),
    /// Of a component.
    Component(Component),
}

/// Maps compiled code.
pub(super) fn load(engine: &Engine, artefact: CheckedArtefact) -> wasmtime::Result<Compiled> {
    // The open file again, by the only kind of name that cannot lead elsewhere.
    let path = format!("/proc/self/fd/{}", artefact.file.as_raw_fd());
    match Engine::detect_precompiled_file(&path)? {
        Some(Precompiled::Component) => {
            // SAFETY: as below; `path` names the checked file, which is open until the end.
            unsafe { Component::deserialize_file(engine, &path) }.map(Compiled::Component)
        }
        _ => {
            // SAFETY: the file was written by our own compiler process, under a name that holds
            // the digest of its source and our compiler's settings, into a directory that only
            // our user can write (checked on the open directory); the open file is a regular one
            // of our user that nobody else can write, and its bytes have the digest noted when
            // it was written. The cache replaces files by renaming and never writes into one
            // that has its final name.
            unsafe { Module::deserialize_open_file(engine, artefact.file) }.map(Compiled::Module)
        }
    }
}
