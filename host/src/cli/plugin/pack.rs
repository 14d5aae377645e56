//! `stockade plugin pack` and `unpack`: a module, its manifest and its signature as one file.
//!
//! A pack is a tar archive of `pack.json`, which lists the others with their SHA-256, and of the files
//! that stand beside each other in a directory of plugins. Its bytes follow from theirs alone.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;
use stockade_sandbox::{Manifest, SecretKey, Sha256Digest, loader};

use super::{
    super::{print, print_json},
    check,
    local::{self, Local},
};
use crate::config::PluginSettings;

/// The version of the format.
const FORMAT: u32 = 1;

/// The list in a pack, always first.
const LIST: &str = "pack.json";

/// Largest list, manifest or signature, and largest module, in bytes.
const MAX_SMALL_BYTES: u64 = 64 << 10;
const MAX_MODULE_BYTES: u64 = 16 << 20;

/// What `pack.json` says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct List {
    format: u32,
    name: String,
    /// SHA-256 in hex, by the name of the file.
    files: BTreeMap<String, String>,
}

/// Arguments of `stockade plugin pack`.
#[derive(Debug, Args)]
pub(super) struct Pack {
    /// A .wasm file, its manifest beside it
    file: PathBuf,
    /// Sign with this secret key of `keygen`; without it a signature that is there goes along
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The pack to write [default: NAME.plugin.tar beside the module]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    local: Local,
}

/// Arguments of `stockade plugin unpack`.
#[derive(Debug, Args)]
pub(super) struct Unpack {
    /// A pack
    file: PathBuf,
    /// Directory of plugins to put its files into
    #[arg(long, value_name = "DIR")]
    into: PathBuf,
    #[command(flatten)]
    local: Local,
}

fn hex_digest(bytes: &[u8]) -> String {
    Sha256Digest::of(bytes).to_string()
}

/// The files of the plugin `name` that a pack may hold, and the most bytes of each.
fn parts(name: &str) -> [(String, u64); 3] {
    [
        (format!("{name}.plugin.toml"), MAX_SMALL_BYTES),
        (format!("{name}.wasm.sig"), MAX_SMALL_BYTES),
        // Last, so that a server which watches the directory finds the others when it comes.
        (format!("{name}.wasm"), MAX_MODULE_BYTES),
    ]
}

fn read_if_there(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

impl Pack {
    /// Writes the pack of a module that the server would run.
    ///
    /// # Errors
    /// When it would not, or a file cannot be read or written.
    pub(super) fn run(&self, is_json: bool) -> anyhow::Result<()> {
        ensure!(
            self.file.extension().is_some_and(|it| it == "wasm"),
            "{} is no .wasm file",
            self.file.display()
        );
        let name = self
            .file
            .file_stem()
            .and_then(|stem| stem.to_str())
            .context("the module has no name")?
            .to_owned();
        check::examine(&self.file, &self.local)?.into_result()?;
        let module = fs::read(&self.file).with_context(|| self.file.display().to_string())?;
        let manifest = read_if_there(&self.file.with_extension("plugin.toml"))?;
        let signature = match &self.key {
            Some(key) => {
                let text = fs::read_to_string(key).with_context(|| key.display().to_string())?;
                let key: SecretKey = text.parse().map_err(anyhow::Error::msg)?;
                Manifest::beside(&self.file)?;
                Some(key.sign(&module, manifest.as_deref()).into_bytes())
            }
            None => read_if_there(&loader::signature_path(&self.file))?,
        };
        let is_signed = signature.is_some();
        let [(manifest_name, _), (signature_name, _), (module_name, _)] = parts(&name);
        let files = [
            (manifest_name, manifest),
            (signature_name, signature),
            (module_name, Some(module)),
        ];
        let files: Vec<_> = files
            .into_iter()
            .filter_map(|(name, bytes)| Some((name, bytes?)))
            .collect();
        let list = List {
            format: FORMAT,
            name: name.clone(),
            files: files
                .iter()
                .map(|(name, bytes)| (name.clone(), hex_digest(bytes)))
                .collect(),
        };
        let output = self
            .output
            .clone()
            .unwrap_or_else(|| self.file.with_file_name(format!("{name}.plugin.tar")));
        let bytes = archive(&list, &files)?;
        fs::write(&output, &bytes).with_context(|| output.display().to_string())?;
        let sha256 = hex_digest(&bytes);
        if is_json {
            return print_json(&json!({
                "pack": output.to_string_lossy(),
                "sha256": sha256,
                "signed": is_signed,
                "files": list.files,
            }));
        }
        print(&format!(
            "{}: {} files, {}, sha256 {sha256}\n",
            output.display(),
            list.files.len(),
            if is_signed { "signed" } else { "not signed" },
        ))
    }
}

/// The tar archive; no owner, no time, so that equal files make equal packs.
fn archive(list: &List, files: &[(String, Vec<u8>)]) -> anyhow::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        tar.append_data(&mut header, name, bytes)
    };
    add(LIST, &serde_json::to_vec_pretty(list)?)?;
    for (name, bytes) in files {
        add(name, bytes)?;
    }
    Ok(tar.into_inner()?)
}

/// Files of a pack: names and bytes.
type Files = Vec<(String, Vec<u8>)>;

/// Reads a pack and checks everything that can be checked of it alone.
fn open(bytes: impl Read) -> anyhow::Result<(List, Files)> {
    let mut tar = tar::Archive::new(bytes);
    let mut list: Option<List> = None;
    let mut files = Files::new();
    for entry in tar.entries().context("it is no tar archive")? {
        let mut entry = entry.context("it is no tar archive, or ends too early")?;
        ensure!(
            entry.header().entry_type().is_file(),
            "it holds something that is no file"
        );
        let name = entry
            .path()?
            .to_str()
            .context("a name is not UTF-8")?
            .to_owned();
        let limit = match &list {
            None => {
                ensure!(name == LIST, "it does not begin with {LIST}: it is no pack");
                MAX_SMALL_BYTES
            }
            Some(list) => {
                let parts = parts(&list.name);
                let known = parts.iter().find(|(part, _)| *part == name);
                let (_, limit) =
                    known.with_context(|| format!("{name:?} does not belong into it"))?;
                ensure!(
                    files.iter().all(|(there, _)| *there != name),
                    "{name} is in it twice"
                );
                *limit
            }
        };
        let mut bytes = Vec::new();
        (&mut entry).take(limit + 1).read_to_end(&mut bytes)?;
        ensure!(
            bytes.len() as u64 <= limit,
            "{name} has more than the {limit} bytes allowed"
        );
        let Some(list) = &list else {
            let read: List = serde_json::from_slice(&bytes).with_context(|| LIST.to_owned())?;
            ensure!(
                read.format == FORMAT,
                "it has format {}, and this server knows {FORMAT}: use a newer stockade",
                read.format
            );
            // The name becomes a path.
            let is_plain = !read.name.is_empty()
                && read.name.len() <= 128
                && read
                    .name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
            ensure!(is_plain, "its name {:?} is none", read.name);
            list = Some(read);
            continue;
        };
        let expected = list.files.get(&name);
        ensure!(
            expected == Some(&hex_digest(&bytes)),
            "{name} is not the file that {LIST} lists: the pack is damaged or was changed"
        );
        files.push((name, bytes));
    }
    let list = list.context("it is empty")?;
    ensure!(
        files.len() == list.files.len(),
        "a file that {LIST} lists is missing"
    );
    ensure!(
        list.files.contains_key(&format!("{}.wasm", list.name)),
        "there is no module in it"
    );
    Ok((list, files))
}

impl Unpack {
    /// Puts the files of a pack into a directory, after they were checked against the pack's list and
    /// the keys and digests of the server's file.
    ///
    /// # Errors
    /// When anything of that does not hold; then nothing is changed.
    pub(super) fn run(&self, is_json: bool) -> anyhow::Result<()> {
        let shown = self.file.display();
        let file = fs::File::open(&self.file).with_context(|| shown.to_string())?;
        let (list, files) = open(std::io::BufReader::new(file))
            .with_context(|| format!("{shown} cannot be unpacked"))?;
        let settings = PluginSettings::load(self.local.config())?;
        fs::create_dir_all(&self.into).with_context(|| self.into.display().to_string())?;
        // Beside the target, so that the last step is a rename; hidden and with no name that the
        // loader takes for a plugin.
        let staging = Staging::new(&self.into)?;
        for (name, bytes) in &files {
            let path = staging.0.join(name);
            fs::File::create_new(&path)
                .and_then(|mut file| {
                    file.write_all(bytes)?;
                    file.sync_all()
                })
                .with_context(|| path.display().to_string())?;
        }
        let module = staging.0.join(format!("{}.wasm", list.name));
        let found = local::read(&module, &settings)?;
        let origin = match &found.origin {
            Ok(origin) => origin.to_string(),
            Err(reason) => bail!("{shown} is refused: {reason}"),
        };
        for (name, _) in parts(&list.name) {
            let target = self.into.join(&name);
            match list.files.contains_key(&name) {
                true => fs::rename(staging.0.join(&name), &target)
                    .with_context(|| target.display().to_string())?,
                // The manifest or signature of an older version must not hold for this one.
                false if target.exists() => {
                    fs::remove_file(&target).with_context(|| target.display().to_string())?;
                }
                false => {}
            }
        }
        let target = self.into.join(format!("{}.wasm", list.name));
        if is_json {
            return print_json(&json!({
                "module": target.to_string_lossy(),
                "origin": origin,
                "files": list.files,
            }));
        }
        print(&format!("{}: {origin}\n", target.display()))
    }
}

/// A directory that goes when this does.
struct Staging(PathBuf);

impl Staging {
    fn new(beside: &Path) -> anyhow::Result<Self> {
        let path = beside.join(format!(".unpack-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // At worst, an empty hidden directory stays.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn listed(name: &str, files: &[(&str, &[u8])]) -> List {
        List {
            format: FORMAT,
            name: name.to_owned(),
            files: files
                .iter()
                .map(|(name, bytes)| ((*name).to_owned(), hex_digest(bytes)))
                .collect(),
        }
    }

    fn packed(list: &List, files: &[(&str, &[u8])]) -> Vec<u8> {
        let files: Vec<_> = files
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()))
            .collect();
        archive(list, &files).unwrap()
    }

    const FILES: [(&str, &[u8]); 2] = [("p.plugin.toml", b"calls = true"), ("p.wasm", b"\0asm")];

    #[test]
    fn a_pack_holds_its_files_and_equal_files_make_equal_packs() {
        let list = listed("p", &FILES);
        let pack = packed(&list, &FILES);
        assert_eq!(pack, packed(&list, &FILES));
        let (read, files) = open(&*pack).unwrap();
        assert_eq!(read, list);
        assert_eq!(files[1], ("p.wasm".to_owned(), b"\0asm".to_vec()));
    }

    #[test]
    fn what_was_changed_or_does_not_belong_is_refused() {
        let list = listed("p", &FILES);
        let refused = |list: &List, files: &[(&str, &[u8])]| {
            let error = open(&*packed(list, files)).unwrap_err();
            format!("{error:#}")
        };
        let changed = [FILES[0], ("p.wasm", &b"\0asn"[..])];
        assert!(refused(&list, &changed).contains("damaged"));
        assert!(refused(&list, &FILES[..1]).contains("missing"));
        let twice = [FILES[0], FILES[1], FILES[1]];
        assert!(refused(&list, &twice).contains("twice"));
        let foreign = [FILES[0], FILES[1], ("q.wasm", &b""[..])];
        assert!(refused(&listed("p", &foreign), &foreign).contains("does not belong"));
        for name in ["", "../p", "a/b", "p.x"] {
            assert!(
                refused(&listed(name, &[]), &[]).contains("name"),
                "{name:?}"
            );
        }
        let mut newer = listed("p", &FILES);
        newer.format = 2;
        assert!(refused(&newer, &FILES).contains("newer stockade"));
        let large = vec![0; MAX_SMALL_BYTES as usize + 1];
        let large = [("p.plugin.toml", &*large), FILES[1]];
        assert!(refused(&listed("p", &large), &large).contains("more than"));
        assert!(open(&b"no tar"[..]).is_err());
        assert!(open(&b""[..]).is_err());
    }

    #[test]
    fn links_and_folders_are_refused() {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, LIST, "/etc/passwd").unwrap();
        let error = open(&*tar.into_inner().unwrap()).unwrap_err();
        assert!(error.to_string().contains("no file"), "{error:#}");
    }
}
