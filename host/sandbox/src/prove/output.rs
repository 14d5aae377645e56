//! Attacks on the log.

use super::{
    Proof, ProveError,
    arena::{Arena, Attack, WINDOW, at_most},
};
use crate::{limit::Limit, wasm::WasmLimits};

impl Arena<'_> {
    async fn flood(&self, text: &str) -> Result<Attack, ProveError> {
        let limits = WasmLimits {
            run_time: None,
            ..self.unhurried()
        };
        self.attack(text, limits, WINDOW).await
    }

    pub(super) async fn log_lines(&self) -> Result<Proof, ProveError> {
        let flood = include_str!("../../../../tests/guests/log_flood.wat");
        let attack = self.flood(flood).await?;
        let declared = self.declared.log.lines_per_second;
        let rate = rate(&attack, attack.log.counts().lines, declared);
        Ok(at_most(Limit::LogLines.name(), declared.into(), rate))
    }

    pub(super) async fn log_bytes(&self) -> Result<Proof, ProveError> {
        let flood = include_str!("../../../../tests/guests/log_flood.wat");
        let attack = self.flood(flood).await?;
        let declared = self.declared.log.bytes_per_second;
        let rate = rate(&attack, attack.log.counts().bytes, declared);
        // A write is taken whole, and the last one may be 64 KiB.
        let most = u64::from(declared) + (64 << 10);
        Ok(at_most(Limit::LogBytes.name(), most, rate))
    }

    pub(super) async fn log_line(&self) -> Result<Proof, ProveError> {
        let endless = include_str!("../../../../tests/guests/endless_line.wat");
        let attack = self.flood(endless).await?;
        let lines = attack.log.tail(usize::MAX);
        let longest = lines.iter().map(|line| line.text.len() as u64).max();
        // With the mark that says how much was cut.
        let most = u64::from(self.declared.log.line_bytes) + 64;
        let mut proof = at_most(
            Limit::LogLineBytes.name(),
            most,
            longest.unwrap_or_default(),
        );
        // A line so long that even the end of the log did not keep it.
        proof.holds &= longest.is_some();
        Ok(proof)
    }
}

/// What came a second, beyond the two seconds' worth that may come at once.
fn rate(attack: &Attack, count: u64, per_second: u32) -> u64 {
    let beyond = (count as f64 - 2.0 * f64::from(per_second)).max(0.0);
    (beyond / attack.took.as_secs_f64()) as u64
}
