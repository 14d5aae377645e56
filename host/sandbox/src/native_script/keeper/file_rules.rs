//! Which files a script may open, run and change (Landlock).

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};

use crate::native_script::confinement::{Confinement, Granted, Protection};

/// What the rules are written for; an older kernel applies what it knows.
const FILES: ABI = ABI::V5;
const SCOPES: ABI = ABI::V6;

/// Devices that hold nothing.
const DEVICES: [&str; 3] = ["/dev/null", "/dev/zero", "/dev/full"];
const RANDOM: [&str; 2] = ["/dev/random", "/dev/urandom"];

/// Restricts this thread, and what it becomes and starts, to the files of `confinement`, and
/// notes in `granted` what the kernel applied. Paths that do not exist are passed over.
pub(super) fn apply(confinement: &Confinement, granted: &mut Granted) {
    let outcome = restrict(confinement).map_err(|error| error.to_string());
    let (files, signals) = match outcome {
        Ok(kernel) => kernel,
        Err(reason) => (Err(reason.clone()), Err(reason)),
    };
    granted.note(Protection::Landlock, files);
    granted.note(Protection::SignalScope, signals);
}

type Outcome = Result<(), String>;

/// What holds of the file rules and of the scope of signals.
fn restrict(confinement: &Confinement) -> Result<(Outcome, Outcome), RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let execute = read | AccessFs::Execute;
    // What a script wrote it may not execute, and it has no business with devices.
    let change = AccessFs::from_all(FILES)
        & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev);
    let device = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(FILES))?
        .scope(Scope::from_all(SCOPES))?
        .create()?
        .add_rules(path_beneath_rules(&confinement.executable, execute))?
        .add_rules(path_beneath_rules(&confinement.readable, read))?
        .add_rules(path_beneath_rules(&confinement.writable, change))?
        .add_rules(path_beneath_rules(DEVICES, device))?
        .add_rules(path_beneath_rules(RANDOM, read))?
        .restrict_self()?;
    let absent = match status.landlock {
        LandlockStatus::NotImplemented => "the kernel has no Landlock, or the container forbids it",
        _ => "Landlock is built into the kernel and not enabled (lsm=landlock)",
    };
    let kernel = match (&status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) => None,
        (_, LandlockStatus::Available { effective_abi, .. }) => Some(effective_abi),
        _ => None,
    };
    let files = kernel.map(drop).ok_or_else(|| absent.to_owned());
    let signals = match kernel {
        Some(abi) if abi >= SCOPES => Ok(()),
        Some(_) => Err("the kernel's Landlock is older than Linux 6.12".to_owned()),
        None => Err(absent.to_owned()),
    };
    Ok((files, signals))
}
