//! Modules that are called rather than run: a handler for each message, asleep in between.

use std::collections::BTreeMap;

use tokio::time::Instant;
use wasmtime::{Instance, Store, TypedFunc};

use super::guest::GuestState;
use crate::{
    host_api::{Handler, Incoming, Message, Outcome},
    log_stream::LogLevel,
};

/// Where C++ constructors, Go's runtime and the like are set up.
const INITIALIZE: &str = "_initialize";

type Handlers = BTreeMap<Handler, TypedFunc<i32, i32>>;

/// Sets the module up; what comes with instantiating, and within its time.
pub(super) async fn initialize(
    store: &mut Store<GuestState>,
    instance: &Instance,
) -> wasmtime::Result<()> {
    if let Ok(initialize) = instance.get_typed_func::<(), ()>(&mut *store, INITIALIZE) {
        initialize.call_async(&mut *store, ()).await?;
    }
    Ok(())
}

/// Brings messages to their handlers until the plugin is to end.
pub(super) async fn serve(
    store: &mut Store<GuestState>,
    instance: &Instance,
) -> wasmtime::Result<()> {
    let mut handlers = Handlers::new();
    for handler in Handler::ALL {
        // The types were checked before the module was run.
        if let Ok(function) = instance.get_typed_func::<i32, i32>(&mut *store, handler.export()) {
            handlers.insert(handler, function);
        }
    }
    let start = store.data_mut().api.start_message();
    deliver(store, &handlers, start).await?;
    // Starting is over, and its time.
    let meter = store.data_mut().api.meter();
    meter.has_started();
    loop {
        let api = &mut store.data_mut().api;
        let incoming = api.access.inbox.next().await;
        let is_last = matches!(incoming, Incoming::Shutdown);
        let message = api.message(incoming);
        deliver(store, &handlers, message).await?;
        if is_last {
            return Ok(());
        }
    }
}

/// Calls the handler of a message. An error is one that ends the run: a trap, or an exit.
async fn deliver(
    store: &mut Store<GuestState>,
    handlers: &Handlers,
    message: Message,
) -> wasmtime::Result<()> {
    let handler = message.handler;
    let api = &mut store.data_mut().api;
    let Some(function) = handlers.get(&handler) else {
        if matches!(message.wants, crate::host_api::Wants::Nothing) {
            return Ok(());
        }
        let name = &api.access.run.plugin;
        let failure = match handler {
            // Told apart from an order that is garbage.
            Handler::Rank => None,
            _ => Some(format!("plugin `{name}` exports no {}", handler.export())),
        };
        api.settle(message, failure);
        return Ok(());
    };
    let length = i32::try_from(message.text.len()).unwrap_or(i32::MAX);
    let time = api.access.terms.call_time;
    api.current = Some(message);
    let meter = api.meter();
    // Starting has the time of starting.
    if handler != Handler::Start {
        meter.handler_clock.start(handler, Instant::now() + time);
    }
    let outcome = function.call_async(&mut *store, length).await;
    if let Some(left) = meter.handler_clock.stop() {
        meter.called(time.saturating_sub(left));
    }
    let api = &mut store.data_mut().api;
    let message = api.current.take();
    let code = match outcome {
        Ok(code) => code,
        Err(error) => {
            // Whoever waits for a reply learns of the end by the loss of the message.
            api.access.tally.handled(handler, Outcome::Trap);
            return Err(error);
        }
    };
    let failure = (code != 0).then(|| format!("{} returned {code}", handler.export()));
    if let Some(failure) = &failure {
        api.output().log(LogLevel::Warn, failure.as_bytes());
    }
    if let Some(message) = message {
        api.settle(message, failure);
    }
    Ok(())
}
