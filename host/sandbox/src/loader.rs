//! Finds plugin files and tells what they are.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fmt, fs,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    limit::Limit,
    manifest::Manifest,
    policy::{Origin, PluginFiles, Policy},
    provenance::{MAX_SIGNATURE_BYTES, SIGNATURE_SUFFIX, Sha256Digest},
};

/// How deep directories are searched.
const MAX_DEPTH: usize = 16;
/// Most files and directories that are looked at below all locations.
const MAX_ENTRIES: usize = 100_000;
/// Most plugins of one server.
const MAX_PLUGINS: usize = 10_000;
/// Largest plugin file that is read, in bytes.
pub const MAX_MODULE_BYTES: u64 = 16 << 20;

/// What a plugin is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PluginKind {
    /// A WASI module, binary or text, run in the sandbox.
    Wasm,
    /// A script run as a child process.
    Script,
}

impl PluginKind {
    /// The name in the API and in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Wasm => "wasm",
            Self::Script => "script",
        }
    }

    /// The kind by a file's extension; `None` for files that are no plugins.
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "wasm" | "wat" => Some(Self::Wasm),
            "py" | "sh" => Some(Self::Script),
            _ => None,
        }
    }
}

/// Why a plugin cannot be run, and the limit that says so, if one does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// One sentence that names the file or field, and the way out.
    pub reason: String,
    /// What it was over.
    pub limit: Option<Limit>,
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self {
            reason,
            limit: None,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.reason)
    }
}

/// A plugin that was found, whether it can be run or not.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its name in logs: the file's stem, the whole file name when stems collide, and with
    /// `~2` and so on behind it when file names do.
    pub name: Arc<str>,
    /// What it is.
    pub kind: PluginKind,
    /// The file, as reached through its location.
    pub path: PathBuf,
    /// Its bytes: what is hashed, checked and, of a module, run is this, not the file. None of a
    /// file that cannot be read.
    pub bytes: Arc<[u8]>,
    /// The digest of the bytes; `None` where they could not be read.
    pub sha256: Option<Sha256Digest>,
    /// What its manifest asks for and the server's policy leaves of that; of a manifest that
    /// cannot be used, the defaults.
    pub manifest: Manifest,
    /// How much is known of where it comes from, or why it must not run.
    pub origin: Result<Origin, Refusal>,
}

/// What tells that a plugin's files changed without reading them: of the plugin, its manifest
/// and its signature.
pub type Stamp = [Option<FileStamp>; 3];

/// Of one file: inode, size, and the times of its last change in nanoseconds.
pub type FileStamp = (u64, u64, i128, i128);

/// Why locations cannot be searched; the server does not start then. A file that was found and
/// cannot be used is no such error: it is refused, and costs only itself.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A location or a directory below it cannot be read.
    #[error("plugin location {} cannot be read: {cause}; correct --runtime-plugin-locations or the permissions", path.display())]
    Unreadable {
        /// The location or directory.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A location is a file of another kind.
    #[error("{} is no plugin: name a *.wasm, *.wat, *.py or *.sh file, or a directory of them", path.display())]
    NoPlugin {
        /// The location.
        path: PathBuf,
    },
    /// The search went out of bounds.
    #[error("plugin location {} has more than {MAX_ENTRIES} entries, {MAX_PLUGINS} plugins or {MAX_DEPTH} levels: name the plugins' own directory", path.display())]
    TooMany {
        /// The location.
        path: PathBuf,
    },
}

/// Finds the plugins of `locations`, files or directories searched recursively, and reads them.
///
/// The order is that of the locations, and by path below each; a file reached twice is
/// taken once. Follows LMCache's `v1/plugin/runtime_plugin_launcher.py`, except that a
/// location that does not exist is an error. A plugin that cannot be read, or whose manifest
/// cannot be used, is found with the reason.
///
/// # Errors
/// [`LoadError`], which names the path and the way out.
pub fn find(locations: &[PathBuf], policy: &Policy) -> Result<Vec<Found>, LoadError> {
    let files = search(locations)?;
    let mut stems: HashMap<String, usize> = HashMap::new();
    for (path, _) in &files {
        *stems.entry(stem(path)).or_default() += 1;
    }
    let mut names: HashSet<String> = HashSet::new();
    let mut found = Vec::with_capacity(files.len());
    for (path, kind) in files {
        // It takes no name from others when it is left alone.
        if Manifest::beside(&path).is_ok_and(|manifest| !manifest.enabled) {
            continue;
        }
        let base = match stems.get(&stem(&path)) {
            Some(1) => stem(&path),
            _ => file_name(&path),
        };
        let name = free_name(&base, |name| !names.contains(name));
        let plugin = read(name.as_str().into(), &path, kind, policy);
        names.insert(name);
        if plugin.manifest.enabled {
            found.push(plugin);
        }
    }
    Ok(found)
}

/// The plugin files below `locations`, in their order, unread.
pub(crate) fn search(locations: &[PathBuf]) -> Result<Vec<(PathBuf, PluginKind)>, LoadError> {
    let mut search = Search::default();
    for location in locations {
        let metadata = fs::metadata(location).map_err(|cause| unreadable(location, cause))?;
        if metadata.is_dir() {
            search.directory(location, location, 0)?;
        } else if metadata.is_file()
            && let Some(kind) = PluginKind::of(location)
        {
            search.file(location, kind)?;
        } else {
            return Err(LoadError::NoPlugin {
                path: location.clone(),
            });
        }
    }
    Ok(search.files)
}

/// Reads one plugin with its manifest and signature, and checks them against the policy; what
/// keeps it from being run is in [`Found::origin`].
pub fn read(name: Arc<str>, path: &Path, kind: PluginKind, policy: &Policy) -> Found {
    let mut found = Found {
        name,
        kind,
        path: path.to_owned(),
        bytes: Arc::default(),
        sha256: None,
        manifest: Manifest::default(),
        origin: Ok(Origin::Unchecked),
    };
    found.origin = found.fill(policy);
    found
}

impl Found {
    fn fill(&mut self, policy: &Policy) -> Result<Origin, Refusal> {
        let read = Manifest::read(&self.path);
        let (manifest, manifest_bytes) = match read {
            Ok((manifest, bytes)) => (Ok(manifest), bytes),
            Err(error) => (Err(error.to_string()), None),
        };
        if let Ok(manifest) = &manifest {
            self.manifest = manifest.clone();
        }
        // Also of one whose own manifest says nothing: the server's file can switch it off.
        let narrowed = policy.narrow(&self.name, &mut self.manifest);
        manifest?;
        narrowed?;
        self.bytes = read_bounded(&self.path, MAX_MODULE_BYTES, Some(Limit::ModuleBytes))?;
        self.sha256 = Some(Sha256Digest::of(&self.bytes));
        let signature = read_signature(&self.path)?;
        let files = PluginFiles {
            plugin: &self.bytes,
            manifest: manifest_bytes.as_deref(),
            signature: signature.as_deref(),
        };
        Ok(policy.origin(&self.name, files)?)
    }
}

/// A name for a plugin that came while the server ran.
pub(crate) fn name_for(path: &Path, is_free: impl Fn(&str) -> bool) -> String {
    let stem = stem(path);
    if is_free(&stem) {
        return stem;
    }
    free_name(&file_name(path), is_free)
}

/// What tells whether the files of a plugin changed.
pub(crate) fn stamp(path: &Path) -> Stamp {
    let of = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        let nanoseconds =
            |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        Some((
            metadata.ino(),
            metadata.len(),
            nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        ))
    };
    [
        of(path),
        of(&Manifest::path_beside(path)),
        of(&signature_path(path)),
    ]
}

/// Where the signature of a plugin is, if it has one.
#[must_use]
pub fn signature_path(path: &Path) -> PathBuf {
    let mut name: OsString = path.as_os_str().to_owned();
    name.push(SIGNATURE_SUFFIX);
    name.into()
}

fn read_signature(path: &Path) -> Result<Option<String>, Refusal> {
    let path = signature_path(path);
    // What is there and cannot be read says so below.
    if fs::symlink_metadata(&path).is_err_and(|it| it.kind() == io::ErrorKind::NotFound) {
        return Ok(None);
    }
    let bytes = read_bounded(&path, MAX_SIGNATURE_BYTES, None)?;
    // What is not text is no signature, and says so when it is verified.
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

fn free_name(base: &str, is_free: impl Fn(&str) -> bool) -> String {
    let mut name = base.to_owned();
    let mut number = 2_usize;
    while !is_free(&name) {
        name = format!("{base}~{number}");
        number += 1;
    }
    name
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| printable(&name.to_string_lossy()))
        .unwrap_or_default()
}

#[derive(Default)]
struct Search {
    files: Vec<(PathBuf, PluginKind)>,
    seen: HashSet<PathBuf>,
    entries: usize,
}

impl Search {
    fn directory(&mut self, location: &Path, path: &Path, depth: usize) -> Result<(), LoadError> {
        let too_many = || LoadError::TooMany {
            path: location.to_owned(),
        };
        if depth > MAX_DEPTH {
            return Err(too_many());
        }
        // A directory reached again, as through a symbolic link to a parent, ends the descent.
        if !self
            .seen
            .insert(fs::canonicalize(path).map_err(|cause| unreadable(path, cause))?)
        {
            return Ok(());
        }
        let entries: io::Result<Vec<_>> = fs::read_dir(path)
            .map_err(|cause| unreadable(path, cause))?
            .collect();
        let mut paths: Vec<_> = entries
            .map_err(|cause| unreadable(path, cause))?
            .iter()
            .map(fs::DirEntry::path)
            .collect();
        paths.sort();
        for path in paths {
            self.entries += 1;
            if self.entries > MAX_ENTRIES || self.files.len() > MAX_PLUGINS {
                return Err(too_many());
            }
            // A dangling link is nobody's plugin.
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            if metadata.is_dir() {
                self.directory(location, &path, depth + 1)?;
            } else if metadata.is_file()
                && let Some(kind) = PluginKind::of(&path)
            {
                self.file(&path, kind)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, kind: PluginKind) -> Result<(), LoadError> {
        let canonical = fs::canonicalize(path).map_err(|cause| unreadable(path, cause))?;
        if self.seen.insert(canonical) {
            self.files.push((path.to_owned(), kind));
        }
        Ok(())
    }
}

fn unreadable(path: &Path, cause: io::Error) -> LoadError {
    LoadError::Unreadable {
        path: path.to_owned(),
        cause,
    }
}

fn read_bounded(path: &Path, most: u64, limit: Option<Limit>) -> Result<Arc<[u8]>, Refusal> {
    let unreadable = |cause: io::Error| {
        Refusal::from(format!(
            "{} cannot be read: {cause}; correct its permissions, or take it away",
            path.display()
        ))
    };
    let file = fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(most + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > most {
        let bytes = fs::metadata(path).map_or(bytes.len() as u64, |metadata| metadata.len());
        return Err(Refusal {
            reason: format!(
                "{} has {bytes} bytes, more than the {most} allowed",
                path.display()
            ),
            limit,
        });
    }
    Ok(bytes.into())
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .map(|stem| printable(&stem.to_string_lossy()))
        .unwrap_or_default()
}

/// File names may hold anything; log lines and URLs may not.
fn printable(name: &str) -> String {
    let keep = |character: char| character.is_alphanumeric() || "-_.+".contains(character);
    name.chars()
        .take(128)
        .map(|character| if keep(character) { character } else { '_' })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn find(locations: &[PathBuf]) -> Result<Vec<Found>, LoadError> {
        super::find(locations, &Policy::default())
    }

    fn tree(files: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for file in files {
            let path = directory.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        directory
    }

    fn names(locations: &[PathBuf]) -> Vec<String> {
        find(locations)
            .unwrap()
            .iter()
            .map(|found| found.name.to_string())
            .collect()
    }

    #[test]
    fn directories_are_searched_and_other_files_left_alone() {
        let tree = tree(&[
            "b.sh",
            "a.py",
            "sub/deep/c.wasm",
            "sub/d.wat",
            "README.md",
            "e.pyc",
            "noext",
        ]);
        assert_eq!(names(&[tree.path().to_owned()]), ["a", "b", "d", "c"]);
    }

    #[test]
    fn files_are_taken_once_and_loops_end() {
        let tree = tree(&["a.py", "sub/b.sh"]);
        std::os::unix::fs::symlink(tree.path(), tree.path().join("sub/up")).unwrap();
        std::os::unix::fs::symlink("nowhere", tree.path().join("dangling.py")).unwrap();
        assert_eq!(
            names(&[tree.path().join("a.py"), tree.path().to_owned()]),
            ["a", "b"]
        );
    }

    #[test]
    fn colliding_names_are_told_apart() {
        let tree = tree(&["x/a.py", "x/a.wasm", "y/a.py", "b.sh"]);
        assert_eq!(
            names(&[tree.path().to_owned()]),
            ["b", "a.py", "a.wasm", "a.py~2"]
        );
    }

    #[test]
    fn names_cannot_carry_anything_into_a_log_line() {
        let tree = tree(&["a] [core\n.py"]);
        assert_eq!(names(&[tree.path().to_owned()]), ["a___core_"]);
    }

    #[test]
    fn a_location_that_is_not_there_is_an_error_that_names_it() {
        let error = find(&["/nowhere/at/all".into()]).unwrap_err().to_string();
        assert!(
            error.contains("/nowhere/at/all") && error.contains("--runtime-plugin-locations"),
            "{error}"
        );
        let tree = tree(&["notes.txt"]);
        assert!(matches!(
            find(&[tree.path().join("notes.txt")]),
            Err(LoadError::NoPlugin { .. })
        ));
    }

    #[test]
    fn a_pipe_named_like_a_plugin_does_not_hold_up_the_start() {
        let tree = tree(&["a.sh"]);
        let pipe = tree.path().join("pipe.sh");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert_eq!(names(&[tree.path().to_owned()]), ["a"]);
        assert!(matches!(find(&[pipe]), Err(LoadError::NoPlugin { .. })));
    }

    /// The only plugin of `tree`, and why it is refused.
    fn refused(tree: &tempfile::TempDir) -> (Found, Refusal) {
        let mut found = find(&[tree.path().to_owned()]).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        let found = found.remove(0);
        let refusal = found.origin.clone().unwrap_err();
        (found, refusal)
    }

    #[test]
    fn an_oversized_module_is_refused_by_its_name_and_limit() {
        let tree = tree(&["sub/big.wasm"]);
        let path = tree.path().join("sub/big.wasm");
        fs::File::create(&path)
            .unwrap()
            .set_len(MAX_MODULE_BYTES + 1)
            .unwrap();
        let (found, refusal) = refused(&tree);
        assert_eq!((&*found.name, found.sha256), ("big", None));
        assert_eq!(refusal.limit, Some(Limit::ModuleBytes));
        let reason = refusal.reason;
        assert!(
            reason.contains("sub/big.wasm") && reason.contains("16777217"),
            "{reason}"
        );
    }

    #[test]
    fn files_that_cannot_be_read_are_refused_by_their_names() {
        // Regular files that open and then give no byte, to root neither.
        let unreadable = |path: PathBuf| std::os::unix::fs::symlink("/proc/self/mem", path);
        for file in ["a.py", "a.plugin.toml", "a.py.sig"] {
            let tree = match file {
                "a.py" => tree(&[]),
                _ => tree(&["a.py"]),
            };
            unreadable(tree.path().join(file)).unwrap();
            let (_, refusal) = refused(&tree);
            assert!(refusal.reason.contains(file), "{file}: {refusal}");
            assert!(refusal.reason.contains("cannot be read"), "{refusal}");
        }
    }

    #[test]
    fn a_manifest_can_switch_a_plugin_off_and_a_bad_one_refuses_it() {
        let tree = tree(&["a.py", "b.py"]);
        fs::write(tree.path().join("a.plugin.toml"), "enabled = false").unwrap();
        assert_eq!(names(&[tree.path().to_owned()]), ["b"]);
        fs::write(tree.path().join("b.plugin.toml"), "nonsense = 1").unwrap();
        let (_, refusal) = refused(&tree);
        let reason = refusal.reason;
        assert!(
            reason.contains("b.plugin.toml") && reason.contains("nonsense"),
            "{reason}"
        );
        // The server's file can still switch it off.
        let policy: Policy = toml::from_str("[b]\nenabled = false").unwrap();
        let left = super::find(&[tree.path().to_owned()], &policy).unwrap();
        assert!(left.is_empty(), "{left:?}");
    }
}
