//! `prove` is green where every limit holds, and red where any single one does not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::time::Duration;

use stockade_sandbox::{
    Access, Compiler, Manifest,
    prove::{Held, Proof, prove},
};

/// A plugin with every grant and tight limits, so that attacks are over soon.
fn held() -> Held {
    let manifest = Manifest::default();
    let mut held = Held::new(&manifest, Default::default());
    held.limits.memory_bytes = 8 << 20;
    held.limits.table_elements = 10_000;
    held.limits.cpu_percent = 1;
    held.limits.cpu_burst = Duration::from_millis(20);
    held.limits.start_time = Duration::from_millis(200);
    held.limits.run_time = Some(Duration::from_millis(2000));
    held.limits.host_call_time = Duration::from_millis(200);
    held.limits.environment_bytes = 4 << 10;
    held.limits.open_files = 4;
    held.limits.directory_bytes = 256 << 10;
    held.log.lines_per_second = 10;
    held.log.bytes_per_second = 64 << 10;
    held.form.functions = 1000;
    held.form.names = 100;
    held.form.bytes = 4 << 20;
    held.compile.time = Duration::from_secs(1);
    held.compile.memory_bytes = 1 << 30;
    held.bomb_depth = 180;
    held.directories = Some(Access::ReadWrite);
    held.environment = vec![("GRANTED".to_owned(), "yes".to_owned())];
    held
}

async fn proofs(declared: &Held, applied: &Held, only: Option<&str>) -> Vec<Proof> {
    let scratch = tempfile::tempdir().unwrap();
    let compiler = Compiler::Child {
        program: env!("CARGO_BIN_EXE_stockade-keeper").into(),
    };
    let proven = prove(declared, applied, compiler, scratch.path(), only, |_| {}).await;
    proven.unwrap()
}

fn failed(proofs: &[Proof]) -> Vec<&'static str> {
    let failed = proofs.iter().filter(|proof| !proof.holds);
    failed.map(|proof| proof.what).collect()
}

#[tokio::test]
async fn every_limit_holds_where_it_is_applied() {
    let proofs = proofs(&held(), &held(), None).await;
    assert!(failed(&proofs).is_empty(), "{proofs:#?}");
    assert!(proofs.len() >= 25, "{}", proofs.len());
}

/// Each limiter is lifted once, and its own attack is the one that says so.
#[tokio::test]
async fn a_limit_that_is_not_applied_is_found() {
    type Lift = fn(&mut Held);
    let lifts: [(&str, Lift); 18] = [
        ("memory_bytes", |it| it.limits.memory_bytes = 64 << 20),
        ("memory_bytes over three memories", |it| {
            it.limits.memory_bytes = 64 << 20
        }),
        ("table_elements", |it| it.limits.table_elements = 1_000_000),
        ("cpu_percent", |it| it.limits.cpu_percent = 100),
        ("cpu_burst_ms", |it| {
            it.limits.cpu_burst = Duration::from_secs(10)
        }),
        ("start_ms", |it| {
            it.limits.start_time = Duration::from_secs(600)
        }),
        ("run_ms", |it| it.limits.run_time = None),
        ("host_call_ms", |it| {
            it.limits.host_call_time = Duration::from_secs(600)
        }),
        ("environment_bytes", |it| {
            it.limits.environment_bytes = 1 << 30
        }),
        ("environment", |it| {
            it.environment.push(("SECRET".to_owned(), "1".to_owned()))
        }),
        ("open_files", |it| it.limits.open_files = 100),
        ("directory_bytes", |it| it.limits.directory_bytes = 4 << 20),
        ("log_lines_per_second", |it| {
            it.log.lines_per_second = 1_000_000
        }),
        ("log_bytes_per_second", |it| {
            it.log.bytes_per_second = 64 << 20
        }),
        ("module_bytes", |it| it.form.bytes = 1 << 30),
        ("module_functions", |it| it.form.functions = 1 << 30),
        ("module_names", |it| it.form.names = 1 << 30),
        ("compile_ms, compile_memory_bytes", |it| {
            it.compile.time = Duration::from_secs(600);
            it.compile.memory_bytes = 16 << 30;
        }),
    ];
    // Three at a time: most of the time of an attack is waiting, and none needs much of a core.
    for some in lifts.chunks(3) {
        let runs = some.iter().map(|&(what, lift)| {
            tokio::spawn(async move {
                let mut applied = held();
                lift(&mut applied);
                // Beside builds and other tests, an attack may get too little of a processor to
                // take more than it should.
                let mut found = Vec::new();
                for _attempt in 0..5 {
                    found = proofs(&held(), &applied, Some(what)).await;
                    if failed(&found).contains(&what) {
                        break;
                    }
                }
                (what, found)
            })
        });
        for run in runs.collect::<Vec<_>>() {
            let (what, proofs) = run.await.unwrap();
            assert!(failed(&proofs).contains(&what), "{what}: {proofs:#?}");
        }
    }
}

/// A grant that was never given is one, too.
#[tokio::test]
async fn a_directory_that_was_not_granted_is_found() {
    let mut declared = held();
    declared.directories = None;
    let proofs = proofs(&declared, &held(), Some("directories")).await;
    assert!(failed(&proofs).contains(&"directories"), "{proofs:#?}");
}
