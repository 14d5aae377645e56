//! `server_module_call`: an RPC of an LMCache client to a plugin.
//!
//! Follows `ext_server_module.py` of LMCache 0.5.6: a method is named `<module>.<what>`, request and
//! reply are the module's own bytes, and whatever goes wrong is `success=False` with a sentence. A
//! module is a plugin here, and its reply is waited for beside the connection's other requests.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use stockade_cache::CacheSalt;
use stockade_sandbox::CallFailure;
use stockade_transport::{Frames, Peer};
use stockade_wire::{Operation, Request, Response, reply};

use super::Service;
use crate::{
    plugin_host::TenantScope,
    tenancy::{Caller, Denial},
};

impl Service {
    /// Decodes a call, has its plugin answer it, and encodes the reply.
    pub(super) async fn module_call(
        self: Arc<Self>,
        peer: Arc<Peer>,
        frames: Frames,
    ) -> Option<Frames> {
        let started = Instant::now();
        let (envelope, request) = match stockade_wire::decode(frames, &self.limits) {
            Ok(decoded) => decoded,
            Err(rejected) => return self.reject(&peer, &rejected),
        };
        let Request::ServerModuleCall {
            module,
            method,
            payload,
        } = request
        else {
            return None;
        };
        let method = match module.is_empty() {
            true => method,
            false => format!("{module}.{method}"),
        };
        let caller = self.tenancy.caller(&peer);
        let called = self.call_plugin(&caller, &method, payload);
        let deadline = self.settings.deadline;
        let outcome = match tokio::time::timeout(deadline, called).await {
            Ok(outcome) => outcome.map_err(|failure| failure.to_string()),
            Err(_) => Err(format!(
                "plugin `{module}` gave no reply within --request-deadline-seconds"
            )),
        };
        let operation = Operation::ServerModuleCall;
        self.metrics.answered(operation, started.elapsed());
        let response = match outcome {
            Ok(payload) => Response::ServerModule {
                success: true,
                payload,
                error: "".into(),
            },
            Err(reason) => {
                self.refused(operation.name(), "method", &reason);
                Response::ServerModule {
                    success: false,
                    payload: Bytes::new(),
                    error: reason.into(),
                }
            }
        };
        Some(reply(&envelope, &response))
    }

    /// A tenant's plugin serves that tenant alone; to others it is not there.
    async fn call_plugin(
        &self,
        caller: &Caller,
        method: &str,
        payload: Bytes,
    ) -> Result<Bytes, CallFailure> {
        let nobody = || CallFailure::NoPlugin(method.chars().take(128).collect());
        let plugins = self.plugins.get().and_then(std::sync::Weak::upgrade);
        let plugins = plugins.ok_or_else(nobody)?;
        let plugin = plugins.serving(method).ok_or_else(nobody)?;
        let scope = TenantScope::of_plugin(&self.tenancy, &plugin);
        if scope
            .tenant()
            .is_some_and(|tenant| **tenant != *caller.realm().name())
        {
            let audit = self.tenancy.audit();
            audit.denied(caller, Denial::Plugin, "server_module_call", None);
            return Err(nobody());
        }
        // That of the caller's requests without one.
        let salt = caller.salt(&CacheSalt::default()).unwrap_or_default();
        plugins.call(method, salt.as_str(), "zmq", payload).await
    }
}
