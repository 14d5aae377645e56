//! The one place with `unsafe`: the declarations of the imports, and the four calls by which the
//! server writes into this module's memory.
#![allow(
    unsafe_code,
    reason = "imports cannot be declared, nor memory handed out, without it"
)]

// Pointers of `safe` functions are only read by the server, which checks them against the memory
// of this module, so no argument can do harm.
#[link(wasm_import_module = "stockade:plugin/v1")]
unsafe extern "C" {
    #[link_name = "answer_read"]
    fn answer_read(ptr: *mut u8, cap: usize) -> i32;
    #[link_name = "message_read"]
    fn message_read(ptr: *mut u8, cap: usize) -> i32;
    #[link_name = "message_body_read"]
    fn message_body_read(ptr: *mut u8, cap: usize) -> i32;
    #[link_name = "http_body_read"]
    fn http_body_read_into(ptr: *mut u8, cap: usize) -> i32;

    #[link_name = "answer_length"]
    pub(crate) safe fn answer_length() -> i32;
    #[link_name = "next_message"]
    pub(crate) safe fn next_message(timeout_ms: i32) -> i32;
    #[link_name = "config"]
    pub(crate) safe fn config() -> i32;
    #[link_name = "clock_ms"]
    pub(crate) safe fn clock_ms() -> i64;
    #[link_name = "cache_stats"]
    pub(crate) safe fn cache_stats() -> i32;

    #[link_name = "reply"]
    safe fn raw_reply(ptr: *const u8, len: usize) -> i32;
    #[link_name = "log"]
    safe fn raw_log(level: i32, ptr: *const u8, len: usize) -> i32;
    #[link_name = "timer_set"]
    safe fn raw_timer_set(ptr: *const u8, len: usize, after_ms: i32, every_ms: i32) -> i32;
    #[link_name = "timer_cancel"]
    safe fn raw_timer_cancel(ptr: *const u8, len: usize) -> i32;
    #[link_name = "state_get"]
    safe fn raw_state_get(ptr: *const u8, len: usize) -> i32;
    #[link_name = "state_set"]
    safe fn raw_state_set(key: *const u8, key_len: usize, value: *const u8, len: usize) -> i32;
    #[link_name = "state_delete"]
    safe fn raw_state_delete(ptr: *const u8, len: usize) -> i32;
    #[link_name = "state_keys"]
    safe fn raw_state_keys(ptr: *const u8, len: usize) -> i32;
    #[link_name = "metric_add"]
    safe fn raw_metric_add(ptr: *const u8, len: usize, value: f64) -> i32;
    #[link_name = "metric_set"]
    safe fn raw_metric_set(ptr: *const u8, len: usize, value: f64) -> i32;
    #[link_name = "cache_keys"]
    safe fn raw_cache_keys(ptr: *const u8, len: usize) -> i32;
    #[link_name = "cache_request"]
    safe fn raw_cache_request(ptr: *const u8, len: usize) -> i32;
    #[link_name = "events_subscribe"]
    safe fn raw_events_subscribe(ptr: *const u8, len: usize) -> i32;
    #[link_name = "http_request"]
    safe fn raw_http_request(ptr: *const u8, len: usize, body: *const u8, body_len: usize) -> i32;
}

/// Fills a vector of `length` bytes; shorter where the server has less.
fn filled(length: usize, read: unsafe extern "C" fn(*mut u8, usize) -> i32) -> Vec<u8> {
    let mut bytes = vec![0; length];
    // SAFETY: `bytes` has `length` bytes that are ours alone, and the server writes no more.
    let copied = unsafe { read(bytes.as_mut_ptr(), length) };
    bytes.truncate(usize::try_from(copied).unwrap_or_default());
    bytes
}

pub(crate) fn answer(length: usize) -> Vec<u8> {
    filled(length, answer_read)
}

pub(crate) fn message(length: usize) -> Vec<u8> {
    filled(length, message_read)
}

pub(crate) fn message_body(length: usize) -> Vec<u8> {
    filled(length, message_body_read)
}

pub(crate) fn http_body_read(buffer: &mut [u8]) -> i32 {
    // SAFETY: `buffer` is ours alone, and the server writes no more than its length.
    unsafe { http_body_read_into(buffer.as_mut_ptr(), buffer.len()) }
}

pub(crate) fn reply(bytes: &[u8]) -> i32 {
    raw_reply(bytes.as_ptr(), bytes.len())
}

pub(crate) fn log(level: i32, line: &str) -> i32 {
    raw_log(level, line.as_ptr(), line.len())
}

pub(crate) fn timer_set(name: &str, after_ms: i32, every_ms: i32) -> i32 {
    raw_timer_set(name.as_ptr(), name.len(), after_ms, every_ms)
}

pub(crate) fn timer_cancel(name: &str) -> i32 {
    raw_timer_cancel(name.as_ptr(), name.len())
}

pub(crate) fn state_get(key: &str) -> i32 {
    raw_state_get(key.as_ptr(), key.len())
}

pub(crate) fn state_set(key: &str, value: &[u8]) -> i32 {
    raw_state_set(key.as_ptr(), key.len(), value.as_ptr(), value.len())
}

pub(crate) fn state_delete(key: &str) -> i32 {
    raw_state_delete(key.as_ptr(), key.len())
}

pub(crate) fn state_keys(prefix: &str) -> i32 {
    raw_state_keys(prefix.as_ptr(), prefix.len())
}

pub(crate) fn metric_add(name: &str, value: f64) -> i32 {
    raw_metric_add(name.as_ptr(), name.len(), value)
}

pub(crate) fn metric_set(name: &str, value: f64) -> i32 {
    raw_metric_set(name.as_ptr(), name.len(), value)
}

pub(crate) fn cache_keys(query: &[u8]) -> i32 {
    raw_cache_keys(query.as_ptr(), query.len())
}

pub(crate) fn cache_request(request: &[u8]) -> i32 {
    raw_cache_request(request.as_ptr(), request.len())
}

pub(crate) fn events_subscribe(request: &[u8]) -> i32 {
    raw_events_subscribe(request.as_ptr(), request.len())
}

pub(crate) fn http_request(request: &[u8], body: &[u8]) -> i32 {
    raw_http_request(request.as_ptr(), request.len(), body.as_ptr(), body.len())
}
