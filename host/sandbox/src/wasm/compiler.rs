//! Compiling what strangers wrote, in a process that may die of it.
//!
//! Cranelift takes minutes and gigabytes over some modules of under a megabyte, and aborts the
//! process when memory ends. So it runs in a child with hard limits, which gets the module as
//! its stdin and an open file for the artefact as its stdout, and needs nothing else.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, ExitCode, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    process::{
        Pid, PidfdFlags, Resource, Rlimit, Signal, pidfd_open, set_parent_process_death_signal,
        setpriority_process, setrlimit,
    },
};

use super::{
    engine::{GUEST_STACK, new_engine},
    error::WasmError,
    inspect,
    made::{Made, peak_of_this_process},
};

/// The first argument by which a program knows that it is to compile and nothing else.
pub const COMPILE_ARGUMENT: &str = "__compile-module";

/// What compiling one module may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompileLimits {
    /// Of the clock on the wall and of processor time, in whole seconds.
    pub time: Duration,
    /// What the compiling process may map, in bytes.
    pub memory_bytes: u64,
}

impl Default for CompileLimits {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(60),
            memory_bytes: 4 << 30,
        }
    }
}

/// The largest artefact, in bytes: some ten times the largest module.
const ARTEFACT_LIMIT: u64 = 256 << 20;

/// What is read of the child's reasons, in bytes.
const REASON_LIMIT: u64 = 2048;

/// The compile server leaves the processor to others.
const CHILD_NICE: i32 = 10;

/// The child's way of saying that the module, not the compiler, is at fault.
const REFUSED: u8 = 65;

/// The child's way of saying that it could not work.
const FAILED: u8 = 70;

/// Compiles the module on stdin to stdout, under limits; what a server's `main` calls when its
/// first argument is [`COMPILE_ARGUMENT`]. The others are the limits: seconds, and bytes of memory.
///
/// Exits with 0, with 65 when the module is refused and with 70 when compiling could not be
/// tried. On stderr is what the module is made of, or the reason.
pub fn compile_child_main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let told = |status: u8, reason: &dyn std::fmt::Display| {
        let _ = write!(io::stderr(), "{reason}");
        ExitCode::from(status)
    };
    let mut numbers = arguments.map(|argument| argument.to_str()?.parse::<u64>().ok());
    let (Some(Some(seconds)), Some(Some(memory_bytes))) = (numbers.next(), numbers.next()) else {
        return told(FAILED, &"its limits are missing");
    };
    if let Err(error) = confine(seconds, memory_bytes) {
        return told(FAILED, &error);
    }
    let mut source = Vec::new();
    if let Err(error) = io::stdin()
        .lock()
        .take(inspect::MODULE_LIMIT + 1)
        .read_to_end(&mut source)
    {
        return told(FAILED, &error);
    }
    match compile(&source) {
        Ok((artefact, mut made)) => match io::stdout()
            .lock()
            .write_all(&artefact)
            .and_then(|()| io::stdout().flush())
        {
            Ok(()) => {
                made.compile_memory_bytes = peak_of_this_process();
                told(0, &made.told())
            }
            Err(error) => told(FAILED, &error),
        },
        Err(reason) => told(REFUSED, &reason),
    }
}

/// Sets what the kernel enforces, on the calling process.
fn confine(seconds: u64, memory_bytes: u64) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    setpriority_process(None, CHILD_NICE)?;
    for (resource, limit) in [
        (Resource::As, memory_bytes),
        (Resource::Cpu, seconds),
        (Resource::Fsize, ARTEFACT_LIMIT),
        (Resource::Core, 0),
    ] {
        setrlimit(
            resource,
            Rlimit {
                current: Some(limit),
                maximum: Some(limit),
            },
        )?;
    }
    Ok(())
}

/// Text or binary to native code, and what it was made of; the reason when it is refused.
fn compile(source: &[u8]) -> Result<(Vec<u8>, Made), String> {
    let engine = new_engine(GUEST_STACK).map_err(|error| format!("{error:#}"))?;
    let binary = wat::parse_bytes(source).map_err(|error| format!("text: {error}"))?;
    // Once more, for what came as text.
    let facts = inspect::inspect("the module", &binary).map_err(|error| error.to_string())?;
    let artefact = match facts.is_component {
        true => engine.precompile_component(&binary),
        false => engine.precompile_module(&binary),
    };
    let made = Made {
        functions: facts.functions,
        names: facts.names,
        instances: facts.instances,
        ..Made::default()
    };
    Ok((artefact.map_err(|error| format!("{error:#}"))?, made))
}

/// Compiles within this process, without limits: for modules that are trusted.
pub(super) fn compile_here(
    name: &str,
    source: &[u8],
    artefact: &mut File,
) -> Result<Made, WasmError> {
    let (code, made) = compile(source).map_err(|reason| refusal(name, reason))?;
    artefact
        .write_all(&code)
        .map_err(|error| broken(name, &error))?;
    Ok(made)
}

/// Has `program` compile into `artefact`, and waits for it.
pub(super) fn compile_in_child(
    program: &Path,
    name: &str,
    source: &[u8],
    limits: CompileLimits,
    artefact: &File,
) -> Result<Made, WasmError> {
    let failed = |error: &dyn std::fmt::Display| broken(name, error);
    // Files in memory instead of pipes: nobody has to feed them, so nothing can wait for it.
    let memory_file = |purpose: &str| -> io::Result<File> {
        Ok(memfd_create(purpose, MemfdFlags::CLOEXEC)?.into())
    };
    let mut input = memory_file("module").map_err(|error| failed(&error))?;
    let mut reasons = memory_file("reasons").map_err(|error| failed(&error))?;
    let status = (|| {
        input.write_all(source)?;
        input.rewind()?;
        let child = Command::new(program)
            .arg(COMPILE_ARGUMENT)
            .arg(limits.time.as_secs().to_string())
            .arg(limits.memory_bytes.to_string())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(artefact.try_clone()?))
            .stderr(Stdio::from(reasons.try_clone()?))
            .spawn()?;
        wait(child, limits.time)
    })()
    .map_err(|error: io::Error| failed(&error))?;

    let mut reason = Vec::new();
    let _ = reasons.rewind();
    let _ = reasons.take(REASON_LIMIT).read_to_end(&mut reason);
    let reason = String::from_utf8_lossy(&reason).trim().to_owned();
    judge(name, limits, status, reason.clone())?;
    Made::from_told(&reason)
        .ok_or_else(|| broken(name, &format_args!("it says of the module: {reason}")))
}

/// Waits until the child ends or its time is over. `None`: it was killed for its time.
fn wait(mut child: std::process::Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let ended = (|| {
        let pid = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other("the compiler has no process id"))?;
        let handle = pidfd_open(pid, PidfdFlags::empty())?;
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    })();
    if !matches!(ended, Ok(true)) {
        child.kill()?;
    }
    let status = child.wait()?;
    ended.map(|in_time| in_time.then_some(status))
}

/// What the child's end says about the module.
fn judge(
    name: &str,
    limits: CompileLimits,
    status: Option<ExitStatus>,
    reason: String,
) -> Result<(), WasmError> {
    let name_of = || name.to_owned();
    let Some(status) = status else {
        return Err(WasmError::CompileTime {
            name: name_of(),
            seconds: limits.time.as_secs(),
        });
    };
    let signal = status.signal().unwrap_or_default();
    if status.success() {
        Ok(())
    } else if status.code() == Some(i32::from(REFUSED)) {
        Err(refusal(name, reason))
    } else if signal == Signal::XCPU.as_raw() || signal == Signal::KILL.as_raw() {
        Err(WasmError::CompileTime {
            name: name_of(),
            seconds: limits.time.as_secs(),
        })
    } else if signal == Signal::XFSZ.as_raw()
        || (signal == Signal::ABORT.as_raw() && reason.contains("memory allocation of"))
    {
        Err(WasmError::CompileMemory {
            name: name_of(),
            bytes: limits.memory_bytes,
        })
    } else {
        Err(broken(name, &format_args!("{status}: {reason}")))
    }
}

/// Sorts a validator's reason by what the plugin's author has to do.
fn refusal(name: &str, reason: String) -> WasmError {
    let name = name.to_owned();
    if reason.contains("threads must be enabled") || reason.contains("shared memor") {
        WasmError::Threads { name }
    } else if reason.starts_with("text:") {
        WasmError::NotAModule { name, reason }
    } else {
        WasmError::Invalid { name, reason }
    }
}

fn broken(name: &str, reason: &dyn std::fmt::Display) -> WasmError {
    WasmError::CompilerFailed {
        name: name.to_owned(),
        reason: reason.to_string(),
    }
}
