//! The one place that maps native code: compiled modules, back from the cache.
#![allow(
    unsafe_code,
    reason = "mapping compiled code is what cannot be checked by the compiler"
)]

use std::fs::File;

use wasmtime::{Engine, Module};

/// A file of the cache that passed the checks of `Cache::open`.
pub(super) struct CheckedArtefact {
    /// Open for reading; what is mapped is this file, whatever its name leads to by now.
    pub(super) file: File,
}

/// Maps compiled code.
pub(super) fn load(engine: &Engine, artefact: CheckedArtefact) -> wasmtime::Result<Module> {
    // SAFETY: the file was written by our own compiler process, under a name that holds the
    // digest of its source and our compiler's settings, into a directory that only our user can
    // write (checked on the open directory); the open file is a regular one of our user that
    // nobody else can write, and its bytes have the digest noted when it was written. The cache
    // replaces files by renaming and never writes into one that has its final name.
    unsafe { Module::deserialize_open_file(engine, artefact.file) }
}
