//! Finds plugin files and tells what they are.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    manifest::{Manifest, ManifestError},
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

/// A plugin that was found and can be read.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its name in logs: the file's stem, the whole file name when stems collide, and with
    /// `~2` and so on behind it when file names do.
    pub name: Arc<str>,
    /// What it is.
    pub kind: PluginKind,
    /// The file, as reached through its location.
    pub path: PathBuf,
    /// Its bytes: what is hashed, checked and, of a module, run is this, not the file.
    pub bytes: Arc<[u8]>,
    /// The digest of the bytes.
    pub sha256: Sha256Digest,
    /// What its manifest asks for and the server's policy leaves of that.
    pub manifest: Manifest,
    /// How much is known of where it comes from, or why it must not run.
    pub origin: Result<Origin, String>,
}

/// What tells that a plugin's files changed without reading them: of the plugin, its manifest
/// and its signature.
pub type Stamp = [Option<FileStamp>; 3];

/// Of one file: inode, size, and the times of its last change in nanoseconds.
pub type FileStamp = (u64, u64, i128, i128);

/// Why the plugins cannot be loaded; the server does not start then.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A location or a file below it cannot be read.
    #[error("plugin location {} cannot be read: {cause}; correct --runtime-plugin-locations or the file's permissions", path.display())]
    Unreadable {
        /// The location or file.
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
    /// A file is too large to be a plugin.
    #[error("plugin {} has {bytes} bytes, more than the {limit} allowed", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// The most it may have.
        limit: u64,
    },
    /// The search went out of bounds.
    #[error("plugin location {} has more than {MAX_ENTRIES} entries, {MAX_PLUGINS} plugins or {MAX_DEPTH} levels: name the plugins' own directory", path.display())]
    TooMany {
        /// The location.
        path: PathBuf,
    },
    /// A manifest cannot be used.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// Finds the plugins of `locations`, files or directories searched recursively, and reads them.
///
/// The order is that of the locations, and by path below each; a file reached twice is
/// taken once. Follows LMCache's `v1/plugin/runtime_plugin_launcher.py`, except that a
/// location that does not exist is an error.
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
        if !Manifest::beside(&path)?.enabled {
            continue;
        }
        let base = match stems.get(&stem(&path)) {
            Some(1) => stem(&path),
            _ => file_name(&path),
        };
        let name = free_name(&base, |name| !names.contains(name));
        let plugin = read(name.as_str().into(), &path, kind, policy)?;
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

/// Reads one plugin with its manifest and signature, and checks them against the policy.
///
/// # Errors
/// [`LoadError`]; a plugin that the policy refuses is no error, but [`Found::origin`] is.
pub fn read(
    name: Arc<str>,
    path: &Path,
    kind: PluginKind,
    policy: &Policy,
) -> Result<Found, LoadError> {
    let (mut manifest, manifest_bytes) = Manifest::read(path)?;
    let bytes = read_bounded(path, MAX_MODULE_BYTES)?;
    let signature = read_signature(path)?;
    let narrowed = policy.narrow(&name, &mut manifest);
    let origin = narrowed.and_then(|()| {
        policy.origin(
            &name,
            PluginFiles {
                plugin: &bytes,
                manifest: manifest_bytes.as_deref(),
                signature: signature.as_deref(),
            },
        )
    });
    Ok(Found {
        name,
        kind,
        path: path.to_owned(),
        sha256: Sha256Digest::of(&bytes),
        bytes,
        manifest,
        origin,
    })
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

fn read_signature(path: &Path) -> Result<Option<String>, LoadError> {
    let path = signature_path(path);
    match read_bounded(&path, MAX_SIGNATURE_BYTES) {
        // What is not text is no signature, and says so when it is verified.
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(LoadError::Unreadable { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
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

fn read_bounded(path: &Path, limit: u64) -> Result<Arc<[u8]>, LoadError> {
    let file = fs::File::open(path).map_err(|cause| unreadable(path, cause))?;
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|cause| unreadable(path, cause))?;
    if bytes.len() as u64 > limit {
        let bytes = fs::metadata(path).map_or(bytes.len() as u64, |metadata| metadata.len());
        return Err(LoadError::TooLarge {
            path: path.to_owned(),
            bytes,
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

    #[test]
    fn an_unreadable_or_oversized_module_is_an_error_that_names_it() {
        let tree = tree(&["sub/big.wasm"]);
        let path = tree.path().join("sub/big.wasm");
        fs::File::create(&path)
            .unwrap()
            .set_len(MAX_MODULE_BYTES + 1)
            .unwrap();
        let error = find(&[tree.path().to_owned()]).unwrap_err().to_string();
        assert!(
            error.contains("sub/big.wasm") && error.contains("16777217"),
            "{error}"
        );
    }

    #[test]
    fn a_manifest_can_switch_a_plugin_off_and_a_bad_one_is_an_error() {
        let tree = tree(&["a.py", "b.py"]);
        fs::write(tree.path().join("a.plugin.toml"), "enabled = false").unwrap();
        assert_eq!(names(&[tree.path().to_owned()]), ["b"]);
        fs::write(tree.path().join("b.plugin.toml"), "nonsense = 1").unwrap();
        assert!(matches!(
            find(&[tree.path().to_owned()]),
            Err(LoadError::Manifest(_))
        ));
    }
}
