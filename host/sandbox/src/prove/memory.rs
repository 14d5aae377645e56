//! Attacks on what a guest keeps in memory.

use super::{
    MEMORIES, Proof, ProveError,
    arena::{Arena, PATIENCE, at_most},
};
use crate::{limit::Limit, wasm::WasmLimits};

impl Arena<'_> {
    pub(super) async fn memory(&self) -> Result<Proof, ProveError> {
        let attack = self
            .attack(
                include_str!("../../../../tests/guests/memory_hog.wat"),
                self.unhurried(),
                PATIENCE,
            )
            .await?;
        Ok(at_most(
            Limit::Memory.name(),
            self.declared.limits.memory_bytes,
            attack.usage.peak_memory_bytes,
        ))
    }

    pub(super) async fn memories(&self) -> Result<Proof, ProveError> {
        let hog = include_str!("../../../../tests/guests/memory_hog_over_memories.wat");
        let attack = self.attack(hog, self.unhurried(), PATIENCE).await?;
        Ok(at_most(
            MEMORIES,
            self.declared.limits.memory_bytes,
            attack.usage.peak_memory_bytes,
        ))
    }

    pub(super) async fn table_elements(&self) -> Result<Proof, ProveError> {
        let hog = include_str!("../../../../tests/guests/table_hog.wat");
        let attack = self.attack(hog, self.unhurried(), PATIENCE).await?;
        Ok(at_most(
            Limit::TableElements.name(),
            self.declared.limits.table_elements,
            attack.usage.peak_table_elements,
        ))
    }

    pub(super) async fn tables(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.limits.tables;
        let tables = "(table 0 funcref)".repeat(declared + 1);
        let hog =
            format!("(module (memory (export \"memory\") 1) {tables} (func (export \"_start\")))");
        self.one_more(Limit::Tables, declared, &hog, self.unhurried())
            .await
    }

    /// A module has one memory, so this is a component of many.
    pub(super) async fn memory_count(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.limits.memories;
        let limits = WasmLimits {
            // Each of them comes with an instance, which is not what is attacked.
            instances: usize::MAX,
            ..self.unhurried()
        };
        let hog = component_of("(memory 1)", declared + 1);
        self.one_more(Limit::Memories, declared, &hog, limits).await
    }

    pub(super) async fn instances(&self) -> Result<Proof, ProveError> {
        // The program itself is one, too.
        let declared = self.declared.limits.instances;
        let hog = component_of("", declared);
        self.one_more(Limit::Instances, declared, &hog, self.unhurried())
            .await
    }

    /// Runs what has one more than it may.
    async fn one_more(
        &self,
        limit: Limit,
        declared: usize,
        hog: &str,
        limits: WasmLimits,
    ) -> Result<Proof, ProveError> {
        let attack = self.attack(hog, limits, PATIENCE).await?;
        Ok(Proof {
            what: limit.name(),
            declared: declared.to_string(),
            measured: format!("one more: {}", attack.end()),
            holds: attack.usage.hits.of(limit) == 1 && attack.exit_code().is_none(),
        })
    }

    /// Calls itself so often that any frames, however small, fill the stack.
    pub(super) async fn stack(&self) -> Result<Proof, ProveError> {
        /// A return address and a frame pointer.
        const SMALLEST_FRAME: usize = 16;
        let declared = self.declared.stack_bytes;
        let depth = declared / SMALLEST_FRAME + 1;
        let hog = format!(
            "(module
              (memory (export \"memory\") 1)
              (func $deeper (param i32) (result i32)
                (if (i32.eqz (local.get 0)) (then (return (i32.const 0))))
                (i32.add (call $deeper (i32.sub (local.get 0) (i32.const 1))) (local.get 0)))
              (func (export \"_start\") (drop (call $deeper (i32.const {depth})))))"
        );
        let attack = self.attack(&hog, self.unhurried(), PATIENCE).await?;
        Ok(Proof {
            what: Limit::Stack.name(),
            declared: declared.to_string(),
            measured: format!("{depth} calls deep: {}", attack.end()),
            holds: attack.usage.hits.of(Limit::Stack) == 1,
        })
    }
}

/// A command with so many instances of a module beside its own.
fn component_of(content: &str, count: usize) -> String {
    let instances = "(core instance (instantiate $part))".repeat(count);
    format!(
        "(component
          (core module $part {content})
          {instances}
          (core module $program (func (export \"run\") (result i32) (i32.const 0)))
          (core instance $program (instantiate $program))
          (func $run (result (result)) (canon lift (core func $program \"run\")))
          (instance $command (export \"run\" (func $run)))
          (export \"wasi:cli/run@0.2.0\" (instance $command)))"
    )
}
