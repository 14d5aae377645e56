//! From the server's calls of exports to the methods of a plugin.

use std::cell::RefCell;

use crate::{
    Call, EventBatch, HandlerResult, Message, Rank, Shutdown, Start, Timer, error, reply,
    reply_order,
};

/// A reactor: the server calls these methods, one at a time, and it is asleep in between.
///
/// An error is logged and counted, and the plugin goes on; an error of [`Plugin::start`] ends it.
/// A method that takes longer than the manifest's `call_ms` ends the plugin.
pub trait Plugin: Sized + 'static {
    /// Called once. Timers and subscriptions are made here.
    ///
    /// # Errors
    /// What keeps the plugin from running; the supervisor restarts it as its manifest says.
    fn start(start: &Start) -> HandlerResult<Self>;

    /// A timer is due.
    ///
    /// # Errors
    /// Logged and counted.
    fn timer(&mut self, timer: &Timer) -> HandlerResult {
        let _ = timer;
        Ok(())
    }

    /// Something happened in the cache that the plugin subscribed to.
    ///
    /// # Errors
    /// Logged and counted.
    fn events(&mut self, batch: &EventBatch) -> HandlerResult {
        let _ = batch;
        Ok(())
    }

    /// The plugin is to end; it ends when this returns.
    ///
    /// # Errors
    /// Logged and counted.
    fn shutdown(&mut self, shutdown: &Shutdown) -> HandlerResult {
        let _ = shutdown;
        Ok(())
    }
}

/// A plugin that serves calls. Needs `calls = true` in its manifest.
pub trait Callable: Plugin {
    /// Answers a call with the bytes of its reply.
    ///
    /// # Errors
    /// The caller gets `success=false`.
    fn call(&mut self, call: &Call) -> HandlerResult<Vec<u8>>;
}

/// A plugin that ranks candidates for eviction. Needs `rank = true` in its manifest.
pub trait Ranker: Plugin {
    /// The ids of candidates, first to go first. Those that are left out follow in the native order.
    ///
    /// # Errors
    /// The native order is used for this call, and the fallback is counted.
    fn rank(&mut self, rank: &Rank) -> HandlerResult<Vec<u32>>;
}

/// Exports a [`Plugin`] as a reactor, in a crate of type `cdylib`.
///
/// ```
/// # use stockade_plugin::*;
/// # struct Mine;
/// # impl Plugin for Mine { fn start(_: &Start) -> HandlerResult<Self> { Ok(Self) } }
/// # impl Callable for Mine { fn call(&mut self, _: &Call) -> HandlerResult<Vec<u8>> { Ok(vec![]) } }
/// # impl Ranker for Mine { fn rank(&mut self, _: &Rank) -> HandlerResult<Vec<u32>> { Ok(vec![]) } }
/// stockade_plugin::export_plugin!(Mine: Callable, Ranker);
/// # fn main() {}
/// ```
///
/// After the type come the traits beyond [`Plugin`] that it implements: [`Callable`], [`Ranker`],
/// both in this order, or none. What the macro writes contains the `unsafe` attributes by which a
/// function gets its exported name, so the crate can `deny(unsafe_code)` but not `forbid` it.
#[macro_export]
macro_rules! export_plugin {
    ($plugin:ty) => { $crate::export_plugin!(@module $plugin, {}); };
    ($plugin:ty: Callable) => { $crate::export_plugin!(@module $plugin, { Callable }); };
    ($plugin:ty: Ranker) => { $crate::export_plugin!(@module $plugin, { Ranker }); };
    ($plugin:ty: Callable, Ranker) => { $crate::export_plugin!(@module $plugin, { Callable Ranker }); };
    (@module $plugin:ty, { $($further:ident)* }) => {
        #[cfg(target_arch = "wasm32")]
        #[allow(unsafe_code, reason = "an exported name cannot be had without it")]
        mod stockade_plugin_exports {
            use super::*;

            ::std::thread_local! {
                static EXPORTED: $crate::Exported<$plugin> = const { $crate::Exported::new() };
            }

            unsafe extern "C" { safe fn __wasm_call_ctors(); }

            // Without a call of the constructors the linker would wrap every export in one.
            #[unsafe(no_mangle)]
            extern "C" fn _initialize() { __wasm_call_ctors(); }

            #[unsafe(no_mangle)]
            extern "C" fn stockade_start(length: i32) -> i32 {
                $crate::run(length, |message| EXPORTED.with(|it| it.start(message)))
            }
            #[unsafe(no_mangle)]
            extern "C" fn stockade_timer(length: i32) -> i32 {
                $crate::run(length, |message| EXPORTED.with(|it| it.timer(message)))
            }
            #[unsafe(no_mangle)]
            extern "C" fn stockade_events(length: i32) -> i32 {
                $crate::run(length, |message| EXPORTED.with(|it| it.events(message)))
            }
            #[unsafe(no_mangle)]
            extern "C" fn stockade_shutdown(length: i32) -> i32 {
                $crate::run(length, |message| EXPORTED.with(|it| it.shutdown(message)))
            }
            $( $crate::export_plugin!(@further $further); )*
        }
        #[cfg(not(target_arch = "wasm32"))]
        const _: fn() = || {
            // The same must compile where tests run.
            fn check<T: $crate::Plugin $(+ $crate::$further)*>() {}
            check::<$plugin>();
        };
    };
    (@further Callable) => {
        #[unsafe(no_mangle)]
        extern "C" fn stockade_call(length: i32) -> i32 {
            $crate::run(length, |message| EXPORTED.with(|it| it.call(message)))
        }
    };
    (@further Ranker) => {
        #[unsafe(no_mangle)]
        extern "C" fn stockade_rank(length: i32) -> i32 {
            $crate::run(length, |message| EXPORTED.with(|it| it.rank(message)))
        }
    };
}

/// The one instance of an exported plugin. For [`export_plugin!`] only.
#[doc(hidden)]
pub struct Exported<P>(RefCell<Option<P>>);

impl<P> Default for Exported<P> {
    fn default() -> Self {
        Self::new()
    }
}

#[doc(hidden)]
#[allow(missing_docs, reason = "for the macro only")]
impl<P> Exported<P> {
    #[must_use]
    pub const fn new() -> Self {
        Self(RefCell::new(None))
    }

    fn with<T>(&self, handle: impl FnOnce(&mut P) -> HandlerResult<T>) -> HandlerResult<T> {
        let mut plugin = self.0.try_borrow_mut()?;
        handle(plugin.as_mut().ok_or("the plugin has not started")?)
    }
}

fn wrong(wanted: &str) -> HandlerResult {
    Err(format!("the server sent another message than {wanted}").into())
}

#[doc(hidden)]
#[allow(missing_docs, reason = "for the macro only")]
impl<P: Plugin> Exported<P> {
    pub fn start(&self, message: &Message) -> HandlerResult {
        let Message::Start(start) = message else {
            return wrong("start");
        };
        let plugin = P::start(start)?;
        *self.0.try_borrow_mut()? = Some(plugin);
        Ok(())
    }

    pub fn timer(&self, message: &Message) -> HandlerResult {
        match message {
            Message::Timer(timer) => self.with(|plugin| plugin.timer(timer)),
            _ => wrong("timer"),
        }
    }

    pub fn events(&self, message: &Message) -> HandlerResult {
        match message {
            Message::Events(batch) => self.with(|plugin| plugin.events(batch)),
            _ => wrong("events"),
        }
    }

    pub fn shutdown(&self, message: &Message) -> HandlerResult {
        match message {
            Message::Shutdown(shutdown) => self.with(|plugin| plugin.shutdown(shutdown)),
            _ => wrong("shutdown"),
        }
    }

    pub fn call(&self, message: &Message) -> HandlerResult
    where
        P: Callable,
    {
        match message {
            Message::Call(call) => Ok(reply(&self.with(|plugin| plugin.call(call))?)?),
            _ => wrong("call"),
        }
    }

    pub fn rank(&self, message: &Message) -> HandlerResult
    where
        P: Ranker,
    {
        match message {
            Message::Rank(rank) => Ok(reply_order(&self.with(|plugin| plugin.rank(rank))?)?),
            _ => wrong("rank"),
        }
    }
}

/// Reads the message of `length` bytes, hands it on, and logs what goes wrong.
#[doc(hidden)]
pub fn run(length: i32, handle: impl FnOnce(&Message) -> HandlerResult) -> i32 {
    let outcome = Message::read(usize::try_from(length).unwrap_or_default())
        .map_err(Into::into)
        .and_then(|message| handle(&message));
    match outcome {
        Ok(()) => 0,
        Err(reason) => {
            error!("{reason}");
            1
        }
    }
}
