//! The functions of `stockade:plugin/v1` as a guest calls them.
//!
//! A pointer, a length and every byte behind them come from the guest: what does not lie in its
//! memory is an answer of `INVALID`, and what is taken out of it has a bound. Nothing here
//! holds a lock that a request waits for: what looks into the cache is done by a thread of the
//! server while the guest is asleep.

use std::{
    collections::BTreeMap,
    future::Future,
    str,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::{Buf as _, Bytes};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use wasmtime::{Caller, Extern, Linker, Memory};

use super::{
    GuestOutput,
    guest::{GuestState, Meter},
    quota::thread_time,
};
use crate::{
    host_api::{
        self, Access, CacheChange, CacheGrant, CacheRequest, CacheWork, Code, HttpHead,
        HttpRequest, Incoming, KeysQuery, MAX_KEYS, MAX_NAME_BYTES, MAX_PAYLOAD_BYTES, MAX_PIN_MS,
        MAX_REQUEST_BYTES, MAX_STATE_KEY_BYTES, Message, NAMESPACE, PluginHost, PluginRun, Refusal,
        Subscription, Wants,
    },
    limit::Limit,
    log_stream::MAX_LINE_BYTES,
    outbound::{OutboundError, OutboundRequest},
};

/// The most that `limits.http_body_kib` can be, in bytes.
const MAX_HTTP_BODY: usize = 64 << 20;

/// What a store holds for the calls of the namespace.
pub(super) struct Api {
    pub(super) access: Access,
    /// The guest's memory, once it was looked for.
    pub(super) memory: Option<Memory>,
    /// Whether messages are asked for, rather than brought.
    pub(super) is_command: bool,
    pub(super) current: Option<Message>,
    output: Arc<dyn GuestOutput>,
    meter: Arc<Meter>,
    host_call_time: Duration,
    answer: Bytes,
    /// What is left of the last response's body.
    http_body: Bytes,
    seq: u64,
}

/// What a call answers: bytes for `answer_read`, or why not.
type Answer = Result<Bytes, Refusal>;

impl Api {
    pub(super) fn new(
        access: Access,
        output: Arc<dyn GuestOutput>,
        meter: Arc<Meter>,
        host_call_time: Duration,
        is_command: bool,
    ) -> Self {
        Self {
            access,
            memory: None,
            is_command,
            current: None,
            output,
            meter,
            host_call_time,
            answer: Bytes::new(),
            http_body: Bytes::new(),
            seq: 0,
        }
    }

    pub(super) fn output(&self) -> &dyn GuestOutput {
        &*self.output
    }

    pub(super) fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }

    /// The message that tells a reactor that it runs.
    pub(super) fn start_message(&mut self) -> Message {
        let access = &self.access;
        let host = access.counter.host.as_ref();
        let tenant = host.and_then(|host| host.tenant_of(&access.run.plugin));
        self.seq += 1;
        Message::start(self.seq, &access.run.plugin, tenant.as_deref())
    }

    /// What came in, in the guest's form.
    pub(super) fn message(&mut self, incoming: Incoming) -> Message {
        self.seq += 1;
        let seq = self.seq;
        match incoming {
            Incoming::Call(ask) => Message::call(seq, ask),
            Incoming::Rank(ask) => Message::rank(seq, ask),
            Incoming::Events(batch) => {
                self.access.tally.lost(batch.lost);
                Message::events(seq, batch)
            }
            Incoming::Timer { name, lag } => Message::timer(seq, &name, lag),
            Incoming::Shutdown => Message::shutdown(seq, (self.access.grace)()),
        }
    }

    fn witness(&self, what: impl FnOnce() -> String) {
        if let Some(witness) = &self.access.counter.witness {
            witness(what());
        }
    }

    /// Keeps the answer and gives the number that the guest gets.
    fn respond(&mut self, answer: Answer) -> i32 {
        match answer {
            Ok(bytes) => {
                // Answers are bounded far below this.
                let length = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
                self.answer = bytes;
                length
            }
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// As [`respond`](Self::respond), for calls without an answer.
    fn done(&mut self, outcome: Result<(), Refusal>) -> i32 {
        outcome.map_or_else(|refusal| self.refuse(refusal), |()| 0)
    }

    fn refuse(&mut self, refusal: Refusal) -> i32 {
        self.access.tally.refused(refusal.code);
        self.answer = refusal.reason.into();
        refusal.code.number()
    }

    fn reply(&mut self, given: &[u8]) -> Result<(), Refusal> {
        let stray = || {
            Refusal::new(
                Code::State,
                "there is no message at hand that wants a reply, or it has one",
            )
        };
        let message = self.current.as_mut().ok_or_else(stray)?;
        if matches!(message.wants, Wants::Nothing) || message.given.is_some() {
            return Err(stray());
        }
        message.given = Some(given.to_vec());
        // A handler may still say that it failed; a command has no other way to be done.
        if self.is_command
            && let Some(message) = self.current.take()
        {
            self.settle(message, None);
        }
        Ok(())
    }

    /// Ends a message, and counts how.
    pub(super) fn settle(&self, message: Message, failure: Option<String>) {
        use host_api::Outcome;
        let handler = message.handler;
        let tally = &self.access.tally;
        message.settle(failure, |is_success| {
            let outcome = match is_success {
                true => Outcome::Ok,
                false => Outcome::Failed,
            };
            tally.handled(handler, outcome);
        });
    }
}

/// What a call may touch: the guest's memory and the store's data.
struct Call<'a> {
    memory: &'a mut [u8],
    state: &'a mut GuestState,
}

impl<'a> Call<'a> {
    fn new(caller: &'a mut Caller<'_, GuestState>) -> Self {
        caller.data().api.access.tally.called();
        caller.data().note_stack();
        if caller.data().api.memory.is_none()
            && let Some(Extern::Memory(memory)) = caller.get_export("memory")
        {
            caller.data_mut().api.memory = Some(memory);
        }
        match caller.data().api.memory {
            Some(memory) => {
                let (memory, state) = memory.data_and_store_mut(caller);
                Self { memory, state }
            }
            None => Self {
                memory: &mut [],
                state: caller.data_mut(),
            },
        }
    }

    fn api(&mut self) -> &mut Api {
        &mut self.state.api
    }

    /// The guest's bytes from `pointer` on.
    fn bytes(&self, what: &str, pointer: i32, length: i32, most: usize) -> Result<&[u8], Refusal> {
        let (start, length) = (unsigned(pointer), unsigned(length));
        if length > most {
            return Err(Refusal::invalid(format!(
                "{what} has {length} bytes: give at most {most}"
            )));
        }
        self.memory
            .get(start..)
            .and_then(|from| from.get(..length))
            .ok_or_else(|| {
                Refusal::invalid(format!(
                    "{what}: {length} bytes at {start} do not lie in the memory of {} bytes",
                    self.memory.len()
                ))
            })
    }

    fn text(&self, what: &str, pointer: i32, length: i32, most: usize) -> Result<&str, Refusal> {
        let bytes = self.bytes(what, pointer, length, most)?;
        str::from_utf8(bytes).map_err(|_| Refusal::invalid(format!("{what} is not UTF-8")))
    }

    fn json<T: DeserializeOwned>(&self, pointer: i32, length: i32) -> Result<T, Refusal> {
        let bytes = self.bytes("the request", pointer, length, MAX_REQUEST_BYTES)?;
        serde_json::from_slice(bytes)
            .map_err(|error| Refusal::invalid(format!("the request: {error}")))
    }
}

fn unsigned(number: i32) -> usize {
    usize::try_from(number.cast_unsigned()).unwrap_or(usize::MAX)
}

/// Copies into the guest as much as it has room for, and says how much that was.
fn copy_out(memory: &mut [u8], source: &[u8], pointer: i32, capacity: i32) -> Result<i32, Refusal> {
    let (start, capacity) = (unsigned(pointer), unsigned(capacity));
    let length = source.len().min(capacity);
    let size = memory.len();
    let target = memory
        .get_mut(start..)
        .and_then(|from| from.get_mut(..length));
    match target {
        Some(target) => {
            target.copy_from_slice(&source[..length]);
            Ok(i32::try_from(length).unwrap_or(i32::MAX))
        }
        None => Err(Refusal::invalid(format!(
            "ptr: {length} bytes at {start} do not lie in the memory of {size} bytes"
        ))),
    }
}

/// Adds the namespace.
pub(super) fn add_to_linker(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    add_reading(linker)?;
    add_simple(linker)?;
    add_state(linker)?;
    add_waiting(linker)
}

/// Calls that copy what is kept for the guest.
fn add_reading(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    type At = fn(&Api) -> Option<&[u8]>;
    let sources: [(&str, At); 3] = [
        ("answer_read", |api| Some(&api.answer)),
        ("message_read", |api| {
            api.current.as_ref().map(|message| &*message.text)
        }),
        ("message_body_read", |api| {
            api.current.as_ref().map(|message| &*message.body)
        }),
    ];
    for (name, source) in sources {
        linker.func_wrap(
            NAMESPACE,
            name,
            move |mut caller: Caller<'_, GuestState>, pointer: i32, capacity: i32| -> i32 {
                let Call { memory, state } = Call::new(&mut caller);
                let copied = match source(&state.api) {
                    Some(source) => copy_out(memory, source, pointer, capacity),
                    None => Err(Refusal::new(Code::State, "there is no message at hand")),
                };
                copied.unwrap_or_else(|refusal| state.api.refuse(refusal))
            },
        )?;
    }
    linker.func_wrap(
        NAMESPACE,
        "answer_length",
        |caller: Caller<'_, GuestState>| -> i32 {
            let api = &caller.data().api;
            api.access.tally.called();
            i32::try_from(api.answer.len()).unwrap_or(i32::MAX)
        },
    )?;
    Ok(())
}

/// Calls that are done at once.
fn add_simple(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    linker.func_wrap(
        NAMESPACE,
        "config",
        |mut caller: Caller<'_, GuestState>| -> i32 {
            let mut call = Call::new(&mut caller);
            let config = Bytes::copy_from_slice(call.api().access.counter.config_json.as_bytes());
            call.api().respond(Ok(config))
        },
    )?;
    linker.func_wrap(
        NAMESPACE,
        "clock_ms",
        |caller: Caller<'_, GuestState>| -> i64 {
            caller.data().api.access.tally.called();
            caller.data().note_stack();
            let since_epoch = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
        },
    )?;
    linker.func_wrap(
        NAMESPACE,
        "reply",
        |mut caller: Caller<'_, GuestState>, pointer: i32, length: i32| -> i32 {
            let Call { memory, state } = Call::new(&mut caller);
            let (start, length) = (unsigned(pointer), unsigned(length));
            let given = memory.get(start..).and_then(|from| from.get(..length));
            let outcome = match given {
                Some(_) if length > MAX_PAYLOAD_BYTES => Err(Refusal::new(
                    Code::Limit,
                    format!("the reply has {length} bytes: give at most {MAX_PAYLOAD_BYTES}"),
                )),
                Some(given) => state.api.reply(given),
                None => Err(Refusal::invalid(format!(
                    "the reply: {length} bytes at {start} do not lie in the memory of {} bytes",
                    memory.len()
                ))),
            };
            state.api.done(outcome)
        },
    )?;
    linker.func_wrap(
        NAMESPACE,
        "timer_set",
        |mut caller: Caller<'_, GuestState>,
         pointer: i32,
         length: i32,
         after_ms: i32,
         every_ms: i32|
         -> i32 {
            let mut call = Call::new(&mut caller);
            let name = call.text("the timer's name", pointer, length, MAX_NAME_BYTES);
            let name = name.map(str::to_owned);
            let api = call.api();
            let outcome =
                name.and_then(|name| api.access.inbox.set_timer(&name, after_ms, every_ms));
            api.done(outcome)
        },
    )?;
    linker.func_wrap(
        NAMESPACE,
        "timer_cancel",
        |mut caller: Caller<'_, GuestState>, pointer: i32, length: i32| -> i32 {
            let mut call = Call::new(&mut caller);
            let name = call.text("the timer's name", pointer, length, MAX_NAME_BYTES);
            let name = name.map(str::to_owned);
            let api = call.api();
            let outcome = name.and_then(|name| match api.access.inbox.cancel_timer(&name) {
                true => Ok(()),
                false => Err(Refusal::new(
                    Code::NotFound,
                    format!("there is no timer {name:?}"),
                )),
            });
            api.done(outcome)
        },
    )?;
    for (function, is_counter) in [("metric_add", true), ("metric_set", false)] {
        linker.func_wrap(
            NAMESPACE,
            function,
            move |mut caller: Caller<'_, GuestState>,
                  pointer: i32,
                  length: i32,
                  value: f64|
                  -> i32 {
                let mut call = Call::new(&mut caller);
                let outcome = call
                    .text("the metric's name", pointer, length, MAX_NAME_BYTES)
                    .and_then(|name| {
                        let access = &call.state.api.access;
                        let most = access.terms.metrics;
                        access.tally.measure(name, value, is_counter, most)
                    });
                let api = call.api();
                if matches!(&outcome, Err(refusal) if refusal.code == Code::Limit) {
                    api.meter.hit(Limit::Metrics);
                }
                api.done(outcome)
            },
        )?;
    }
    Ok(())
}

/// The plugin's own keys and values.
fn add_state(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    fn check(call: &Call<'_>) -> Result<(), Refusal> {
        match call.state.api.access.terms.state_bytes {
            0 => Err(Refusal::new(
                Code::Denied,
                "it keeps no state: add state_kib = 64, or as much as it needs, to [limits] of the plugin's manifest",
            )),
            _ => Ok(()),
        }
    }
    let missing = |key: &str| Refusal::new(Code::NotFound, format!("there is no key {key:?}"));
    linker.func_wrap(
        NAMESPACE,
        "state_get",
        move |mut caller: Caller<'_, GuestState>, pointer: i32, length: i32| -> i32 {
            let mut call = Call::new(&mut caller);
            let answer = check(&call).and_then(|()| {
                let key = call.text("the key", pointer, length, MAX_STATE_KEY_BYTES)?;
                call.state.api.witness(|| format!("state_get {key}"));
                let value = call.state.api.access.state.get(key);
                value.ok_or_else(|| missing(key))
            });
            call.api().respond(answer)
        },
    )?;
    linker.func_wrap(
        NAMESPACE,
        "state_set",
        |mut caller: Caller<'_, GuestState>,
         pointer: i32,
         length: i32,
         value: i32,
         value_length: i32|
         -> i32 {
            let mut call = Call::new(&mut caller);
            let outcome = check(&call).and_then(|()| {
                let key = call.text("the key", pointer, length, MAX_STATE_KEY_BYTES)?;
                call.state.api.witness(|| format!("state_set {key}"));
                let access = &call.state.api.access;
                let limit = access.terms.state_bytes;
                // What cannot be kept anyway need not be copied; the rest has that bound.
                let value = call.bytes("the value", value, value_length, usize::MAX)?;
                access.state.set(key, value, limit)
            });
            let api = call.api();
            if matches!(&outcome, Err(refusal) if refusal.code == Code::Limit) {
                api.meter.hit(Limit::StateBytes);
            }
            api.done(outcome)
        },
    )?;
    linker.func_wrap(
        NAMESPACE,
        "state_delete",
        move |mut caller: Caller<'_, GuestState>, pointer: i32, length: i32| -> i32 {
            let mut call = Call::new(&mut caller);
            let outcome = check(&call).and_then(|()| {
                let key = call.text("the key", pointer, length, MAX_STATE_KEY_BYTES)?;
                call.state.api.witness(|| format!("state_delete {key}"));
                match call.state.api.access.state.delete(key) {
                    true => Ok(()),
                    false => Err(missing(key)),
                }
            });
            call.api().done(outcome)
        },
    )?;
    linker.func_wrap(
        NAMESPACE,
        "state_keys",
        |mut caller: Caller<'_, GuestState>, pointer: i32, length: i32| -> i32 {
            let mut call = Call::new(&mut caller);
            let answer = check(&call).and_then(|()| {
                let prefix = call.text("the prefix", pointer, length, MAX_STATE_KEY_BYTES)?;
                call.state.api.witness(|| format!("state_keys {prefix}"));
                encode(&call.state.api.access.state.keys(prefix))
            });
            call.api().respond(answer)
        },
    )?;
    Ok(())
}

/// Calls during which the guest may sleep.
fn add_waiting(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    linker.func_wrap_async(
        NAMESPACE,
        "next_message",
        |mut caller: Caller<'_, GuestState>, (timeout_ms,): (i32,)| {
            Box::new(async move {
                let mut call = Call::new(&mut caller);
                next_message(call.api(), timeout_ms).await
            })
        },
    )?;
    linker.func_wrap_async(
        NAMESPACE,
        "log",
        |mut caller: Caller<'_, GuestState>, (level, pointer, length): (i32, i32, i32)| {
            Box::new(async move {
                let mut call = Call::new(&mut caller);
                // One byte more than is kept shows that it was cut.
                let kept = length.cast_unsigned().min(MAX_LINE_BYTES + 1);
                let line = host_api::level(level).and_then(|level| {
                    call.bytes("the line", pointer, length, usize::MAX)?;
                    let line = call.bytes("the line", pointer, kept.cast_signed(), usize::MAX)?;
                    Ok((level, line.to_vec()))
                });
                let api = call.api();
                let outcome = match line {
                    Ok((level, line)) => {
                        // The plugin is held to its rate as when it prints.
                        if api.output.budget() == 0 {
                            api.output.ready().await;
                        }
                        api.output.log(level, &line);
                        Ok(())
                    }
                    Err(refusal) => Err(refusal),
                };
                api.done(outcome)
            })
        },
    )?;
    linker.func_wrap_async(
        NAMESPACE,
        "cache_stats",
        |mut caller: Caller<'_, GuestState>, ()| {
            Box::new(async move {
                let mut call = Call::new(&mut caller);
                let api = call.api();
                let answer = match api.access.terms.check_cache(CacheGrant::Stats) {
                    Ok(()) => ask(api, |host, run| host.stats(run)).await,
                    Err(refusal) => Err(refusal),
                };
                api.respond(answer.and_then(|stats| encode(&stats)))
            })
        },
    )?;
    linker.func_wrap_async(
        NAMESPACE,
        "cache_keys",
        |mut caller: Caller<'_, GuestState>, (pointer, length): (i32, i32)| {
            Box::new(async move {
                let mut call = Call::new(&mut caller);
                let query = call.json::<KeysQuery>(pointer, length);
                let api = call.api();
                let query = api
                    .access
                    .terms
                    .check_cache(CacheGrant::Keys)
                    .and(query)
                    .and_then(|query| query.check().map(|()| query));
                let answer = match query {
                    Ok(query) => ask(api, move |host, run| host.keys(run, &query)).await,
                    Err(refusal) => Err(refusal),
                };
                api.respond(answer.and_then(|page| encode(&page)))
            })
        },
    )?;
    linker.func_wrap_async(
        NAMESPACE,
        "cache_request",
        |mut caller: Caller<'_, GuestState>, (pointer, length): (i32, i32)| {
            Box::new(async move {
                let mut call = Call::new(&mut caller);
                let request = call.json::<CacheRequest>(pointer, length);
                let api = call.api();
                let request = request.and_then(|request| {
                    api.access.terms.check_cache(request.op.grant())?;
                    check_request(&request)?;
                    Ok(request)
                });
                let answer = match request {
                    Ok(request) => change(api, request).await,
                    Err(refusal) => Err(refusal),
                };
                api.respond(answer.and_then(|change| encode(&change)))
            })
        },
    )?;
    linker.func_wrap_async(
        NAMESPACE,
        "events_subscribe",
        |mut caller: Caller<'_, GuestState>, (pointer, length): (i32, i32)| {
            Box::new(async move {
                let mut call = Call::new(&mut caller);
                let wanted = call.json::<Subscription>(pointer, length);
                let answer = subscribe(call.api(), wanted).await;
                call.api().respond(answer)
            })
        },
    )?;
    linker.func_wrap_async(
        NAMESPACE,
        "http_request",
        |mut caller: Caller<'_, GuestState>,
         (request, request_length, body, body_length): (i32, i32, i32, i32)| {
            Box::new(async move {
                let mut call = Call::new(&mut caller);
                let wanted = call.json::<HttpRequest>(request, request_length);
                let wanted = wanted.and_then(|wanted| {
                    // More than any limit lets through is not copied first.
                    let body = call.bytes("the body", body, body_length, MAX_HTTP_BODY)?;
                    Ok((wanted, Bytes::copy_from_slice(body)))
                });
                let answer = match wanted {
                    Ok((wanted, body)) => http_request(call.state, wanted, body).await,
                    Err(refusal) => Err(refusal),
                };
                call.api().respond(answer)
            })
        },
    )?;
    linker.func_wrap(
        NAMESPACE,
        "http_body_read",
        |mut caller: Caller<'_, GuestState>, pointer: i32, capacity: i32| -> i32 {
            let Call { memory, state } = Call::new(&mut caller);
            let copied = copy_out(memory, &state.api.http_body, pointer, capacity);
            match copied {
                Ok(length) => {
                    state.api.http_body.advance(unsigned(length));
                    length
                }
                Err(refusal) => state.api.refuse(refusal),
            }
        },
    )?;
    Ok(())
}

/// Sends a request by the way that is granted. It has a time of its own, which is no handler's.
async fn http_request(state: &mut GuestState, wanted: HttpRequest, body: Bytes) -> Answer {
    let (outbound, meter) = (Arc::clone(&state.outbound), Arc::clone(&state.api.meter));
    let request = OutboundRequest {
        method: wanted.method,
        url: wanted.url,
        headers: wanted.headers.into_iter().collect(),
        body,
        timeout: wanted.timeout_ms.map(Duration::from_millis),
    };
    let left = meter.handler_clock.pause();
    let what = state.api.access.counter.witness.is_some();
    let what = what.then(|| format!("{} {}", request.method, request.url));
    let outcome = outbound.request(request).await;
    meter.handler_clock.go_on(left);
    let outcome = outcome.map_err(|error| {
        let code = match error {
            OutboundError::Denied(_) => Code::Denied,
            OutboundError::Invalid(_) => Code::Invalid,
            OutboundError::Limit { .. } => Code::Limit,
            OutboundError::Timeout(_) => Code::Timeout,
            OutboundError::Unavailable(_) => Code::Unavailable,
        };
        Refusal::new(code, error.to_string())
    });
    if let Some(what) = what {
        let how = match &outcome {
            Ok(response) => response.status.to_string(),
            Err(refusal) => refusal.code.name().to_owned(),
        };
        state.api.witness(|| format!("{what} {how}"));
    }
    let response = outcome?;
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in response.headers {
        headers
            .entry(name)
            .and_modify(|values| {
                values.push_str(", ");
                values.push_str(&value);
            })
            .or_insert(value);
    }
    let head = HttpHead {
        status: response.status,
        headers,
        body_bytes: response.body.len(),
    };
    state.api.http_body = response.body;
    encode(&head)
}

async fn next_message(api: &mut Api, timeout_ms: i32) -> i32 {
    if !api.is_command {
        let refusal = "handlers get their messages by being called; only a command asks for them";
        return api.refuse(Refusal::new(Code::State, refusal));
    }
    if let Some(message) = api.current.take() {
        // What was at hand is over; if it wanted a reply, it has none.
        api.settle(message, None);
    }
    let incoming = match u64::try_from(timeout_ms) {
        Ok(timeout) => {
            let next = api.access.inbox.next();
            match tokio::time::timeout(Duration::from_millis(timeout), next).await {
                Ok(incoming) => incoming,
                Err(_) => return 0,
            }
        }
        Err(_) => api.access.inbox.next().await,
    };
    let message = api.message(incoming);
    let length = i32::try_from(message.text.len()).unwrap_or(i32::MAX);
    api.current = Some(message);
    length
}

fn check_request(request: &CacheRequest) -> Result<(), Refusal> {
    if request.keys.len() > MAX_KEYS {
        return Err(Refusal::invalid(format!(
            "keys has {} entries: give at most {MAX_KEYS}",
            request.keys.len()
        )));
    }
    match request.ttl_ms {
        Some(ttl) if ttl == 0 || ttl > MAX_PIN_MS => Err(Refusal::invalid(format!(
            "ttl_ms is {ttl}: give 1 to {MAX_PIN_MS}"
        ))),
        _ => Ok(()),
    }
}

async fn subscribe(api: &mut Api, wanted: Result<Subscription, Refusal>) -> Answer {
    api.access.terms.check_cache(CacheGrant::Events)?;
    let wanted = wanted?;
    wanted.check()?;
    let most_behind = api.access.terms.queued_events;
    let begun = ask(api, move |host, run| {
        host.subscribe(run, &wanted, most_behind)
    });
    let (cursor, mut source) = begun.await?;
    // The one before ends: its next batch finds nobody.
    api.access.inbox.renew_events();
    let events = api.access.inbox.events_in();
    // On the server's runtime, so that no lock of the data path is held at a guest's priority.
    if let Some(runtime) = &api.access.counter.runtime {
        let (tally, backlog) = (Arc::clone(&api.access.tally), source.backlog());
        tally.subscribed(backlog.clone());
        runtime.spawn(async move {
            loop {
                let batch = tokio::select! {
                    batch = source.next() => batch,
                    () = events.closed() => None,
                };
                let Some(batch) = batch else { break };
                if events.send(batch).await.is_err() {
                    break;
                }
            }
            tally.unsubscribed(&backlog);
        });
    }
    encode(&serde_json::json!({"cursor": cursor}))
}

/// Has the server do something with objects. What goes on for longer, such as loading, keeps no
/// other plugin's call waiting, and is given up when the guest ends or its time is over.
async fn change(api: &Api, request: CacheRequest) -> Result<CacheChange, Refusal> {
    let work = match ask(api, move |host, run| host.request(run, &request)).await? {
        CacheWork::Done(change) => return Ok(change),
        CacheWork::Pending(work) => work,
    };
    let Some(runtime) = &api.access.counter.runtime else {
        return Err(failed());
    };
    // Dropped, it ends what it runs.
    let mut task = JoinSet::new();
    task.spawn_on(work, runtime);
    let done = async move {
        match task.join_next().await {
            Some(Ok(change)) => Ok(change),
            _ => Err(failed()),
        }
    };
    aside(api, done).await
}

fn failed() -> Refusal {
    Refusal::new(
        Code::Unavailable,
        "the server failed at this call and goes on; its log says more",
    )
}

/// Has the server do something on a thread of its own while the guest sleeps. The processor
/// time that it takes is the guest's.
async fn ask<R: Send + 'static>(
    api: &Api,
    work: impl FnOnce(&dyn PluginHost, &PluginRun) -> Result<R, Refusal> + Send + 'static,
) -> Result<R, Refusal> {
    let counter = Arc::clone(&api.access.counter);
    let (Some(host), Some(runtime)) = (counter.host.clone(), counter.runtime.clone()) else {
        return Err(Refusal::new(
            Code::Unavailable,
            "there is no cache here: the plugin runs outside a server",
        ));
    };
    let (run, meter) = (api.access.run.clone(), Arc::clone(&api.meter));
    let done = async move {
        // Never closed.
        let _turn = counter.cache_calls.acquire().await.ok();
        let working = runtime.spawn_blocking(move || {
            let before = thread_time();
            let outcome = work(&*host, &run);
            let took = thread_time().saturating_sub(before);
            let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            meter
                .charged_nanoseconds
                .fetch_add(nanoseconds, Ordering::Relaxed);
            outcome
        });
        working.await.unwrap_or_else(|_| Err(failed()))
    };
    aside(api, done).await
}

/// Waits for something that is not the guest's work: its time is no handler's, and has the limit
/// of a host call.
async fn aside<R>(api: &Api, work: impl Future<Output = Result<R, Refusal>>) -> Result<R, Refusal> {
    let limit = api.host_call_time;
    let left = api.meter.handler_clock.pause();
    let outcome = tokio::time::timeout(limit, work).await;
    api.meter.handler_clock.go_on(left);
    outcome.unwrap_or_else(|_| {
        api.meter.hit(Limit::HostCallTime);
        Err(Refusal::new(
            Code::Timeout,
            format!(
                "it took longer than host_call_seconds, {} s",
                limit.as_secs()
            ),
        ))
    })
}

fn encode(value: &impl serde::Serialize) -> Answer {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|error| Refusal::new(Code::Unavailable, format!("the answer: {error}")))
}
