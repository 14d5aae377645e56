//! A guest's stdin, stdout and stderr.

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use wasmtime_wasi::{
    async_trait,
    cli::{IsTerminal, StdinStream, StdoutStream},
    p2::{InputStream, OutputStream, Pollable, StreamError, StreamResult},
};

use super::{GuestOutput, GuestStream};

/// The most bytes that one write may bring, so that a write has a bounded copy.
const WRITE_LIMIT: usize = 64 << 10;

/// Stdin: silent until the plugin is to stop, then at its end.
#[derive(Clone)]
pub(super) struct StopInput {
    pub(super) stop: CancellationToken,
}

impl IsTerminal for StopInput {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdinStream for StopInput {
    // WASI 0.3 asks for this form, which preview 1 guests cannot reach.
    fn async_stream(&self) -> Box<dyn AsyncRead + Send + Sync> {
        Box::new(tokio::io::empty())
    }

    fn p2_stream(&self) -> Box<dyn InputStream> {
        Box::new(self.clone())
    }
}

#[async_trait]
impl Pollable for StopInput {
    async fn ready(&mut self) {
        self.stop.cancelled().await;
    }
}

#[async_trait]
impl InputStream for StopInput {
    fn read(&mut self, _size: usize) -> StreamResult<Bytes> {
        if self.stop.is_cancelled() {
            Err(StreamError::Closed)
        } else {
            Ok(Bytes::new())
        }
    }
}

/// Stdout or stderr.
#[derive(Clone)]
pub(super) struct PluginOutput {
    pub(super) stream: GuestStream,
    pub(super) sink: Arc<dyn GuestOutput>,
}

impl IsTerminal for PluginOutput {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for PluginOutput {
    // As with stdin: not reachable from preview 1.
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[async_trait]
impl Pollable for PluginOutput {
    async fn ready(&mut self) {
        // Writers give up after ten awakenings without room, so this returns only with room;
        // the yield keeps a sink whose readiness is early from holding the thread.
        while self.sink.budget() == 0 {
            self.sink.ready().await;
            if self.sink.budget() == 0 {
                tokio::task::yield_now().await;
            }
        }
    }
}

#[async_trait]
impl OutputStream for PluginOutput {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.sink.push(self.stream, &bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(self.sink.budget().min(WRITE_LIMIT))
    }
}
