//! What a stored object is called, in the forms that LMCache 0.5.6 gives it.

use std::{fmt, sync::Arc};

/// Most characters of a cache salt, as in LMCache.
const MAX_SALT_CHARS: usize = 128;
/// Most bytes of a file name on the file systems that matter.
pub(crate) const MAX_FILE_NAME: usize = 255;
/// What stands for `/` of a model name in a file name.
const SLASH: &str = "-SEP-";
const EXTENSION: &str = ".data";
/// How the folders of salts begin, so that a salt like `..` is no way out.
pub(crate) const FOLDER_OF_SALT: &str = "salt-";

/// The identity of one stored object: `ObjectKey` in LMCache's `v1/distributed/api.py`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    model_name: Arc<str>,
    kv_rank: u32,
    object_group_id: u32,
    chunk_hash: [u8; 32],
    cache_salt: Arc<str>,
}

/// Why something cannot be a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A name is split at `@`, so that its parts cannot hold one.
    #[error("model name {0:?} is empty or contains '@' or NUL")]
    Model(String),
    /// LMCache's rule for salts is broken.
    #[error("cache salt {0:?} is too long or contains '@', '/', '\\' or NUL")]
    Salt(String),
    /// `a/b` and `a-SEP-b` would share their files, and so would `a-SEP/b` and `a/SEP-b`.
    #[error("model name {0:?} reads as another one once \"-SEP-\" stands for '/' in file names")]
    Ambiguous(String),
    /// The file system would not take it.
    #[error("the file name would have {0} bytes, more than {MAX_FILE_NAME}")]
    TooLong(usize),
}

impl ObjectName {
    /// Joins the parts of a name.
    ///
    /// # Errors
    /// [`NameError`] if the name could not be told from others in LMCache's forms.
    pub fn new(
        model_name: Arc<str>,
        kv_rank: u32,
        object_group_id: u32,
        chunk_hash: [u8; 32],
        cache_salt: Arc<str>,
    ) -> Result<Self, NameError> {
        if model_name.is_empty() || model_name.contains(['@', '\0']) {
            return Err(NameError::Model(model_name.to_string()));
        }
        if cache_salt.contains(['@', '/', '\\', '\0'])
            || cache_salt.chars().count() > MAX_SALT_CHARS
        {
            return Err(NameError::Salt(cache_salt.to_string()));
        }
        Ok(Self {
            model_name,
            kv_rank,
            object_group_id,
            chunk_hash,
            cache_salt,
        })
    }

    /// The model, as the engine names it.
    #[must_use]
    pub fn model_name(&self) -> &Arc<str> {
        &self.model_name
    }

    /// The slice of the KV cache.
    #[must_use]
    pub fn kv_rank(&self) -> u32 {
        self.kv_rank
    }

    /// The group of layers.
    #[must_use]
    pub fn object_group_id(&self) -> u32 {
        self.object_group_id
    }

    /// The rolling hash of the tokens up to the chunk's end.
    #[must_use]
    pub fn chunk_hash(&self) -> &[u8; 32] {
        &self.chunk_hash
    }

    /// The tenant's salt; empty for none.
    #[must_use]
    pub fn cache_salt(&self) -> &Arc<str> {
        &self.cache_salt
    }

    /// The key in Redis, Valkey and S3:
    /// `<model>@<kv_rank, 8 hex digits>@<group, hex>@<chunk hash>[@<salt>]`, as
    /// `_object_key_to_string` of LMCache's `l2_adapters/native_connector_l2_adapter.py` has it.
    #[must_use]
    pub fn key(&self) -> String {
        let Self {
            model_name,
            kv_rank,
            object_group_id,
            ..
        } = self;
        let mut key = format!("{model_name}@{kv_rank:08x}@{object_group_id:x}@");
        self.push_tail(&mut key);
        key
    }

    /// The name of its file: as [`key`](Self::key), with `-SEP-` for `/`, `0x` before the rank and
    /// `.data` at the end; `_object_key_to_filename` of LMCache's `l2_adapters/fs_l2_adapter.py`.
    ///
    /// # Errors
    /// [`NameError`] if another name would have the same file, or no file may have the name.
    pub fn file_name(&self) -> Result<String, NameError> {
        let model = self.model_name.replace('/', SLASH);
        if model.replace(SLASH, "/") != *self.model_name {
            return Err(NameError::Ambiguous(self.model_name.to_string()));
        }
        let mut file = format!("{model}@{:#010x}@{:x}@", self.kv_rank, self.object_group_id);
        self.push_tail(&mut file);
        file.push_str(EXTENSION);
        if file.len() > MAX_FILE_NAME {
            return Err(NameError::TooLong(file.len()));
        }
        Ok(file)
    }

    /// As [`key`](Self::key), in a folder of its salt: `salt-<salt>/<key>`. Without a salt it is
    /// the key. LMCache looks for the key only.
    #[must_use]
    pub fn key_in_folder(&self) -> String {
        match &*self.cache_salt {
            "" => self.key(),
            salt => format!("{FOLDER_OF_SALT}{salt}/{}", self.key()),
        }
    }

    /// The name behind a [`key_in_folder`](Self::key_in_folder); `None` for anything else.
    #[must_use]
    pub fn from_key_in_folder(key: &str) -> Option<Self> {
        let in_folder = || {
            let (salt, rest) = key.strip_prefix(FOLDER_OF_SALT)?.split_once('/')?;
            Self::from_key(rest).filter(|name| *name.cache_salt == *salt && !salt.is_empty())
        };
        // What lies outside has no salt, or is not what was written.
        in_folder().or_else(|| Self::from_key(key).filter(|name| name.cache_salt.is_empty()))
    }

    /// The key in a store that has, or has not, a folder for each salt.
    pub(crate) fn key_at(&self, folder_by_salt: bool) -> String {
        match folder_by_salt {
            true => self.key_in_folder(),
            false => self.key(),
        }
    }

    /// Where the value may lie besides: outside of the folder of its salt, where LMCache puts it.
    pub(crate) fn key_outside(&self, folder_by_salt: bool) -> Option<String> {
        (folder_by_salt && !self.cache_salt.is_empty()).then(|| self.key())
    }

    /// The name behind a [`key_at`](Self::key_at) or a [`key_outside`](Self::key_outside).
    pub(crate) fn from_key_at(key: &str, folder_by_salt: bool) -> Option<Self> {
        let in_folder = || Self::from_key_in_folder(key);
        let in_folder = folder_by_salt.then(in_folder).flatten();
        in_folder.or_else(|| Self::from_key(key))
    }

    fn push_tail(&self, text: &mut String) {
        use fmt::Write as _;
        for byte in self.chunk_hash {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        if !self.cache_salt.is_empty() {
            text.push('@');
            text.push_str(&self.cache_salt);
        }
    }

    /// The name behind a [`key`](Self::key); `None` for what is no key of ours or LMCache's.
    #[must_use]
    pub fn from_key(key: &str) -> Option<Self> {
        let mut parts = key.split('@');
        let (model, rank, group, hash) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let salt = parts.next().unwrap_or_default();
        if parts.next().is_some() || hash.len() != 64 {
            return None;
        }
        let mut chunk_hash = [0; 32];
        for (byte, digits) in chunk_hash.iter_mut().zip(hash.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        let name = Self::new(
            Arc::from(model),
            u32::from_str_radix(rank, 16).ok()?,
            u32::from_str_radix(group, 16).ok()?,
            chunk_hash,
            Arc::from(salt),
        )
        .ok()?;
        // Other spellings (upper case, signs, missing zeros) are not what was written.
        (name.key() == key).then_some(name)
    }

    /// The name behind a [`file_name`](Self::file_name); `None` for any other file.
    #[must_use]
    pub fn from_file_name(file: &str) -> Option<Self> {
        let stem = file.strip_suffix(EXTENSION)?;
        let (model, rest) = stem.split_once('@')?;
        let rest = rest.strip_prefix("0x")?;
        let name = Self::from_key(&format!("{}@{rest}", model.replace(SLASH, "/")))?;
        // A path, or a name that is too long, is no name that was written.
        (name.file_name().as_deref() == Ok(file)).then_some(name)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use proptest::prelude::*;

    use super::*;

    fn name(model: &str, rank: u32, group: u32, salt: &str) -> ObjectName {
        ObjectName::new(model.into(), rank, group, [0xab; 32], salt.into()).unwrap()
    }

    #[test]
    fn what_would_be_mistaken_for_another_name_is_refused() {
        let new = |model: &str, salt: &str| {
            ObjectName::new(model.into(), 0, 0, [0; 32], salt.into()).map(|_| ())
        };
        assert!(matches!(new("a@b", ""), Err(NameError::Model(_))));
        assert!(matches!(new("", ""), Err(NameError::Model(_))));
        assert!(matches!(new("m", "../x"), Err(NameError::Salt(_))));
        assert!(matches!(
            name("a-SEP-b", 0, 0, "").file_name(),
            Err(NameError::Ambiguous(_))
        ));
        assert!(matches!(
            name(&"m".repeat(200), 0, 0, "").file_name(),
            Err(NameError::TooLong(_))
        ));
    }

    #[test]
    fn a_slash_beside_sep_does_not_share_the_file_of_another_model() {
        // Both would be `a-SEP-SEP-b`; only one of them is what is read back.
        let read_back = |model: &str| {
            let file = name(model, 0, 0, "").file_name().ok()?;
            ObjectName::from_file_name(&file)
        };
        assert_eq!(read_back("a/SEP-b"), Some(name("a/SEP-b", 0, 0, "")));
        assert_eq!(read_back("a-SEP/b"), None);
    }

    #[test]
    fn other_files_are_not_taken_for_objects() {
        let hash = "ab".repeat(32);
        assert!(ObjectName::from_file_name(&format!("m@0x00000000@0@{hash}.data")).is_some());
        for file in [
            format!("m@0x00000000@0@{hash}.tmp"),
            format!("m@0x0@0@{hash}.data"),
            format!("m@0x00000000@0@{}.data", hash.to_uppercase()),
            format!("m@0x00000000@+0@{hash}.data"),
            format!("m@0x00000000@0@{hash}@s@t.data"),
            format!("m@0x00000000@0@{hash}@.data"),
            format!("@0x00000000@0@{hash}.data"),
            // Found by fuzzing: a path that reads as the name `o/r`.
            format!("o/r@0x00000000@0@{hash}.data"),
            "notes.data".to_owned(),
            String::new(),
        ] {
            assert_eq!(ObjectName::from_file_name(&file), None, "{file}");
        }
    }

    proptest! {
        #[test]
        fn names_survive_both_forms(
            model in "[a-zA-Z0-9._/{} -]{1,60}", rank: u32, group: u32, hash: [u8; 32],
            salt in "[a-zA-Z0-9._ é-]{0,40}",
        ) {
            let name = ObjectName::new(model.as_str().into(), rank, group, hash, salt.as_str().into()).unwrap();
            prop_assert_eq!(ObjectName::from_key(&name.key()), Some(name.clone()));
            prop_assert_eq!(ObjectName::from_key_in_folder(&name.key_in_folder()), Some(name.clone()));
            match name.file_name() {
                Ok(file) => {
                    prop_assert!(!file.contains('/'));
                    prop_assert_eq!(ObjectName::from_file_name(&file), Some(name));
                }
                Err(NameError::Ambiguous(_)) => prop_assert!(model.contains("-SEP")),
                Err(NameError::TooLong(bytes)) => prop_assert!(bytes > MAX_FILE_NAME),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }

        #[test]
        fn any_text_is_parsed_without_panic(text in "\\PC{0,120}") {
            if let Some(name) = ObjectName::from_key(&text) {
                prop_assert_eq!(name.key(), text.clone());
            }
            if let Some(name) = ObjectName::from_key_in_folder(&text) {
                prop_assert_eq!(name.key_in_folder(), text.clone());
            }
            if let Some(name) = ObjectName::from_file_name(&text) {
                prop_assert_eq!(name.file_name().ok(), Some(text));
            }
        }
    }
}
