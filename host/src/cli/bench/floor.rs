//! What a lookup or a transfer costs however fast the server is: the same requests, answered by an
//! echo, a transfer's around the same copy. A copy of 32 MiB leaves caches cold and cores asleep, and
//! the requests around it pay for that whoever answers them.

use std::{fs::File, os::unix::fs::FileExt as _, time::Instant};

use bytes::Bytes;
use rustix::fs::MemfdFlags;
use stockade_wire::Operation;

use super::client::{Client, Layout, Prompt, Transfer, fill, pack, verify};

/// A worker of an echo, with memory of its own in place of a pool.
pub(super) struct Floor {
    client: Client,
    layout: Layout,
    pool: File,
    buffer: Vec<u8>,
}

impl Floor {
    /// Connects, and writes what retrieves of so many tokens will read; 0 where nothing is moved.
    pub(super) async fn connect(
        url: &str,
        layout: Layout,
        tokens: usize,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let memory = rustix::fs::memfd_create("stockade-bench-floor", MemfdFlags::CLOEXEC)?;
        let mut floor = Self {
            client: Client::connect(url).await?,
            layout,
            pool: memory.into(),
            buffer: vec![0; layout.chunk_bytes()],
        };
        floor.copy_in(tokens / layout.chunk_tokens, seed)?;
        Ok(floor)
    }

    /// The requests of a lookup, those that give its locks back among them if it is a hit.
    pub(super) async fn lookup(
        &mut self,
        prompt: &Prompt,
        request: &str,
        is_hit: bool,
    ) -> anyhow::Result<Transfer> {
        let start = Instant::now();
        self.client.begin_lookup(prompt, request).await?;
        // An echo has no status to understand.
        let id = [pack(&request.into())?];
        self.client
            .call(Operation::QueryPrefetchStatus, &id)
            .await?;
        if is_hit {
            self.client.free_lookup_locks(prompt, request).await?;
        }
        self.client.end_session(request).await?;
        let server = start.elapsed();
        Ok(Transfer {
            server,
            whole: server,
            bytes: 0,
        })
    }

    /// The requests of a store and its copy.
    pub(super) async fn store(
        &mut self,
        prompt: &Prompt,
        request: &str,
        seed: u64,
    ) -> anyhow::Result<Transfer> {
        let start = Instant::now();
        let payload = [prompt.key(request, Some(0)), pack(&seed.into())?];
        self.client.call(Operation::PrepareStore, &payload).await?;
        let mut server = start.elapsed();
        let bytes = self.copy_in(prompt.len() / self.layout.chunk_tokens, seed)?;
        let commit = Instant::now();
        let [key, instance] = payload;
        let payload = [key, instance, Bytes::new()];
        self.client.call(Operation::CommitStore, &payload).await?;
        server += commit.elapsed();
        Ok(Transfer {
            server,
            whole: start.elapsed(),
            bytes,
        })
    }

    /// The requests of a retrieve and its copy.
    pub(super) async fn retrieve(
        &mut self,
        prompt: &Prompt,
        request: &str,
        seed: u64,
    ) -> anyhow::Result<Transfer> {
        let start = Instant::now();
        let payload = [prompt.key(request, Some(0)), pack(&seed.into())?];
        self.client
            .call(Operation::PrepareRetrieve, &payload)
            .await?;
        let mut server = start.elapsed();
        let mut bytes = 0;
        for index in 0..prompt.len() / self.layout.chunk_tokens {
            self.pool.read_exact_at(&mut self.buffer, bytes as u64)?;
            verify(&self.buffer, seed, index as u64)?;
            bytes += self.buffer.len();
        }
        let commit = Instant::now();
        self.client
            .call(Operation::CommitRetrieve, &payload)
            .await?;
        server += commit.elapsed();
        Ok(Transfer {
            server,
            whole: start.elapsed(),
            bytes,
        })
    }

    fn copy_in(&mut self, chunks: usize, seed: u64) -> anyhow::Result<usize> {
        let mut bytes = 0;
        for index in 0..chunks {
            fill(&mut self.buffer, seed, index as u64);
            self.pool.write_all_at(&self.buffer, bytes as u64)?;
            bytes += self.buffer.len();
        }
        Ok(bytes)
    }
}
