//! Operation names and the frozen numbers older clients send instead.

use std::fmt;

macro_rules! operations {
    ($($variant:ident $name:literal $legacy:tt),+ $(,)?) => {
        /// An RPC operation of LMCache 0.5.6 (`transport/base.py`, `transport/zmq_impl/wire.py`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Operation {
            $(#[doc = concat!("`", $name, "`")] $variant,)+
        }

        impl Operation {
            /// Every operation, in LMCache's order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The stable snake-case name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// The number sent instead of the name, for operations that had one before
            /// LMCache went over to names.
            #[must_use]
            pub const fn legacy_id(self) -> Option<u64> {
                match self { $(Self::$variant => operations!(@id $legacy)),+ }
            }

            /// The operation of that name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)+ _ => None }
            }
        }
    };
    (@id none) => { None };
    (@id $id:literal) => { Some($id) };
}

operations! {
    RegisterKvCache "register_kv_cache" 1,
    UnregisterKvCache "unregister_kv_cache" 2,
    RegisterQCache "register_q_cache" 3,
    UnregisterQCache "unregister_q_cache" 4,
    StoreQ "store_q" 5,
    Store "store" 6,
    Retrieve "retrieve" 7,
    Lookup "lookup" 8,
    QueryPrefetchStatus "query_prefetch_status" 9,
    WaitPrefetchStatus "wait_prefetch_status" 10,
    FreeLookupLocks "free_lookup_locks" 12,
    EndSession "end_session" 13,
    RegisterKvCacheEngineDrivenContext "register_kv_cache_engine_driven_context" 14,
    UnregisterKvCacheEngineDrivenContext "unregister_kv_cache_engine_driven_context" 15,
    PrepareStore "prepare_store" 16,
    CommitStore "commit_store" 17,
    PrepareRetrieve "prepare_retrieve" 18,
    CommitRetrieve "commit_retrieve" 19,
    Clear "clear" 20,
    GetChunkSize "get_chunk_size" 21,
    Ping "ping" 22,
    ReportBlockAllocation "report_block_allocation" 23,
    Noop "noop" 24,
    CbRegisterRope "cb_register_rope" 25,
    CbUnregisterRope "cb_unregister_rope" 26,
    CbRetrievePreComputed "cb_retrieve_pre_computed" 27,
    CbUnifiedLookup "cb_unified_lookup" 28,
    P2pLookupAndLock "p2p_lookup_and_lock" 29,
    P2pQueryLookupResults "p2p_query_lookup_results" 30,
    P2pUnlockObjects "p2p_unlock_objects" 31,
    GetExperimental "get_experimental" 32,
    CbProtocolHandshake "cb_protocol_handshake" 33,
    CbReorderPlan "cb_reorder_plan" none,
    SubscribeKvEvents "subscribe_kv_events" none,
    ServerModuleCall "server_module_call" none,
}

impl Operation {
    /// The operation with that frozen number; 0, 11 (retired) and anything above 33 are none.
    #[must_use]
    pub fn from_legacy_id(id: u64) -> Option<Self> {
        // The first 32 entries of ALL are in number order with one gap at 11.
        let index = match id {
            1..=10 => id - 1,
            12..=33 => id - 2,
            _ => return None,
        };
        Self::ALL.get(usize::try_from(index).ok()?).copied()
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn names_and_numbers_lead_back_to_the_operation() {
        for &operation in Operation::ALL {
            assert_eq!(Operation::from_name(operation.name()), Some(operation));
            if let Some(id) = operation.legacy_id() {
                assert_eq!(
                    Operation::from_legacy_id(id),
                    Some(operation),
                    "{operation}"
                );
            }
        }
        let numbered = (0..=40).filter_map(Operation::from_legacy_id).count();
        assert_eq!(numbered, 32);
        for retired_or_unknown in [0, 11, 34, u64::MAX] {
            assert_eq!(Operation::from_legacy_id(retired_or_unknown), None);
        }
        assert_eq!(Operation::from_name("cb_register_rope_v3"), None);
    }
}
