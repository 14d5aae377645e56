//! A keeper and compiler of its own, for programs that embed the sandbox and do not dispatch
//! to `keeper_main` and `compile_child_main` themselves, as tests do. The server needs no such
//! file: it is its own keeper and compiler.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next();
    if first
        .as_ref()
        .is_some_and(|first| first == stockade_sandbox::KEEPER_ARGUMENT)
    {
        return stockade_sandbox::keeper_main(arguments);
    }
    if first.is_some_and(|first| first == stockade_sandbox::COMPILE_ARGUMENT) {
        return stockade_sandbox::compile_child_main(arguments);
    }
    eprintln!("stockade-keeper is started by a server, not by hand");
    ExitCode::from(64)
}
