//! The `stockade` binary: arguments -> configuration -> log -> server -> exit code.
#![forbid(unsafe_code)]

use std::{ffi::OsString, io::Write as _, process::ExitCode};

use stockade::{cli::Command, config::Config, server::Server, telemetry, tenancy::give_way_to_all};
use tokio::signal::unix::{SignalKind, signal};

/// Gives memory back to the system after a burst of large requests; with glibc's allocator
/// each thread keeps what it has used.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The command was understood and could not be done.
const EX_FAILURE: u8 = 1;
/// Wrong flags or file, as in sysexits.h.
const EX_USAGE: u8 = 64;
/// Something that the server needs cannot be had, as in sysexits.h.
const EX_UNAVAILABLE: u8 = 69;
/// Most threads that requests run on; the data path is memory bound beyond it.
const MAX_WORKER_THREADS: usize = 8;
/// Threads for large requests and file access.
const BLOCKING_THREADS: usize = 16;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_else(|| OsString::from("stockade"));
    let mut args = args.peekable();
    // The server is its own keeper and compiler; both are processes that must stay small.
    if args
        .peek()
        .is_some_and(|first| first == stockade_sandbox::KEEPER_ARGUMENT)
    {
        return stockade_sandbox::keeper_main(args.skip(1));
    }
    if args
        .peek()
        .is_some_and(|first| first == stockade_sandbox::COMPILE_ARGUMENT)
    {
        return stockade_sandbox::compile_child_main(args.skip(1));
    }
    match Command::parse(std::iter::once(program).chain(args)) {
        Ok(Command::Serve(config, warnings)) => serve(*config, &warnings),
        Ok(Command::Print(text)) => {
            // Whoever closed our stdout does not want the text.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Ok(Command::Tool(tool)) => finish(tool.run()),
        Err(error) => fail(EX_USAGE, &error),
    }
}

/// Ends a command that is not the server.
fn finish(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(EX_FAILURE, &format_args!("{error:#}")),
    }
}

fn serve(config: Config, warnings: &[String]) -> ExitCode {
    let (log, _flush) = match telemetry::init(config.log_level, config.log_format) {
        Ok(started) => started,
        Err(error) => return fail(EX_UNAVAILABLE, &error),
    };
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    raise_open_files();
    let threads = std::thread::available_parallelism()
        .map_or(2, |cores| cores.get().clamp(2, MAX_WORKER_THREADS));
    let runtime = || {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.max_blocking_threads(BLOCKING_THREADS).enable_all();
        runtime
    };
    let main = runtime()
        .worker_threads(threads)
        .thread_name("stockade")
        .build();
    // One thread fewer, so that floods never have a thread on every core.
    let yielding = runtime()
        .worker_threads(threads - 1)
        .thread_name("stockade yields")
        .on_thread_start(give_way_to_all)
        .build();
    let (runtime, yielding) = match (main, yielding) {
        (Ok(main), Ok(yielding)) => (main, yielding),
        (Err(error), _) | (_, Err(error)) => return fail(EX_UNAVAILABLE, &error),
    };
    let floods = yielding.handle().clone();
    let result = runtime.block_on(async {
        // Before anything is started, so that an early signal finds its handler.
        let (mut interrupt, mut terminate) = (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        );
        let server = Server::prepare(config, log).await?;
        server
            .run(floods, async move {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
            })
            .await
    });
    // What still blocks, such as a read from a hanging file system, does not keep us.
    runtime.shutdown_background();
    yielding.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(EX_UNAVAILABLE, &format_args!("{error:#}")),
    }
}

/// Connections are descriptors, and the usual soft limit of 1024 is for programs that `select`.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if setrlimit(Resource::Nofile, raised).is_err() {
        tracing::warn!(
            "the limit on open files could not be raised from {:?}",
            limit.current
        );
    }
}

fn fail(code: u8, error: &dyn std::fmt::Display) -> ExitCode {
    // Whoever closed our stderr does not want the sentence.
    let _ = writeln!(std::io::stderr(), "stockade: {error}");
    ExitCode::from(code)
}
