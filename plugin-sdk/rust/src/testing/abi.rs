//! The imports as the double answers them.

use serde_json::{Value, json};

use super::{Grant, INSTALLED, Recorded, State, Timer};
use crate::{Error, ErrorCode, Level, http::Request};

/// Runs `call` on this thread's double. Without one, every call is refused.
fn on_double<T>(otherwise: T, call: impl FnOnce(&mut State) -> T) -> T {
    let installed = INSTALLED.with_borrow(Clone::clone);
    match installed {
        Some(state) => call(&mut state.borrow_mut()),
        None => otherwise,
    }
}

fn recorded(
    import: &'static str,
    arguments: Value,
    call: impl FnOnce(&mut State) -> Result<Vec<u8>, Error>,
) -> i32 {
    on_double(ErrorCode::Unavailable.number(), |state| {
        let result = call(state);
        let result = state.settled(result);
        state.recorded.push(Recorded {
            import,
            arguments,
            result,
        });
        result
    })
}

fn text(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes)
        .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(bytes).into_owned()))
}

/// The first `length` bytes.
fn head(bytes: &[u8], length: usize) -> Vec<u8> {
    bytes.iter().take(length).copied().collect()
}

pub(crate) fn answer_length() -> i32 {
    on_double(0, |state| {
        i32::try_from(state.answer.len()).unwrap_or_default()
    })
}

pub(crate) fn answer(length: usize) -> Vec<u8> {
    let none = b"there is no server: make a stockade_plugin::testing::Host first".to_vec();
    on_double(none, |state| head(&state.answer, length))
}

pub(crate) fn message(length: usize) -> Vec<u8> {
    on_double(Vec::new(), |state| head(&state.message, length))
}

pub(crate) fn message_body(length: usize) -> Vec<u8> {
    on_double(Vec::new(), |state| head(&state.message_body, length))
}

pub(crate) fn next_message(timeout_ms: i32) -> i32 {
    on_double(ErrorCode::Unavailable.number(), |state| {
        if let Some(message) = state.messages.pop_front() {
            return state.deliver(message);
        }
        // Nobody else moves this clock, so waiting is jumping to what comes next.
        let until_ms = match timeout_ms {
            ..0 => i64::MAX,
            timeout => state.now_ms + i64::from(timeout),
        };
        if let Some(timer) = state.next_timer(until_ms) {
            return state.deliver(crate::Message::Timer(timer));
        }
        if timeout_ms < 0 {
            let reason = "nothing would ever come: send the double a message first";
            return state.refused(&Error::new(ErrorCode::Unavailable, reason));
        }
        state.now_ms = until_ms;
        0
    })
}

pub(crate) fn reply(bytes: &[u8]) -> i32 {
    recorded("reply", text(bytes), |state| {
        if !std::mem::take(&mut state.wants_reply) {
            let reason = "no message waits for a reply";
            return Err(Error::new(ErrorCode::State, reason));
        }
        state.reply = Some(bytes.to_vec());
        Ok(Vec::new())
    })
}

pub(crate) fn log(level: i32, line: &str) -> i32 {
    let level = Level::from_number(level);
    on_double(ErrorCode::Unavailable.number(), |state| {
        state.logs.push((level, line.to_owned()));
        0
    })
}

pub(crate) fn config() -> i32 {
    recorded("config", json!([]), |state| {
        Ok(state.config.to_string().into_bytes())
    })
}

pub(crate) fn clock_ms() -> i64 {
    on_double(0, |state| state.now_ms)
}

pub(crate) fn timer_set(name: &str, after_ms: i32, every_ms: i32) -> i32 {
    let arguments = json!({"name": name, "after_ms": after_ms, "every_ms": every_ms});
    recorded("timer_set", arguments, |state| {
        if name.is_empty() || after_ms < 0 || every_ms < 0 {
            let reason = "a timer has a name, and no time below 0";
            return Err(Error::new(ErrorCode::Invalid, reason));
        }
        state.timers.retain(|timer| timer.name != name);
        state.timers.push(Timer {
            name: name.to_owned(),
            due_ms: state.now_ms + i64::from(after_ms),
            every_ms: i64::from(every_ms),
        });
        Ok(Vec::new())
    })
}

pub(crate) fn timer_cancel(name: &str) -> i32 {
    recorded("timer_cancel", json!({"name": name}), |state| {
        let before = state.timers.len();
        state.timers.retain(|timer| timer.name != name);
        match state.timers.len() < before {
            true => Ok(Vec::new()),
            false => Err(Error::new(
                ErrorCode::NotFound,
                format!("there is no timer `{name}`"),
            )),
        }
    })
}

fn no_key(key: &str) -> Error {
    Error::new(ErrorCode::NotFound, format!("there is no state `{key}`"))
}

pub(crate) fn state_get(key: &str) -> i32 {
    recorded("state_get", json!({"key": key}), |state| {
        state.state_granted()?;
        state.state.get(key).cloned().ok_or_else(|| no_key(key))
    })
}

pub(crate) fn state_set(key: &str, value: &[u8]) -> i32 {
    let arguments = json!({"key": key, "value": text(value)});
    recorded("state_set", arguments, |state| {
        state.state_granted()?;
        let others = state.state.iter().filter(|(held, _)| *held != key);
        let used: usize = others.map(|(key, value)| key.len() + value.len()).sum();
        if used + key.len() + value.len() > state.state_limit {
            let reason = "the state would exceed state_kib of the plugin's manifest";
            return Err(Error::new(ErrorCode::Limit, reason));
        }
        state.state.insert(key.to_owned(), value.to_vec());
        Ok(Vec::new())
    })
}

pub(crate) fn state_delete(key: &str) -> i32 {
    recorded("state_delete", json!({"key": key}), |state| {
        state.state_granted()?;
        let removed = state.state.remove(key);
        removed.map(|_| Vec::new()).ok_or_else(|| no_key(key))
    })
}

pub(crate) fn state_keys(prefix: &str) -> i32 {
    recorded("state_keys", json!({"prefix": prefix}), |state| {
        state.state_granted()?;
        let keys = state.state.keys().filter(|key| key.starts_with(prefix));
        crate::error::written(&keys.collect::<Vec<_>>())
    })
}

pub(crate) fn metric_add(name: &str, value: f64) -> i32 {
    let arguments = json!({"name": name, "value": value});
    recorded("metric_add", arguments, |state| {
        if !value.is_finite() || value < 0.0 {
            let reason = format!("value {value}: a counter only grows");
            return Err(Error::new(ErrorCode::Invalid, reason));
        }
        *state.counters.entry(name.to_owned()).or_default() += value;
        Ok(Vec::new())
    })
}

pub(crate) fn metric_set(name: &str, value: f64) -> i32 {
    let arguments = json!({"name": name, "value": value});
    recorded("metric_set", arguments, |state| {
        state.gauges.insert(name.to_owned(), value);
        Ok(Vec::new())
    })
}

pub(crate) fn cache_stats() -> i32 {
    recorded("cache_stats", json!([]), |state| {
        state.granted(Grant::Stats)?;
        crate::error::written(&state.stats)
    })
}

pub(crate) fn cache_keys(query: &[u8]) -> i32 {
    recorded("cache_keys", text(query), |state| state.cache_keys(query))
}

pub(crate) fn cache_request(request: &[u8]) -> i32 {
    recorded("cache_request", text(request), |state| {
        state.cache_request(request)
    })
}

pub(crate) fn events_subscribe(request: &[u8]) -> i32 {
    recorded("events_subscribe", text(request), |state| {
        state.granted(Grant::Events)?;
        let wanted: crate::cache::Subscription = serde_json::from_slice(request)
            .map_err(|error| Error::new(ErrorCode::Invalid, error.to_string()))?;
        let cursor = wanted.cursor.unwrap_or_default();
        state.subscription = Some(wanted);
        crate::error::written(&json!({"cursor": cursor}))
    })
}

pub(crate) fn http_request(request: &[u8], body: &[u8]) -> i32 {
    let mut arguments = text(request);
    if !body.is_empty() {
        arguments["body"] = text(body);
    }
    let answer = |state: &mut State| {
        let mut asked: Request = serde_json::from_slice(request)
            .map_err(|error| Error::new(ErrorCode::Invalid, error.to_string()))?;
        asked.body = body.to_vec();
        let Some(responder) = &mut state.responder else {
            let reason = format!(
                "{} is not granted: add an [[http]] table to the plugin's manifest",
                asked.url
            );
            return Err(Error::new(ErrorCode::Denied, reason));
        };
        let (mut response, body) = responder(&asked)?;
        response.body_bytes = body.len() as u64;
        state.body = body.into();
        crate::error::written(&response)
    };
    recorded("http_request", arguments, answer)
}

pub(crate) fn http_body_read(buffer: &mut [u8]) -> i32 {
    on_double(ErrorCode::Unavailable.number(), |state| {
        let copied = buffer.len().min(state.body.len());
        for (to, from) in buffer.iter_mut().zip(state.body.drain(..copied)) {
            *to = from;
        }
        i32::try_from(copied).unwrap_or(i32::MAX)
    })
}
