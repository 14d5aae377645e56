//! WASI 0.2's file calls, held to what those of preview 1 are: files open at once, and the time
//! one call may take.
//!
//! The calls themselves are wasmtime-wasi's. What is added here stands in front of them, under
//! the same names. Components get directories for reading only, so nothing here counts bytes.

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
        DynInputStream, DynOutputStream, FsError, FsResult, InputStream, Pollable, StreamError,
        StreamResult,
        bindings::filesystem::types::{self, ErrorCode, HostDescriptor, HostDirectoryEntryStream},
    },
};

use super::{
    filesystem::{Files, HostCallTimeout, in_time},
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
        fn set_size(size: u64) -> ();
        fn set_times(accessed: types::NewTimestamp, modified: types::NewTimestamp) -> ();
        fn read(length: u64, offset: u64) -> (Vec<u8>, bool);
        fn write(bytes: Vec<u8>, offset: u64) -> u64;
        fn read_directory() -> Resource<types::DirectoryEntryStream>;
        fn sync() -> ();
        fn create_directory_at(path: String) -> ();
        fn stat() -> types::DescriptorStat;
        fn stat_at(flags: types::PathFlags, path: String) -> types::DescriptorStat;
        fn set_times_at(flags: types::PathFlags, path: String, accessed: types::NewTimestamp, modified: types::NewTimestamp) -> ();
        fn link_at(flags: types::PathFlags, path: String, to: Descriptor, to_path: String) -> ();
        fn readlink_at(path: String) -> String;
        fn remove_directory_at(path: String) -> ();
        fn rename_at(path: String, to: Descriptor, to_path: String) -> ();
        fn unlink_file_at(path: String) -> ();
        fn metadata_hash() -> types::MetadataHashValue;
        fn metadata_hash_at(flags: types::PathFlags, path: String) -> types::MetadataHashValue;
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
            patience: Patience {
                meter,
                limit,
                is_over: false,
            },
            _open: OpenStream::new(self.files.streams()),
        });
        Ok(self.wasi.table.push(stream)?)
    }

    fn write_via_stream(
        &mut self,
        file: Descriptor,
        offset: u64,
    ) -> FsResult<Resource<DynOutputStream>> {
        self.wasi.write_via_stream(file, offset)
    }

    fn append_via_stream(&mut self, file: Descriptor) -> FsResult<Resource<DynOutputStream>> {
        self.wasi.append_via_stream(file)
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
            patience: Patience {
                meter: Arc::default(),
                limit: Duration::from_millis(20),
                is_over: false,
            },
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
