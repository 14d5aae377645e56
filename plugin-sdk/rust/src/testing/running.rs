//! A reactor beside a double.

use std::{cell::RefCell, rc::Rc, time::Duration};

use super::State;
use crate::{
    Call, Callable, Candidate, Event, EventBatch, Exported, HandlerResult, Message, Plugin, Rank,
    Ranker, Shutdown, Start,
};

/// A started reactor; from [`Host::start`](super::Host::start).
pub struct Running<P: Plugin> {
    host: Rc<RefCell<State>>,
    plugin: Exported<P>,
    cursor: u64,
}

impl<P: Plugin> Running<P> {
    pub(super) fn start(host: Rc<RefCell<State>>) -> HandlerResult<Self> {
        let running = Self {
            host,
            plugin: Exported::new(),
            cursor: 0,
        };
        let start = Message::Start(Start {
            plugin: "under_test".to_owned(),
            abi: crate::ABI_VERSION,
            server: env!("CARGO_PKG_VERSION").to_owned(),
            ..Start::default()
        });
        running.handle(start, Exported::start)?;
        Ok(running)
    }

    /// Sends a message the way it takes in the sandbox, as text.
    fn handle(
        &self,
        message: Message,
        handler: impl FnOnce(&Exported<P>, &Message) -> HandlerResult,
    ) -> HandlerResult {
        let length = self.host.borrow_mut().deliver(message);
        let message = Message::read(usize::try_from(length)?)?;
        handler(&self.plugin, &message)
    }

    /// Moves the clock and hands over the timers that come due, each at its time.
    ///
    /// # Errors
    /// What [`Plugin::timer`] returns; the timers after it are still to come.
    pub fn advance(&mut self, time: Duration) -> HandlerResult {
        let until_ms = {
            let host = self.host.borrow();
            host.now_ms.saturating_add(i64::try_from(time.as_millis())?)
        };
        loop {
            let due = self.host.borrow_mut().next_timer(until_ms);
            match due {
                Some(timer) => self.handle(Message::Timer(timer), Exported::timer)?,
                None => break,
            }
        }
        self.host.borrow_mut().now_ms = until_ms;
        Ok(())
    }

    /// Hands over a batch of events.
    ///
    /// # Errors
    /// What [`Plugin::events`] returns.
    pub fn events(&mut self, events: Vec<Event>) -> HandlerResult {
        self.events_after_loss(events, 0)
    }

    /// Hands over a batch of events before which `lost` were dropped.
    ///
    /// # Errors
    /// What [`Plugin::events`] returns.
    pub fn events_after_loss(&mut self, events: Vec<Event>, lost: u64) -> HandlerResult {
        self.cursor += lost + events.len() as u64;
        let batch = EventBatch {
            cursor: self.cursor,
            lost,
            events,
            ..EventBatch::default()
        };
        self.handle(Message::Events(batch), Exported::events)
    }

    /// Asks it to end.
    ///
    /// # Errors
    /// What [`Plugin::shutdown`] returns.
    pub fn shutdown(self) -> HandlerResult {
        let shutdown = Shutdown {
            grace_ms: 5000,
            ..Shutdown::default()
        };
        self.handle(Message::Shutdown(shutdown), Exported::shutdown)
    }

    fn reply(&self) -> HandlerResult<Vec<u8>> {
        let reply = self.host.borrow_mut().reply.take();
        Ok(reply.ok_or("the plugin gave no reply")?)
    }
}

impl<P: Callable> Running<P> {
    /// Calls `method`, which begins with the plugin's name and a dot, with `body`; the reply.
    ///
    /// # Errors
    /// What [`Callable::call`] returns.
    pub fn call(&mut self, method: &str, body: impl Into<Vec<u8>>) -> HandlerResult<Vec<u8>> {
        self.handle(Message::Call(Call::new(method, body)), Exported::call)?;
        self.reply()
    }
}

impl<P: Ranker> Running<P> {
    /// Asks for an order of candidates; the ids as the plugin gave them.
    ///
    /// # Errors
    /// What [`Ranker::rank`] returns.
    pub fn rank(&mut self, candidates: Vec<Candidate>) -> HandlerResult<Vec<u32>> {
        self.handle(Message::Rank(Rank::new(candidates)), Exported::rank)?;
        Ok(serde_json::from_slice(&self.reply()?)?)
    }
}
