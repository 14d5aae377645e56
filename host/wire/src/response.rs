//! Replies, byte for byte as msgspec writes them for LMCache's server.

use std::sync::Arc;

use bytes::Bytes;
use rmp::encode::{self, ByteBuf};

use crate::frame::Envelope;
use crate::kv_event::{KvEvent, KvEventBatch};
use crate::slot::{SlotDescriptor, StoreSlot};

/// The result of an operation, by its type in LMCache's `transport/base.py`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Response {
    /// Nothing: the reply has no third frame.
    None,
    /// `noop`.
    Ok,
    /// `ping`, `commit_store`, `commit_retrieve`.
    Bool(bool),
    /// `get_chunk_size`, `p2p_lookup_and_lock`.
    Int(i64),
    /// `query_prefetch_status`, `wait_prefetch_status`: `None`, not done yet, is a reply
    /// without a third frame.
    OptionalInt(Option<i64>),
    /// `get_experimental`.
    Strings(Vec<Arc<str>>),
    /// `register_kv_cache_engine_driven_context`. An empty name and size 0 make clients
    /// send pickled tensors.
    Registered {
        /// The segment to map, as Python's `SharedMemory` takes it.
        shm_name: Arc<str>,
        /// Its bytes.
        pool_size: u64,
    },
    /// `prepare_store`: `Some` lists the chunks that are wanted, none if all are cached;
    /// `None` asks for a pickle with the commit.
    PrepareStore(Option<Vec<StoreSlot>>),
    /// `prepare_retrieve`.
    PrepareRetrieve {
        /// Whether the chunks are there.
        success: bool,
        /// A pickled list of tensors, empty when the bytes go through shared memory. Over
        /// 4 GiB cannot be sent in msgpack: the reply is then a miss.
        data: Bytes,
        /// Where the chunks are in shared memory; `None` otherwise.
        slots: Option<Vec<SlotDescriptor>>,
    },
    /// `store`, `retrieve`, `store_q`, `cb_retrieve_pre_computed`: an event handle of the
    /// engine's device runtime and whether it went well.
    Transferred {
        /// What the engine waits for; empty if nothing was started.
        event_handle: Bytes,
        /// Whether the blocks were transferred.
        success: bool,
    },
    /// `subscribe_kv_events`: one batch of the stream.
    KvEvents(KvEventBatch),
    /// `server_module_call`.
    ServerModule {
        /// Whether the handler ran to its end.
        success: bool,
        /// The module's own bytes.
        payload: Bytes,
        /// Why not, for people.
        error: Arc<str>,
    },
    /// `p2p_query_lookup_results`: that many keys, none of them found.
    P2pAddresses(u32),
}

/// The frames of a reply, after the peer's identity.
#[must_use]
pub fn reply(envelope: &Envelope, response: &Response) -> Vec<Bytes> {
    let mut frames = stream_end(envelope);
    frames.extend(payload(response));
    frames
}

/// The reply that ends a stream, and the one for a result of `None`: `[uid, operation]`.
#[must_use]
pub fn stream_end(envelope: &Envelope) -> Vec<Bytes> {
    vec![envelope.uid.clone(), envelope.operation.clone()]
}

/// A reply that LMCache's client turns into an exception at once, where silence would make
/// it wait for its timeout: the operation frame holds `error: <message>`.
///
/// The message is cut at 1 KiB; control characters become blanks.
#[must_use]
pub fn error_reply(envelope: &Envelope, message: &str) -> Vec<Bytes> {
    const MAX_MESSAGE_BYTES: usize = 1024;
    let cut = message.floor_char_boundary(MAX_MESSAGE_BYTES);
    let mut text = String::with_capacity("error: ".len() + cut);
    text.push_str("error: ");
    let shown = message.get(..cut).unwrap_or_default();
    text.extend(shown.chars().map(|c| if c.is_control() { ' ' } else { c }));
    let mut out = Encoder::default();
    out.str(&text);
    vec![envelope.uid.clone(), out.into_bytes()]
}

fn payload(response: &Response) -> Option<Bytes> {
    let mut out = Encoder::default();
    match response {
        Response::None | Response::OptionalInt(None) => return None,
        Response::Ok => out.str("OK"),
        Response::Bool(value) => out.bool(*value),
        Response::Int(value) | Response::OptionalInt(Some(value)) => out.int(*value),
        Response::Strings(strings) => {
            out.array(strings.len());
            for string in strings {
                out.str(string);
            }
        }
        Response::Registered {
            shm_name,
            pool_size,
        } => {
            out.map(2);
            out.str("shm_name");
            out.str(shm_name);
            out.str("pool_size");
            out.uint(*pool_size);
        }
        Response::PrepareStore(slots) => {
            out.map(1);
            out.str("context");
            out.store_context(slots.as_deref());
        }
        Response::PrepareRetrieve { data, .. } if !fits_bin(data) => {
            out.map(3);
            out.str("success");
            out.bool(false);
            out.str("data");
            out.bin(&[]);
            out.str("context");
            out.map(0);
        }
        Response::PrepareRetrieve {
            success,
            data,
            slots,
        } => {
            out.reserve(data.len());
            out.map(3);
            out.str("success");
            out.bool(*success);
            out.str("data");
            out.bin(data);
            out.str("context");
            out.retrieve_context(slots.as_deref());
        }
        Response::Transferred {
            event_handle,
            success,
        } => {
            out.array(2);
            out.bin(event_handle);
            out.bool(*success);
        }
        Response::KvEvents(batch) => out.kv_events(batch),
        Response::ServerModule { payload, .. } if !fits_bin(payload) => {
            out.map(3);
            out.str("success");
            out.bool(false);
            out.str("payload");
            out.bin(&[]);
            out.str("error");
            out.str("the module's answer is larger than msgpack can carry (4 GiB)");
        }
        Response::ServerModule {
            success,
            payload,
            error,
        } => {
            out.reserve(payload.len());
            out.map(3);
            out.str("success");
            out.bool(*success);
            out.str("payload");
            out.bin(payload);
            out.str("error");
            out.str(error);
        }
        Response::P2pAddresses(count) => {
            let Ok(_) = encode::write_array_len(&mut out.0, *count);
            for _ in 0..*count {
                out.map(2);
                out.str("offset");
                out.int(-1);
                out.str("size");
                out.int(0);
            }
        }
    }
    Some(out.into_bytes())
}

fn fits_bin(bytes: &[u8]) -> bool {
    u32::try_from(bytes.len()).is_ok()
}

/// Writes msgpack in the shortest form there is, as msgspec does.
#[derive(Default)]
struct Encoder(ByteBuf);

impl Encoder {
    fn into_bytes(self) -> Bytes {
        self.0.into_vec().into()
    }

    fn reserve(&mut self, bytes: usize) {
        // Room for what surrounds the bytes: field names, headers, an empty context.
        self.0.as_mut_vec().reserve(bytes + 64);
    }

    fn bool(&mut self, value: bool) {
        let Ok(()) = encode::write_bool(&mut self.0, value);
    }

    fn nil(&mut self) {
        let Ok(()) = encode::write_nil(&mut self.0);
    }

    fn int(&mut self, value: i64) {
        let Ok(_) = encode::write_sint(&mut self.0, value);
    }

    fn uint(&mut self, value: u64) {
        let Ok(_) = encode::write_uint(&mut self.0, value);
    }

    fn str(&mut self, value: &str) {
        let Ok(()) = encode::write_str(&mut self.0, value);
    }

    fn bin(&mut self, value: &[u8]) {
        let Ok(()) = encode::write_bin(&mut self.0, value);
    }

    fn map(&mut self, entries: u32) {
        let Ok(_) = encode::write_map_len(&mut self.0, entries);
    }

    /// Lists here hold values of many bytes each, so memory ends before 32 bits do.
    fn array(&mut self, len: usize) {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let Ok(_) = encode::write_array_len(&mut self.0, len);
    }

    fn slot(&mut self, slot: &SlotDescriptor) {
        self.map(4);
        self.str("offset");
        self.uint(slot.offset);
        self.str("length");
        self.uint(slot.length);
        self.str("shape");
        self.array(slot.shape.len());
        for &dim in slot.shape.iter() {
            self.uint(dim);
        }
        self.str("dtype");
        self.str(slot.dtype.torch_name());
    }

    fn store_context(&mut self, slots: Option<&[StoreSlot]>) {
        let Some(slots) = slots else {
            return self.map(0);
        };
        self.map(2);
        self.str("slots");
        self.array(slots.len());
        for slot in slots {
            self.slot(&slot.slot);
        }
        self.str("chunk_indices");
        self.array(slots.len());
        for slot in slots {
            self.uint(slot.chunk_index);
        }
    }

    fn retrieve_context(&mut self, slots: Option<&[SlotDescriptor]>) {
        let Some(slots) = slots else {
            return self.map(0);
        };
        self.map(1);
        self.str("slots");
        self.array(slots.len());
        for slot in slots {
            self.slot(slot);
        }
    }

    fn kv_events(&mut self, batch: &KvEventBatch) {
        self.map(5);
        self.str("enabled");
        self.bool(batch.enabled);
        self.str("incarnation");
        self.uint(batch.incarnation);
        self.str("next_cursor");
        self.uint(batch.next_cursor);
        self.str("lost");
        self.bool(batch.lost);
        self.str("events");
        self.array(batch.events.len());
        for event in &batch.events {
            self.kv_event(event);
        }
    }

    fn kv_event(&mut self, event: &KvEvent) {
        self.map(7);
        self.str("seq");
        self.uint(event.seq);
        self.str("kind");
        self.str(event.kind.name());
        self.str("medium");
        self.str("CPU");
        self.str("model_name");
        self.str(&event.model_name);
        self.str("block_hashes");
        self.array(event.block_hashes.len());
        for hash in &event.block_hashes {
            self.bin(hash);
        }
        self.str("parent_block_hash");
        match &event.parent_block_hash {
            Some(hash) => self.bin(hash),
            None => self.nil(),
        }
        self.str("token_ids");
        self.array(event.token_ids.len());
        for token in event.token_ids.iter() {
            self.uint(token.into());
        }
    }
}
