//! Attacks on what a guest may reach: its environment, the file system, the network.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    DIRECTORIES, ENVIRONMENT, LINKS, NETWORK, Proof, ProveError,
    arena::{Arena, PATIENCE, Silence, at_most},
};
use crate::{
    grants::Access,
    limit::Limit,
    wasm::{Directory, Launch},
};

/// What lies where no grant leads.
const SECRET: &str = "5b1d3c";

impl Arena<'_> {
    pub(super) async fn environment_size(&self) -> Result<Proof, ProveError> {
        let declared = self.declared.limits.environment_bytes;
        let bytes = usize::try_from(declared)
            .unwrap_or(usize::MAX)
            .saturating_add(1);
        let launch = Launch {
            environment: vec![("A".to_owned(), "x".repeat(bytes))],
            limits: self.unhurried(),
            ..Launch::new(Arc::new(Silence))
        };
        let attack = self
            .launch(
                include_str!("../../../../tests/guests/hello.wat"),
                launch,
                PATIENCE,
            )
            .await?;
        Ok(Proof {
            what: Limit::Environment.name(),
            declared: declared.to_string(),
            measured: format!("with a little more: {}", attack.end()),
            holds: attack.usage.hits.of(Limit::Environment) == 1,
        })
    }

    pub(super) async fn environment(&self) -> Result<Proof, ProveError> {
        let launch = Launch {
            environment: self.applied.environment.clone(),
            limits: self.unhurried(),
            ..Launch::new(Arc::new(Silence))
        };
        let probe = include_str!("../../../../tests/guests/print_environ.wat");
        let attack = self.launch(probe, launch, PATIENCE).await?;
        let seen: Vec<String> = attack
            .text()
            .lines()
            .filter_map(|line| line.split_once('=').map(|(name, _)| name.to_owned()))
            .collect();
        let granted: Vec<&str> = self
            .declared
            .environment
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        Ok(Proof {
            what: ENVIRONMENT,
            declared: format!("{granted:?}"),
            measured: format!("{seen:?}"),
            holds: seen.iter().all(|name| granted.contains(&name.as_str())),
        })
    }

    /// Without a grant of directories, there is none; with one, that is all there is.
    pub(super) async fn no_directory(&self) -> Result<Proof, ProveError> {
        // Exits with how many directories there are.
        let probe = r#"(module
            (import "wasi_snapshot_preview1" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
            (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (memory (export "memory") 1)
            (func (export "_start") (local $fd i32) (local $count i32)
              (loop $next
                (local.set $count (i32.add (local.get $count)
                  (i32.eqz (call $prestat (local.get $fd) (i32.const 0)))))
                (br_if $next (i32.lt_u (local.tee $fd (i32.add (local.get $fd) (i32.const 1))) (i32.const 256))))
              (call $exit (local.get $count))))"#;
        let (launch, _) = self.with_directory("count")?;
        let attack = self.launch(probe, launch, PATIENCE).await?;
        let declared = i32::from(self.declared.directories.is_some());
        Ok(Proof {
            what: DIRECTORIES,
            declared: declared.to_string(),
            measured: attack
                .exit_code()
                .map_or_else(|| attack.end(), |count| count.to_string()),
            holds: attack.exit_code().is_some_and(|count| count <= declared),
        })
    }

    /// A run with a fresh directory like the plugin's own, if it has any.
    fn with_directory(&self, name: &str) -> Result<(Launch, PathBuf), ProveError> {
        let path = self.scratch.join(name);
        fs::create_dir_all(&path)?;
        let directories = self.applied.directories.map(|access| Directory {
            guest: "/granted".to_owned(),
            host: path.clone(),
            access,
        });
        let launch = Launch {
            directories: directories.into_iter().collect(),
            limits: self.unhurried(),
            ..Launch::new(Arc::new(Silence))
        };
        Ok((launch, path))
    }

    pub(super) async fn escape(&self) -> Result<Proof, ProveError> {
        let secret = self.scratch.join("secret");
        fs::write(&secret, SECRET)?;
        let mut leaks = 0;
        let mut tried = 0;
        for target in [secret.as_path(), Path::new("../secret")] {
            let (launch, path) = self.with_directory("escape")?;
            let link = path.join("note");
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink(target, &link)?;
            let read = include_str!("../../../../tests/guests/read_note.wat");
            let attack = self.launch(read, launch, PATIENCE).await?;
            tried += 1;
            leaks += usize::from(attack.text().contains(SECRET) || attack.exit_code() == Some(0));
        }
        let (launch, path) = self.with_directory("link")?;
        let make = include_str!("../../../../tests/guests/symlink_escape.wat");
        self.launch(make, launch, PATIENCE).await?;
        tried += 1;
        leaks += usize::from(fs::symlink_metadata(path.join("note")).is_ok());
        Ok(Proof {
            what: LINKS,
            declared: "not followed, not made".to_owned(),
            measured: format!("{leaks} of {tried} ways lead out"),
            holds: leaks == 0,
        })
    }

    pub(super) async fn open_files(&self) -> Result<Proof, ProveError> {
        let (launch, _) = self.with_directory("open")?;
        let hog = include_str!("../../../../tests/guests/open_files_hog.wat");
        let attack = self.launch(hog, launch, PATIENCE).await?;
        Ok(at_most(
            Limit::OpenFiles.name(),
            self.declared.limits.open_files.into(),
            attack.usage.peak_open_files,
        ))
    }

    pub(super) async fn host_call_time(&self) -> Result<Proof, ProveError> {
        let (launch, path) = self.with_directory("hang")?;
        let pipe = path.join("note");
        let _ = fs::remove_file(&pipe);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0)
            .map_err(std::io::Error::from)?;
        let declared = self.declared.limits.host_call_time;
        let slack = Duration::from_secs(1);
        let read = include_str!("../../../../tests/guests/read_note.wat");
        let attack = self.launch(read, launch, declared + slack * 2).await;
        // The thread that waits for somebody who writes is let go.
        drop(fs::OpenOptions::new().read(true).write(true).open(&pipe));
        let attack = attack?;
        Ok(Proof {
            what: Limit::HostCallTime.name(),
            declared: declared.as_millis().to_string(),
            measured: format!("{} ms: {}", attack.took.as_millis(), attack.end()),
            holds: attack.end.is_some() && attack.took <= declared + slack,
        })
    }

    pub(super) async fn directory_bytes(&self) -> Result<Proof, ProveError> {
        let (launch, path) = self.with_directory("fill")?;
        let hog = include_str!("../../../../tests/guests/disk_hog.wat");
        let attack = self.launch(hog, launch, PATIENCE).await?;
        let bytes = fs::metadata(path.join("hog")).map_or(0, |metadata| metadata.len());
        fs::remove_dir_all(&path)?;
        let declared = match self.declared.directories {
            Some(Access::ReadWrite) => self.declared.limits.directory_bytes,
            _ => 0,
        };
        let mut proof = at_most(Limit::DirectoryBytes.name(), declared, bytes);
        proof.holds &= attack.end.is_some();
        Ok(proof)
    }

    /// What a plugin could reach the network with past its grants is not there.
    pub(super) async fn network(&self) -> Result<Proof, ProveError> {
        let imports = [
            r#"(module (import "wasi_snapshot_preview1" "sock_open" (func (param i32 i32 i32) (result i32))) (memory (export "memory") 1) (func (export "_start")))"#,
            include_str!("../../../../tests/guests/component_wants_http.wat"),
        ];
        let mut granted = imports
            .iter()
            .filter(|text| self.module(text).is_ok())
            .count();
        // Components have the calls that make sockets, and get none from them.
        let socket = include_str!("../../../../tests/guests/component_wants_socket.wat");
        let attack = self.attack(socket, self.unhurried(), PATIENCE).await?;
        granted += usize::from(attack.exit_code() != Some(1));
        Ok(Proof {
            what: NETWORK,
            declared: "none".to_owned(),
            measured: format!("{granted} of {} ways granted", imports.len() + 1),
            holds: granted == 0,
        })
    }
}
