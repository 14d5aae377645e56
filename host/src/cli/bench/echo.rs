//! The baseline: a bare `zeromq` ROUTER that sends back what it gets, in a process of its own. Of long
//! frames only that they came: servers answer token ids with a few bytes.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;
use zeromq::{RouterSocket, Socket as _, SocketRecv as _, SocketSend as _, ZmqMessage};

/// Bytes of a frame that is sent back; the keys of a chunk or two are.
const LONGEST: usize = 4 << 10;

/// A running echo; ends with this value.
pub(super) struct Echo {
    child: Child,
    pub(super) url: String,
}

impl Echo {
    /// Starts this program once more, as echo.
    pub(super) fn start() -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let mut child = Command::new(program)
            .args(["bench", "--serve-echo"])
            // The echo ends when this pipe does.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the echo cannot be started")?;
        let stdout = child.stdout.take().context("the echo has no stdout")?;
        let mut url = String::new();
        BufReader::new(stdout).read_line(&mut url)?;
        Ok(Self {
            child,
            url: url.trim().to_owned(),
        })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Binds a free port, prints its address, and echoes until stdin ends.
pub(super) async fn serve() -> anyhow::Result<()> {
    let mut socket = RouterSocket::new();
    let endpoint = socket.bind("tcp://127.0.0.1:0").await?;
    super::super::print(&format!("{endpoint}\n"))?;
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = ended.send(());
    });
    let echo = async {
        loop {
            let mut frames = socket.recv().await?.into_vecdeque();
            for frame in frames.iter_mut().filter(|frame| frame.len() > LONGEST) {
                frame.clear();
            }
            if let Ok(message) = ZmqMessage::try_from(frames) {
                socket.send(message).await?;
            }
        }
    };
    tokio::select! {
        result = echo => result,
        _ = end => Ok(()),
    }
}
