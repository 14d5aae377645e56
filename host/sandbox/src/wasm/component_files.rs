//! WASI 0.2's file calls, held to what those of preview 1 are: files open at once, bytes that lie
//! in writable directories, and the time one call may take.
//!
//! The calls themselves are wasmtime-wasi's. What is added here stands in front of them, under
//! the same names. A stream that writes does so while its guest goes on, so what it takes counts
//! from the moment it takes it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use wasmtime::component::{HasData, Linker, Resource};
use wasmtime_wasi::{
    async_trait,
    filesystem::{WasiFilesystemCtxView, WasiFilesystemView as _},
    p2::{
        DynInputStream, DynOutputStream, FsError, FsResult, InputStream, OutputStream, Pollable,
        StreamError, StreamResult,
        bindings::filesystem::types::{self, ErrorCode, HostDescriptor, HostDirectoryEntryStream},
    },
};

use super::{
    directory_quota::Quota,
    filesystem::{ENTRY_BYTES, Files, HostCallTimeout, in_time},
    guest::{GuestState, Meter},
};

/// Puts the bounded calls in the place of the unbounded ones.
pub(super) fn add_to_linker(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    types::add_to_linker::<GuestState, BoundedFiles<'static>>(linker, |state| BoundedFiles {
        wasi: state.wasi.filesystem(),
        files: &state.files,
    })?;
    linker.allow_shadowing(false);
    Ok(())
}

struct BoundedFiles<'a> {
    wasi: WasiFilesystemCtxView<'a>,
    files: &'a Files,
}

impl HasData for BoundedFiles<'static> {
    type Data<'a> = BoundedFiles<'a>;
}

impl BoundedFiles<'_> {
    async fn in_time<T>(files: &Files, call: impl Future<Output = FsResult<T>>) -> FsResult<T> {
        let (meter, limit) = files.of_calls();
        in_time(meter, limit, call, FsError::trap).await
    }

    /// # Errors
    /// What the guest gets when it has too many files open.
    fn check_open(&mut self) -> FsResult<()> {
        match self.files.may_open(self.wasi.table) {
            true => Ok(()),
            // There is no code that says what EMFILE does.
            false => Err(ErrorCode::Quota.into()),
        }
    }

    /// # Errors
    /// What the guest gets when its writable directories have no room.
    async fn reserve(&mut self, bytes: u64, entries: u64) -> FsResult<()> {
        let Self { wasi, files } = self;
        let reserving = async { Ok(files.reserve(wasi.table, bytes, entries).await) };
        match Self::in_time(files, reserving).await? {
            true => Ok(()),
            false => Err(ErrorCode::InsufficientSpace.into()),
        }
    }

    /// Puts a stream that writes, as `open` makes it, under the limits.
    fn writer(
        &mut self,
        open: impl FnOnce(&mut WasiFilesystemCtxView<'_>) -> FsResult<Resource<DynOutputStream>>,
    ) -> FsResult<Resource<DynOutputStream>> {
        // A stream keeps its file open, also when the descriptor is given back.
        self.check_open()?;
        let stream = open(&mut self.wasi)?;
        let stream = self.wasi.table.delete(stream)?;
        let (meter, limit) = self.files.of_calls();
        let stream: DynOutputStream = Box::new(FileWriter {
            stream,
            patience: Patience::new(meter, limit),
            quota: self.files.quota(self.wasi.table),
            on_the_way: 0,
            room: Room::Unknown,
            _open: OpenStream::new(self.files.streams()),
        });
        Ok(self.wasi.table.push(stream)?)
    }
}

impl types::Host for BoundedFiles<'_> {
    fn convert_error_code(&mut self, error: FsError) -> wasmtime::Result<ErrorCode> {
        self.wasi.convert_error_code(error)
    }

    fn filesystem_error_code(
        &mut self,
        error: Resource<wasmtime::Error>,
    ) -> wasmtime::Result<Option<ErrorCode>> {
        self.wasi.filesystem_error_code(error)
    }
}

type Descriptor = Resource<types::Descriptor>;

/// Passes calls on, each within the time of a call.
macro_rules! pass_on {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $output:ty;)*) => {$(
        async fn $name(&mut self, file: Descriptor, $($arg: $type),*) -> FsResult<$output> {
            let Self { wasi, files } = self;
            Self::in_time(files, wasi.$name(file, $($arg),*)).await
        }
    )*};
}

impl HostDescriptor for BoundedFiles<'_> {
    pass_on! {
        fn advise(offset: u64, length: u64, advice: types::Advice) -> ();
        fn sync_data() -> ();
        fn get_flags() -> types::DescriptorFlags;
        fn get_type() -> types::DescriptorType;
        fn set_times(accessed: types::NewTimestamp, modified: types::NewTimestamp) -> ();
        fn read(length: u64, offset: u64) -> (Vec<u8>, bool);
        fn read_directory() -> Resource<types::DirectoryEntryStream>;
        fn sync() -> ();
        fn stat() -> types::DescriptorStat;
        fn stat_at(flags: types::PathFlags, path: String) -> types::DescriptorStat;
        fn set_times_at(flags: types::PathFlags, path: String, accessed: types::NewTimestamp, modified: types::NewTimestamp) -> ();
        fn readlink_at(path: String) -> String;
        fn remove_directory_at(path: String) -> ();
        fn rename_at(path: String, to: Descriptor, to_path: String) -> ();
        fn unlink_file_at(path: String) -> ();
        fn metadata_hash() -> types::MetadataHashValue;
        fn metadata_hash_at(flags: types::PathFlags, path: String) -> types::MetadataHashValue;
    }

    async fn set_size(&mut self, file: Descriptor, size: u64) -> FsResult<()> {
        self.reserve(size, 0).await?;
        let Self { wasi, files } = self;
        Self::in_time(files, wasi.set_size(file, size)).await
    }

    async fn write(&mut self, file: Descriptor, bytes: Vec<u8>, offset: u64) -> FsResult<u64> {
        self.reserve(u64::try_from(bytes.len()).unwrap_or(u64::MAX), 0)
            .await?;
        let Self { wasi, files } = self;
        Self::in_time(files, wasi.write(file, bytes, offset)).await
    }

    async fn create_directory_at(&mut self, directory: Descriptor, path: String) -> FsResult<()> {
        self.reserve(ENTRY_BYTES, 1).await?;
        let Self { wasi, files } = self;
        Self::in_time(files, wasi.create_directory_at(directory, path)).await
    }

    async fn link_at(
        &mut self,
        directory: Descriptor,
        flags: types::PathFlags,
        path: String,
        to: Descriptor,
        to_path: String,
    ) -> FsResult<()> {
        self.reserve(ENTRY_BYTES, 1).await?;
        let Self { wasi, files } = self;
        let link = wasi.link_at(directory, flags, path, to, to_path);
        Self::in_time(files, link).await
    }

    async fn open_at(
        &mut self,
        directory: Descriptor,
        path_flags: types::PathFlags,
        path: String,
        open_flags: types::OpenFlags,
        flags: types::DescriptorFlags,
    ) -> FsResult<Descriptor> {
        self.check_open()?;
        if open_flags.contains(types::OpenFlags::CREATE) {
            self.reserve(ENTRY_BYTES, 1).await?;
        }
        let Self { wasi, files } = self;
        let open = wasi.open_at(directory, path_flags, path, open_flags, flags);
        Self::in_time(files, open).await
    }

    /// As for modules: whoever works in the directory on the host could follow one that leads out.
    async fn symlink_at(&mut self, _: Descriptor, _: String, _: String) -> FsResult<()> {
        Err(ErrorCode::NotPermitted.into())
    }

    async fn is_same_object(
        &mut self,
        one: Descriptor,
        other: Descriptor,
    ) -> wasmtime::Result<bool> {
        let (meter, limit) = self.files.of_calls();
        let call = self.wasi.is_same_object(one, other);
        in_time(meter, limit, call, Into::into).await
    }

    fn read_via_stream(
        &mut self,
        file: Descriptor,
        offset: u64,
    ) -> FsResult<Resource<DynInputStream>> {
        // A stream keeps its file open, also when the descriptor is given back.
        self.check_open()?;
        let stream = self.wasi.read_via_stream(file, offset)?;
        let stream = self.wasi.table.delete(stream)?;
        let (meter, limit) = self.files.of_calls();
        let stream: DynInputStream = Box::new(FileStream {
            stream,
            patience: Patience::new(meter, limit),
            _open: OpenStream::new(self.files.streams()),
        });
        Ok(self.wasi.table.push(stream)?)
    }

    fn write_via_stream(
        &mut self,
        file: Descriptor,
        offset: u64,
    ) -> FsResult<Resource<DynOutputStream>> {
        self.writer(|wasi| wasi.write_via_stream(file, offset))
    }

    fn append_via_stream(&mut self, file: Descriptor) -> FsResult<Resource<DynOutputStream>> {
        self.writer(|wasi| wasi.append_via_stream(file))
    }

    fn drop(&mut self, file: Descriptor) -> wasmtime::Result<()> {
        HostDescriptor::drop(&mut self.wasi, file)
    }
}

impl HostDirectoryEntryStream for BoundedFiles<'_> {
    async fn read_directory_entry(
        &mut self,
        stream: Resource<types::DirectoryEntryStream>,
    ) -> FsResult<Option<types::DirectoryEntry>> {
        // The entries were read with the directory.
        self.wasi.read_directory_entry(stream).await
    }

    fn drop(&mut self, stream: Resource<types::DirectoryEntryStream>) -> wasmtime::Result<()> {
        HostDirectoryEntryStream::drop(&mut self.wasi, stream)
    }
}

/// Counts a stream for as long as it lives.
struct OpenStream(Arc<AtomicUsize>);

impl OpenStream {
    fn new(count: Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A file's stream whose calls end the guest when one takes too long.
struct FileStream {
    stream: DynInputStream,
    patience: Patience,
    _open: OpenStream,
}

/// The time that calls of a stream may take.
struct Patience {
    meter: Arc<Meter>,
    limit: Duration,
    /// A call has taken too long, and the next says so: waiting cannot.
    is_over: bool,
}

impl Patience {
    fn new(meter: Arc<Meter>, limit: Duration) -> Self {
        Self {
            meter,
            limit,
            is_over: false,
        }
    }

    async fn wait<T>(&mut self, call: impl Future<Output = T>) -> StreamResult<T> {
        let late = |timeout: HostCallTimeout| StreamError::Trap(timeout.into());
        let meter = Arc::clone(&self.meter);
        let outcome = in_time(meter, self.limit, async { Ok(call.await) }, late).await;
        self.is_over |= outcome.is_err();
        outcome
    }

    fn check(&self) -> StreamResult<()> {
        match self.is_over {
            true => Err(StreamError::Trap(HostCallTimeout(self.limit).into())),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl Pollable for FileStream {
    async fn ready(&mut self) {
        if !self.patience.is_over {
            let _ = self.patience.wait(self.stream.ready()).await;
        }
    }
}

#[async_trait]
impl InputStream for FileStream {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        self.patience.check()?;
        self.stream.read(size)
    }

    async fn blocking_read(&mut self, size: usize) -> StreamResult<Bytes> {
        self.patience.check()?;
        self.patience.wait(self.stream.blocking_read(size)).await?
    }

    /// Giving a stream back waits for what it still reads.
    async fn cancel(&mut self) {
        let _ = self.patience.wait(self.stream.cancel()).await;
    }
}

/// What a stream knows of the room for what it writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    /// As much as was counted.
    Unknown,
    /// None was counted: waiting measures.
    ToMeasure,
    /// It was just measured.
    Measured,
}

/// A file's stream whose bytes count from when they are taken, and whose calls end the guest when
/// one takes too long.
struct FileWriter {
    stream: DynOutputStream,
    patience: Patience,
    quota: Arc<Quota>,
    /// What the stream has taken and not yet written.
    on_the_way: u64,
    room: Room,
    _open: OpenStream,
}

impl FileWriter {
    fn no_room(&mut self) -> StreamError {
        self.quota.refused();
        self.room = Room::Unknown;
        // As the file system itself says it, which the guest can ask for as a code.
        let full = std::io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        StreamError::LastOperationFailed(full.into())
    }

    fn has_written(&mut self) {
        self.quota.written(std::mem::take(&mut self.on_the_way));
    }

    fn take(&mut self, bytes: u64) -> bool {
        let has_room = self.quota.write(bytes);
        if has_room {
            self.on_the_way += bytes;
        }
        has_room
    }
}

fn length(bytes: &Bytes) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[async_trait]
impl Pollable for FileWriter {
    async fn ready(&mut self) {
        if self.patience.is_over {
            return;
        }
        let Self {
            stream,
            quota,
            patience,
            on_the_way,
            room,
            ..
        } = self;
        let waiting = async {
            stream.ready().await;
            // Before it is measured, which would count it a second time.
            quota.written(std::mem::take(on_the_way));
            if *room == Room::ToMeasure {
                // Where it cannot be told there is no room, which the next look finds.
                quota.measure().await;
                *room = Room::Measured;
            }
        };
        // That it took too long is told by the next call.
        let _ = patience.wait(waiting).await;
    }
}

#[async_trait]
impl OutputStream for FileWriter {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.patience.check()?;
        // Another stream can have taken the room that this one was told of.
        if !self.take(length(&bytes)) {
            return Err(self.no_room());
        }
        self.room = Room::Unknown;
        self.stream.write(bytes)
    }

    async fn blocking_write_and_flush(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.patience.check()?;
        let bytes_long = length(&bytes);
        if !self.take(bytes_long) {
            let quota = Arc::clone(&self.quota);
            self.patience.wait(quota.measure()).await?;
            if !self.take(bytes_long) {
                return Err(self.no_room());
            }
        }
        let Self {
            stream, patience, ..
        } = self;
        let written = patience
            .wait(stream.blocking_write_and_flush(bytes))
            .await?;
        self.has_written();
        written
    }

    fn flush(&mut self) -> StreamResult<()> {
        self.patience.check()?;
        self.stream.flush()
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        self.patience.check()?;
        let most = self.stream.check_write()?;
        if most == 0 {
            return Ok(0);
        }
        match (self.quota.room(), self.room) {
            (0, Room::Measured) => Err(self.no_room()),
            (0, _) => {
                self.room = Room::ToMeasure;
                Ok(0)
            }
            (room, _) => Ok(usize::try_from(room).unwrap_or(usize::MAX).min(most)),
        }
    }

    /// Giving a stream back waits for what it still writes.
    async fn cancel(&mut self) {
        let Self {
            stream, patience, ..
        } = self;
        if patience.wait(stream.cancel()).await.is_ok() {
            self.has_written();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic, reason = "a test fails by panicking")]
    use super::*;
    use crate::limit::Limit;

    /// A file of a server that does not answer.
    struct Hangs;

    #[async_trait]
    impl Pollable for Hangs {
        async fn ready(&mut self) {
            std::future::pending().await
        }
    }

    #[async_trait]
    impl InputStream for Hangs {
        fn read(&mut self, _size: usize) -> StreamResult<Bytes> {
            Ok(Bytes::new())
        }

        async fn cancel(&mut self) {
            std::future::pending().await
        }
    }

    fn stream() -> FileStream {
        FileStream {
            stream: Box::new(Hangs),
            patience: Patience::new(Arc::default(), Duration::from_millis(20)),
            _open: OpenStream::new(Arc::default()),
        }
    }

    fn is_timeout<T>(outcome: &StreamResult<T>) -> bool {
        matches!(outcome, Err(StreamError::Trap(error)) if error.is::<HostCallTimeout>())
    }

    #[tokio::test]
    async fn reading_ends_in_time() {
        let mut stream = stream();
        assert!(is_timeout(&stream.blocking_read(1).await));
        assert!(is_timeout(&stream.blocking_read(1).await));
        assert_eq!(stream.patience.meter.hits().of(Limit::HostCallTime), 1);
    }

    #[tokio::test]
    async fn waiting_ends_in_time_and_the_next_read_says_so() {
        let mut stream = stream();
        assert!(stream.read(1).is_ok());
        stream.ready().await;
        assert!(is_timeout(&stream.read(1)));
        assert_eq!(stream.patience.meter.hits().of(Limit::HostCallTime), 1);
    }

    #[tokio::test]
    async fn giving_it_back_ends_in_time() {
        let mut stream = stream();
        stream.cancel().await;
        assert_eq!(stream.patience.meter.hits().of(Limit::HostCallTime), 1);
    }
}
