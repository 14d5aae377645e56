//! What a compiled module wants of its host: refused where it does not fit, linked where it does.

use wasmtime::{Engine, Linker, UnknownImportError, component};
use wasmtime_wasi::p2::bindings::CommandPre;

use super::{
    artefact::Compiled,
    error::WasmError,
    guest::{self, Code, GuestState},
};
use crate::host_api;

/// What is there to be imported.
pub(super) struct Linkers {
    modules: Linker<GuestState>,
    components: component::Linker<GuestState>,
}

impl Linkers {
    pub(super) fn new(engine: &Engine) -> wasmtime::Result<Self> {
        Ok(Self {
            modules: guest::new_linker(engine)?,
            components: guest::new_component_linker(engine)?,
        })
    }

    /// Refuses what does not fit the sandbox, and links the rest.
    pub(super) fn link(&self, name: &str, compiled: &Compiled) -> Result<Code, WasmError> {
        match compiled {
            Compiled::Module(module) => {
                let imports = module.imports();
                let imports = imports.map(|import| (import.module(), import.name()));
                host_api::check_imports(name, imports)?;
                let start = module.get_export("_start");
                let has_start = start
                    .and_then(|it| it.func().map(|f| f.params().len() + f.results().len()))
                    .is_some_and(|values| values == 0);
                let is_reactor = !has_start && has_handler(name, module)?;
                let instance = self
                    .modules
                    .instantiate_pre(module)
                    .map_err(|error| import_error(name, &error))?;
                match (has_start, is_reactor) {
                    (true, _) => Some(Code::Module(instance)),
                    (false, true) => Some(Code::Reactor(instance)),
                    (false, false) => None,
                }
            }
            Compiled::Component(component) => {
                let instance = self
                    .components
                    .instantiate_pre(component)
                    .map_err(|error| component_import_error(name, &error))?;
                CommandPre::new(instance).ok().map(Code::Component)
            }
        }
        .ok_or_else(|| WasmError::NoStart {
            name: name.to_owned(),
        })
    }
}

/// Whether a module exports handlers, which must have their type.
fn has_handler(name: &str, module: &wasmtime::Module) -> Result<bool, WasmError> {
    let mut has_any = false;
    for handler in host_api::Handler::ALL {
        let Some(export) = module.get_export(handler.export()) else {
            continue;
        };
        let is_handler = export.func().is_some_and(|function| {
            let is_i32 = |it: wasmtime::ValType| it.is_i32();
            function.params().len() == 1
                && function.results().len() == 1
                && function.params().all(is_i32)
                && function.results().all(is_i32)
        });
        if !is_handler {
            return Err(WasmError::HandlerType {
                name: name.to_owned(),
                handler: handler.export(),
            });
        }
        has_any = true;
    }
    Ok(has_any)
}

fn import_error(name: &str, error: &wasmtime::Error) -> WasmError {
    let name = name.to_owned();
    match error.downcast_ref::<UnknownImportError>() {
        Some(import) => WasmError::NotGranted {
            name,
            module: import.module().to_owned(),
            field: import.name().to_owned(),
        },
        None => WasmError::ImportType {
            name,
            reason: format!("{error:#}"),
        },
    }
}

/// The linker of components names a missing import in its text alone.
fn component_import_error(name: &str, error: &wasmtime::Error) -> WasmError {
    let reason = format!("{error:#}");
    let missing = reason
        .contains("was not found in the linker")
        .then(|| reason.split('`').nth(1))
        .flatten();
    match missing {
        Some(instance) => WasmError::NotGranted {
            name: name.to_owned(),
            module: instance.to_owned(),
            field: "*".to_owned(),
        },
        None => WasmError::ImportType {
            name: name.to_owned(),
            reason,
        },
    }
}
