//! A double of the server, so that a plugin's tests run natively.
//!
//! A [`Host`] stands in for the server in the thread that makes it, until it is dropped. Like the
//! server it grants nothing that it was not told to. It records every call and every line of the
//! log. A [`Running`] plugin gets messages as the server would send them; its clock moves only when
//! [`Running::advance`] moves it.
//!
//! ```
//! use std::time::Duration;
//! use stockade_plugin::{HandlerResult, Plugin, Start, Timer, testing::Host, timer};
//!
//! struct Beat;
//!
//! impl Plugin for Beat {
//!     fn start(_: &Start) -> HandlerResult<Self> {
//!         timer::every_after("beat", Duration::from_secs(30), Duration::from_secs(30))?;
//!         Ok(Self)
//!     }
//!     fn timer(&mut self, _: &Timer) -> HandlerResult {
//!         stockade_plugin::info!("beat");
//!         Ok(())
//!     }
//! }
//!
//! let host = Host::new();
//! let mut plugin = host.start::<Beat>().unwrap();
//! plugin.advance(Duration::from_secs(95)).unwrap();
//! assert_eq!(host.log_lines(), ["beat", "beat", "beat"]);
//! ```

pub(crate) mod abi;
mod running;

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};

use serde_json::{Value, json};

pub use self::running::Running;
use crate::{
    Error, ErrorCode, HandlerResult, Level, Message, Plugin,
    cache::{Key, Outcome, Stats, Subscription},
    http::{Request, Response},
};

/// What a manifest can grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Grant {
    /// `cache = ["stats"]`.
    Stats,
    /// `cache = ["keys"]`.
    Keys,
    /// `cache = ["events"]`.
    Events,
    /// `cache = ["pin"]`.
    Pin,
    /// `cache = ["evict"]`.
    Evict,
    /// `cache = ["prefetch"]`.
    Prefetch,
}

impl Grant {
    fn word(self) -> &'static str {
        match self {
            Self::Stats => "stats",
            Self::Keys => "keys",
            Self::Events => "events",
            Self::Pin => "pin",
            Self::Evict => "evict",
            Self::Prefetch => "prefetch",
        }
    }
}

/// A call that the plugin made, but for those that only fetch what another one answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorded {
    /// Name of the import, such as `state_set`.
    pub import: &'static str,
    /// Its arguments; byte strings as text.
    pub arguments: Value,
    /// What came of it: 0 or more, or one of the codes of errors.
    pub result: i32,
}

type Responder = Box<dyn FnMut(&Request) -> crate::Result<(Response, Vec<u8>)>>;

struct Timer {
    name: String,
    due_ms: i64,
    every_ms: i64,
}

struct State {
    config: Value,
    now_ms: i64,
    grants: Vec<Grant>,
    state_limit: usize,
    state: BTreeMap<String, Vec<u8>>,
    stats: Stats,
    keys: Vec<Key>,
    second_tier: Option<Vec<Key>>,
    pinned: BTreeMap<String, i64>,
    subscription: Option<Subscription>,
    responder: Option<Responder>,
    body: VecDeque<u8>,
    counters: BTreeMap<String, f64>,
    gauges: BTreeMap<String, f64>,
    timers: Vec<Timer>,
    logs: Vec<(Level, String)>,
    recorded: Vec<Recorded>,
    messages: VecDeque<Message>,
    message: Vec<u8>,
    message_body: Vec<u8>,
    wants_reply: bool,
    reply: Option<Vec<u8>>,
    answer: Vec<u8>,
    seq: u64,
}

thread_local! {
    static INSTALLED: RefCell<Option<Rc<RefCell<State>>>> = const { RefCell::new(None) };
}

/// The double; see the [module](self). One at a time in a thread.
pub struct Host {
    state: Rc<RefCell<State>>,
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        INSTALLED.with_borrow_mut(|installed| *installed = None);
    }
}

/// The time at which a double's clock begins.
const FIRST_MS: i64 = 1_700_000_000_000;

impl Host {
    /// A server that grants nothing, with empty settings, in place of the calling thread's one.
    #[must_use]
    pub fn new() -> Self {
        let state = Rc::new(RefCell::new(State {
            config: json!({}),
            now_ms: FIRST_MS,
            grants: Vec::new(),
            state_limit: 0,
            state: BTreeMap::new(),
            stats: Stats::default(),
            keys: Vec::new(),
            second_tier: None,
            pinned: BTreeMap::new(),
            subscription: None,
            responder: None,
            body: VecDeque::new(),
            counters: BTreeMap::new(),
            gauges: BTreeMap::new(),
            timers: Vec::new(),
            logs: Vec::new(),
            recorded: Vec::new(),
            messages: VecDeque::new(),
            message: Vec::new(),
            message_body: Vec::new(),
            wants_reply: false,
            reply: None,
            answer: Vec::new(),
            seq: 0,
        }));
        INSTALLED.with_borrow_mut(|installed| *installed = Some(Rc::clone(&state)));
        Self { state }
    }

    /// With these settings, a JSON object of the shape of [`crate::config::Config`].
    #[must_use]
    pub fn config(self, config: Value) -> Self {
        self.state.borrow_mut().config = config;
        self
    }

    /// With a setting of plugins, as `--runtime-plugin-config` has it.
    #[must_use]
    pub fn setting(self, name: &str, value: impl Into<Value>) -> Self {
        self.state.borrow_mut().config["runtime_plugin_extra_config"][name] = value.into();
        self
    }

    /// With one more grant.
    #[must_use]
    pub fn grant(self, grant: Grant) -> Self {
        self.state.borrow_mut().grants.push(grant);
        self
    }

    /// With room for state, as the manifest's `state_kib`.
    #[must_use]
    pub fn state_kib(self, kib: u32) -> Self {
        self.state.borrow_mut().state_limit = kib as usize * 1024;
        self
    }

    /// With statistics.
    #[must_use]
    pub fn stats(self, stats: Stats) -> Self {
        self.set_stats(stats);
        self
    }

    /// With objects.
    #[must_use]
    pub fn keys(self, keys: Vec<Key>) -> Self {
        self.state.borrow_mut().keys = keys;
        self
    }

    /// With a second tier that has these objects. Without one, a prefetch is
    /// [`ErrorCode::Unavailable`].
    #[must_use]
    pub fn second_tier(self, keys: Vec<Key>) -> Self {
        self.state.borrow_mut().second_tier = Some(keys);
        self
    }

    /// With somebody who answers requests. Without one, no address is granted. Its errors are the
    /// plugin's: [`ErrorCode::Unavailable`] for a host that is down.
    #[must_use]
    pub fn http(
        self,
        responder: impl FnMut(&Request) -> crate::Result<(Response, Vec<u8>)> + 'static,
    ) -> Self {
        self.state.borrow_mut().responder = Some(Box::new(responder));
        self
    }

    /// Changes the statistics while the plugin runs.
    pub fn set_stats(&self, stats: Stats) {
        self.state.borrow_mut().stats = stats;
    }

    /// Puts a value into the state, as if the plugin's last run had left it.
    pub fn set_state(&self, key: &str, value: &[u8]) {
        let mut state = self.state.borrow_mut();
        state.state.insert(key.to_owned(), value.to_vec());
    }

    /// What the plugin's state holds.
    #[must_use]
    pub fn state(&self) -> BTreeMap<String, Vec<u8>> {
        self.state.borrow().state.clone()
    }

    /// What the plugin logged.
    #[must_use]
    pub fn logs(&self) -> Vec<(Level, String)> {
        self.state.borrow().logs.clone()
    }

    /// What the plugin logged, without levels.
    #[must_use]
    pub fn log_lines(&self) -> Vec<String> {
        let state = self.state.borrow();
        state.logs.iter().map(|(_, line)| line.clone()).collect()
    }

    /// The calls that the plugin made, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<Recorded> {
        self.state.borrow().recorded.clone()
    }

    /// The arguments of the calls of one import, in order.
    #[must_use]
    pub fn calls_of(&self, import: &str) -> Vec<Value> {
        let state = self.state.borrow();
        let of_import = state.recorded.iter().filter(|call| call.import == import);
        of_import.map(|call| call.arguments.clone()).collect()
    }

    /// The value of a counter of the plugin, 0 where it never counted.
    #[must_use]
    pub fn counter(&self, name: &str) -> f64 {
        let state = self.state.borrow();
        state.counters.get(name).copied().unwrap_or_default()
    }

    /// The value of a gauge of the plugin.
    #[must_use]
    pub fn gauge(&self, name: &str) -> Option<f64> {
        self.state.borrow().gauges.get(name).copied()
    }

    /// What the plugin is subscribed to.
    #[must_use]
    pub fn subscription(&self) -> Option<Subscription> {
        self.state.borrow().subscription.clone()
    }

    /// The keys that are pinned now.
    #[must_use]
    pub fn pinned(&self) -> Vec<String> {
        let state = self.state.borrow();
        let pins = state.pinned.iter();
        pins.filter(|&(_, &until)| until > state.now_ms)
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// Puts a message into the queue that a command's [`next_message`](crate::next_message) reads.
    pub fn send(&self, message: Message) {
        self.state.borrow_mut().messages.push_back(message);
    }

    /// What a command replied to the message at hand.
    #[must_use]
    pub fn take_reply(&self) -> Option<Vec<u8>> {
        self.state.borrow_mut().reply.take()
    }

    /// Starts a reactor.
    ///
    /// # Errors
    /// What its `start` returns.
    pub fn start<P: Plugin>(&self) -> HandlerResult<Running<P>> {
        Running::start(Rc::clone(&self.state))
    }
}

impl State {
    /// Keeps an answer; its length is the call's result.
    fn answered(&mut self, answer: Vec<u8>) -> i32 {
        self.answer = answer;
        i32::try_from(self.answer.len()).unwrap_or(i32::MAX)
    }

    fn refused(&mut self, error: &Error) -> i32 {
        self.answer = error.message().as_bytes().to_vec();
        error.code().number()
    }

    fn settled(&mut self, result: Result<Vec<u8>, Error>) -> i32 {
        match result {
            Ok(answer) => self.answered(answer),
            Err(error) => self.refused(&error),
        }
    }

    fn granted(&self, grant: Grant) -> Result<(), Error> {
        if self.grants.contains(&grant) {
            return Ok(());
        }
        let word = grant.word();
        let reason = format!("not granted: add cache = [\"{word}\"] to the plugin's manifest");
        Err(Error::new(ErrorCode::Denied, reason))
    }

    fn state_granted(&self) -> Result<(), Error> {
        if self.state_limit > 0 {
            return Ok(());
        }
        let reason = "not granted: add state_kib = 64 to [limits] of the plugin's manifest";
        Err(Error::new(ErrorCode::Denied, reason))
    }

    /// Keeps `message` as the one at hand, as the server would send it; its length.
    fn deliver(&mut self, mut message: Message) -> i32 {
        self.seq += 1;
        let seq = self.seq;
        self.reply = None;
        self.message_body.clear();
        match &mut message {
            Message::Start(it) => it.seq = seq,
            Message::Timer(it) => it.seq = seq,
            Message::Shutdown(it) => it.seq = seq,
            Message::Events(it) => it.seq = seq,
            Message::Rank(it) => it.seq = seq,
            Message::Call(it) => {
                it.seq = seq;
                it.body_bytes = it.body.len() as u64;
                self.message_body = std::mem::take(&mut it.body);
            }
            Message::Unknown => {}
        }
        self.wants_reply = matches!(message, Message::Call(_) | Message::Rank(_));
        self.message = serde_json::to_vec(&message).unwrap_or_default();
        i32::try_from(self.message.len()).unwrap_or(i32::MAX)
    }

    /// The timer that is due first, if it is due by `until_ms`; moves the clock there.
    fn next_timer(&mut self, until_ms: i64) -> Option<crate::Timer> {
        let next = self
            .timers
            .iter()
            .enumerate()
            .min_by_key(|(_, timer)| timer.due_ms)
            .filter(|(_, timer)| timer.due_ms <= until_ms)
            .map(|(index, _)| index)?;
        let timer = self.timers.get_mut(next)?;
        self.now_ms = self.now_ms.max(timer.due_ms);
        let due = crate::Timer {
            name: timer.name.clone(),
            ..crate::Timer::default()
        };
        match timer.every_ms {
            0 => drop(self.timers.remove(next)),
            every_ms => timer.due_ms += every_ms,
        }
        Some(due)
    }

    fn cache_request(&mut self, request: &[u8]) -> Result<Vec<u8>, Error> {
        let invalid = |reason: String| Error::new(ErrorCode::Invalid, reason);
        let request: Value =
            serde_json::from_slice(request).map_err(|error| invalid(error.to_string()))?;
        let op = request["op"].as_str().unwrap_or_default().to_owned();
        self.granted(match &*op {
            "pin" | "unpin" => Grant::Pin,
            "evict" => Grant::Evict,
            "prefetch" => Grant::Prefetch,
            _ => return Err(invalid(format!("op `{op}` is not known"))),
        })?;
        if op == "prefetch" {
            let lower = self.second_tier.as_ref().ok_or_else(|| {
                Error::new(
                    ErrorCode::Unavailable,
                    "there is no second tier: give it with second_tier()",
                )
            })?;
            let asked = request["keys"].as_array();
            let is_asked = |key: &&Key| asked.is_some_and(|it| it.iter().any(|it| *it == *key.key));
            let is_new = |key: &&Key| self.keys.iter().all(|held| held.key != key.key);
            let loaded: Vec<_> = lower
                .iter()
                .filter(is_asked)
                .filter(is_new)
                .cloned()
                .collect();
            self.keys.extend(loaded);
        }
        let mut outcome = Outcome::default();
        for key in request["keys"].as_array().into_iter().flatten() {
            let key = key.as_str().unwrap_or_default();
            let Some(index) = self.keys.iter().position(|held| held.key == key) else {
                outcome.missing += 1;
                continue;
            };
            outcome.done += 1;
            match &*op {
                "pin" => {
                    let ttl_ms = request["ttl_ms"].as_i64().unwrap_or_default();
                    self.pinned.insert(key.to_owned(), self.now_ms + ttl_ms);
                }
                "unpin" => drop(self.pinned.remove(key)),
                "evict" => drop(self.keys.remove(index)),
                _ => {}
            }
        }
        crate::error::written(&outcome)
    }

    fn cache_keys(&self, query: &[u8]) -> Result<Vec<u8>, Error> {
        self.granted(Grant::Keys)?;
        let query: crate::cache::KeyQuery = serde_json::from_slice(query)
            .map_err(|error| Error::new(ErrorCode::Invalid, error.to_string()))?;
        let limit = query.limit.unwrap_or(100) as usize;
        let is_wanted = |held: &&Key| {
            let mut parts = held.key.split('@');
            let (model, salt) = (parts.next(), parts.nth(3));
            query.after.as_ref().is_none_or(|after| held.key > *after)
                && query.model.as_deref().is_none_or(|it| Some(it) == model)
                && (query.salt.as_deref()).is_none_or(|it| it == salt.unwrap_or_default())
        };
        let mut keys: Vec<Key> = self.keys.iter().filter(is_wanted).cloned().collect();
        keys.sort_by(|a, b| a.key.cmp(&b.key));
        let has_more = keys.len() > limit;
        keys.truncate(limit);
        let next = keys.last().filter(|_| has_more).map(|key| key.key.clone());
        crate::error::written(&json!({"keys": keys, "next": next}))
    }
}
