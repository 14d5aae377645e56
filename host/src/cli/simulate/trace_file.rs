//! LMCache's two kinds of traces: lookup-hash logs and traces of its storage manager.
//!
//! The logs are JSON lines (`mp_observability/subscribers/logging/lookup_hash.py`); the
//! traces are length-prefixed msgpack frames (`mp_observability/trace/format.py`, with the
//! arguments of each call as `trace/codecs.py` encodes them).

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead as _, BufReader, BufWriter, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail, ensure};
use rmpv::Value;
use serde::{Deserialize, Serialize};
use stockade_cache::{
    CacheSalt, ChunkHash, KeyScope,
    simulator::{Trace, TraceRequest},
};

/// Largest frame of a storage trace: more keys than a request can have.
const MAX_FRAME_BYTES: u64 = 1 << 30;

/// The version of the frames that is understood.
const STORAGE_FORMAT: u64 = 1;

/// One line of a lookup-hash log. Other fields are left out.
#[derive(Debug, Serialize, Deserialize)]
struct LookupLine {
    #[serde(default)]
    timestamp: f64,
    #[serde(default)]
    request_id: String,
    #[serde(default)]
    model_name: String,
    chunk_size: u64,
    seq_len: u64,
    #[serde(default)]
    dtypes: Vec<String>,
    #[serde(default)]
    shapes: Vec<Vec<u64>>,
    chunk_hashes: Vec<String>,
}

/// A request, before all files are put in order of time.
struct Dated {
    time: f64,
    scopes: Vec<Arc<KeyScope>>,
    hashes: Vec<ChunkHash>,
    tokens: u64,
    chunk_tokens: u64,
    object_bytes: u64,
    is_lookup: bool,
}

/// Collects requests and gives equal scopes one allocation, by which traces compare them.
struct Collector<'a> {
    model: Option<&'a str>,
    bytes_per_chunk: Option<u64>,
    requests: Vec<Dated>,
    scopes: HashMap<KeyScope, Arc<KeyScope>>,
    skipped: u64,
}

/// Reads files and directories of either kind into one trace, in order of time.
pub(super) fn read(
    paths: &[PathBuf],
    model: Option<&str>,
    bytes_per_chunk: Option<u64>,
) -> anyhow::Result<Trace> {
    let mut collector = Collector {
        model,
        bytes_per_chunk,
        requests: Vec::new(),
        scopes: HashMap::new(),
        skipped: 0,
    };
    for path in paths {
        for file in files_of(path)? {
            let _ = writeln!(std::io::stderr(), "reading {}", file.display());
            collector
                .read_file(&file)
                .with_context(|| format!("--trace {}", file.display()))?;
        }
    }
    if collector.skipped > 0 {
        let skipped = collector.skipped;
        let _ = writeln!(std::io::stderr(), "{skipped} malformed lines were left out");
    }
    let mut requests = collector.requests;
    requests.sort_by(|a, b| a.time.total_cmp(&b.time));
    let mut trace = Trace::default();
    for request in &requests {
        trace.push(TraceRequest {
            scopes: &request.scopes,
            hashes: &request.hashes,
            tokens: request.tokens,
            chunk_tokens: request.chunk_tokens,
            object_bytes: request.object_bytes,
            is_lookup: request.is_lookup,
        });
    }
    Ok(trace)
}

/// The file itself, or the lookup-hash logs of a directory.
fn files_of(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let listing = || format!("--trace {} cannot be listed", path.display());
    let mut files = Vec::new();
    for entry in path.read_dir().with_context(listing)? {
        let file = entry.with_context(listing)?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("lookup_hashes_") && name.ends_with(".jsonl") {
            files.push(file);
        }
    }
    files.sort();
    ensure!(
        !files.is_empty(),
        "--trace {} has no lookup_hashes_*.jsonl: name the files",
        path.display()
    );
    Ok(files)
}

impl Collector<'_> {
    fn read_file(&mut self, path: &Path) -> anyhow::Result<()> {
        let mut file = BufReader::new(File::open(path).context("cannot be opened")?);
        let first = file.fill_buf().context("cannot be read")?.first().copied();
        match first {
            // A frame begins with its length, of which the first byte is never that large.
            Some(b'{') => self.read_lines(file),
            Some(_) => self.read_frames(file),
            None => Ok(()),
        }
    }

    fn read_lines(&mut self, file: BufReader<File>) -> anyhow::Result<()> {
        for line in file.lines() {
            let line = line.context("cannot be read")?;
            if line.trim().is_empty() {
                continue;
            }
            let parsed = serde_json::from_str::<LookupLine>(&line).ok();
            let hashes = parsed.as_ref().and_then(|line| {
                let hashes = line.chunk_hashes.iter();
                hashes.map(|hash| parse_hash(hash)).collect::<Option<_>>()
            });
            match (parsed, hashes) {
                (Some(line), Some(hashes)) => self.take_line(&line, hashes)?,
                // As LMCache's own reader does: the last line of a killed server is cut.
                _ => self.skipped += 1,
            }
        }
        Ok(())
    }

    fn take_line(&mut self, line: &LookupLine, hashes: Vec<ChunkHash>) -> anyhow::Result<()> {
        if self.model.is_some_and(|model| model != line.model_name) {
            return Ok(());
        }
        let object_bytes = match self.bytes_per_chunk {
            Some(bytes) => bytes,
            None => layout_bytes(&line.shapes, &line.dtypes).context(
                "a line does not say how large its chunks are: give --kv-bytes-per-chunk",
            )?,
        };
        ensure!(
            object_bytes > 0,
            "--kv-bytes-per-chunk 0: give a number above 0"
        );
        let scope = self.scope(&line.model_name, 0, 0);
        self.requests.push(Dated {
            time: line.timestamp,
            scopes: vec![scope],
            hashes,
            tokens: line.seq_len,
            chunk_tokens: line.chunk_size,
            object_bytes,
            is_lookup: true,
        });
        Ok(())
    }

    fn read_frames(&mut self, mut file: BufReader<File>) -> anyhow::Result<()> {
        let header = next_frame(&mut file)?.context("is empty")?;
        let version = field(&header, "format_version").and_then(Value::as_u64);
        ensure!(
            field(&header, "magic").and_then(Value::as_slice) == Some(b"LMCT"),
            "is neither a lookup-hash log nor a storage trace of LMCache"
        );
        ensure!(
            version == Some(STORAGE_FORMAT),
            "has trace format {version:?}, and {STORAGE_FORMAT} is understood"
        );
        let level = field(&header, "level").and_then(Value::as_str);
        ensure!(
            level == Some("storage"),
            "was recorded with --trace-level {}: record it with --trace-level storage",
            level.unwrap_or("?")
        );
        while let Some(record) = next_frame(&mut file)? {
            let name = field(&record, "qualname").and_then(Value::as_str);
            let args = field(&record, "args");
            let (Some(name), Some(args)) = (name, args) else {
                bail!("has a record without a name or arguments");
            };
            let time = field(&record, "t_mono").and_then(Value::as_f64);
            let time = time.unwrap_or_default();
            if name.ends_with(".submit_prefetch_task") {
                self.take_lookup(time, args)
                    .context("has a lookup in another shape than LMCache 0.5.6 writes")?;
            } else if name.ends_with(".reserve_write") {
                self.take_store(time, args)
                    .context("has a store in another shape than LMCache 0.5.6 writes")?;
            }
        }
        Ok(())
    }

    /// A lookup: one group of keys per rank and object group, over the same chunks.
    fn take_lookup(&mut self, time: f64, args: &Value) -> Option<()> {
        let spec = unwrap(field(args, "spec")?)?;
        let mut scopes = Vec::new();
        let mut hashes = Vec::new();
        let mut object_bytes = 0;
        for group in field(spec, "key_groups")?.as_array()? {
            let group = unwrap(group)?;
            // A sliding window needs the last chunks only, which is no prefix.
            if field(group, "sliding_window_size")?.as_i64()? != -1 {
                continue;
            }
            let keys = self.keys(field(group, "keys")?)?;
            let Some((scope, _)) = keys.first() else {
                continue;
            };
            scopes.push(Arc::clone(scope));
            hashes = keys.into_iter().map(|(_, hash)| hash).collect();
            object_bytes = encoded_layout_bytes(field(group, "layout_desc")?)?;
        }
        self.push_call(time, scopes, hashes, object_bytes, true);
        Some(())
    }

    fn take_store(&mut self, time: f64, args: &Value) -> Option<()> {
        let object_bytes = encoded_layout_bytes(field(args, "layout_desc")?)?;
        let keys = self.keys(field(args, "keys")?)?;
        for run in keys.chunk_by(|(a, _), (b, _)| Arc::ptr_eq(a, b)) {
            let scopes = run.first().map(|(scope, _)| Arc::clone(scope));
            let hashes = run.iter().map(|&(_, hash)| hash).collect();
            self.push_call(
                time,
                scopes.into_iter().collect(),
                hashes,
                object_bytes,
                false,
            );
        }
        Some(())
    }

    /// Calls name no tokens, so chunks count as one token each.
    fn push_call(
        &mut self,
        time: f64,
        scopes: Vec<Arc<KeyScope>>,
        hashes: Vec<ChunkHash>,
        object_bytes: u64,
        is_lookup: bool,
    ) {
        let is_wanted =
            |scope: &Arc<KeyScope>| self.model.is_none_or(|model| model == &*scope.model_name);
        let object_bytes = self.bytes_per_chunk.unwrap_or(object_bytes);
        if hashes.is_empty() || object_bytes == 0 || !scopes.iter().all(is_wanted) {
            return;
        }
        self.requests.push(Dated {
            time,
            scopes,
            tokens: hashes.len() as u64,
            hashes,
            chunk_tokens: 1,
            object_bytes,
            is_lookup,
        });
    }

    fn keys(&mut self, keys: &Value) -> Option<Vec<(Arc<KeyScope>, ChunkHash)>> {
        let keys = keys.as_array()?.iter();
        keys.map(|key| {
            let key = unwrap(key)?;
            let model = field(key, "model_name")?.as_str()?;
            let rank = u32::try_from(field(key, "kv_rank")?.as_u64()?).ok()?;
            let group = field(key, "object_group_id").and_then(Value::as_u64);
            let group = u32::try_from(group.unwrap_or(0)).ok()?;
            let hash = chunk_hash(field(key, "chunk_hash")?.as_slice()?);
            Some((self.scope(model, rank, group), hash))
        })
        .collect()
    }

    fn scope(&mut self, model: &str, kv_rank: u32, object_group_id: u32) -> Arc<KeyScope> {
        let scope = KeyScope {
            model_name: Arc::from(model),
            kv_rank,
            object_group_id,
            // Neither kind of trace says whose request it was.
            cache_salt: CacheSalt::default(),
        };
        match self.scopes.get(&scope) {
            Some(known) => Arc::clone(known),
            None => {
                let known = Arc::new(scope.clone());
                self.scopes.insert(scope, Arc::clone(&known));
                known
            }
        }
    }
}

/// Reads a frame behind its length; `None` at the end of the file, or where the last frame
/// was cut.
fn next_frame(file: &mut BufReader<File>) -> anyhow::Result<Option<Value>> {
    let mut length = [0; 4];
    match file.read_exact(&mut length) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error).context("cannot be read"),
    }
    let length = u64::from(u32::from_be_bytes(length));
    ensure!(length <= MAX_FRAME_BYTES, "has a frame of {length} bytes");
    let mut frame = Vec::new();
    file.take(length)
        .read_to_end(&mut frame)
        .context("cannot be read")?;
    if (frame.len() as u64) < length {
        return Ok(None);
    }
    let value = rmpv::decode::read_value(&mut frame.as_slice());
    value.map(Some).context("has a frame that is no msgpack")
}

fn field<'v>(value: &'v Value, name: &str) -> Option<&'v Value> {
    let fields = value.as_map()?;
    fields
        .iter()
        .find_map(|(key, value)| (key.as_str() == Some(name)).then_some(value))
}

/// The content of an encoded object: `{"__t__": its type, "v": content}`.
fn unwrap(value: &Value) -> Option<&Value> {
    field(value, "v")
}

fn encoded_layout_bytes(layout: &Value) -> Option<u64> {
    let layout = unwrap(layout)?;
    let shapes = field(layout, "shapes")?.as_array()?.iter();
    let shapes: Option<Vec<Vec<u64>>> = shapes
        .map(|shape| shape.as_array()?.iter().map(Value::as_u64).collect())
        .collect();
    let dtypes = field(layout, "dtypes")?.as_array()?.iter();
    let dtypes: Option<Vec<String>> = dtypes
        .map(|dtype| Some(dtype.as_str()?.to_owned()))
        .collect();
    layout_bytes(&shapes?, &dtypes?)
}

/// Bytes of tensors of these shapes; `None` without any, or with a dtype that is unknown.
fn layout_bytes(shapes: &[Vec<u64>], dtypes: &[String]) -> Option<u64> {
    let mut sum = 0_u64;
    for (shape, dtype) in shapes.iter().zip(dtypes) {
        // As Python writes a dtype, or its bare name.
        let width = match dtype.trim_start_matches("torch.") {
            "float64" | "int64" => 8,
            "float32" | "int32" => 4,
            "float16" | "bfloat16" | "int16" => 2,
            "uint8" | "int8" | "bool" => 1,
            narrow if narrow.starts_with("float8_") => 1,
            _ => return None,
        };
        let bytes = shape
            .iter()
            .try_fold(width, |product: u64, &side| product.checked_mul(side))?;
        sum = sum.checked_add(bytes)?;
    }
    (sum > 0).then_some(sum)
}

/// A hash as the logs write it, `0x` and digits; other lengths than ours are padded.
fn parse_hash(text: &str) -> Option<ChunkHash> {
    let digits = text.strip_prefix("0x")?.as_bytes();
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    // A number instead of bytes may have an odd number of digits.
    let (head, pairs) = digits.split_at(digits.len() % 2);
    let mut bytes: Vec<u8> = head
        .iter()
        .map(|&byte| digit(byte))
        .collect::<Option<_>>()?;
    for pair in pairs.chunks_exact(2) {
        let [high, low] = *pair else { return None };
        bytes.push(digit(high)? << 4 | digit(low)?);
    }
    Some(chunk_hash(&bytes))
}

fn chunk_hash(bytes: &[u8]) -> ChunkHash {
    let mut hash = [0; 32];
    for (place, byte) in hash.iter_mut().zip(bytes) {
        *place = *byte;
    }
    ChunkHash(hash)
}

/// Writes a trace as a lookup-hash log, one second between requests.
pub(super) fn write(path: &Path, trace: &Trace) -> anyhow::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for (nth, request) in trace.requests().enumerate() {
        let Some(scope) = request.scopes.first() else {
            continue;
        };
        let line = LookupLine {
            timestamp: nth as f64,
            request_id: format!("request-{nth}"),
            model_name: scope.model_name.to_string(),
            chunk_size: request.chunk_tokens,
            seq_len: request.tokens,
            dtypes: vec!["uint8".to_owned()],
            shapes: vec![vec![request.object_bytes]],
            chunk_hashes: request
                .hashes
                .iter()
                .map(|hash| format!("0x{hash}"))
                .collect(),
        };
        serde_json::to_writer(&mut file, &line)?;
        file.write_all(b"\n")?;
    }
    Ok(file.flush()?)
}
