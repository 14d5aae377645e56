//! Where a plugin comes from: digests that were pinned, and detached Ed25519 signatures.
//!
//! What is checked here are bytes in memory, and those bytes are what runs, so that nothing
//! can be swapped between the check and the start.

use std::{fmt, str::FromStr};

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Deserializer, de};
use sha2::{Digest as _, Sha256};

/// What a signature file is called: the plugin's whole file name and this.
pub const SIGNATURE_SUFFIX: &str = ".sig";

/// Largest signature file that is read, in bytes.
pub(crate) const MAX_SIGNATURE_BYTES: u64 = 1024;

/// The first line of a signature file and of what is signed; a later format gets another.
const SIGNATURE_FORMAT: &str = "stockade plugin signature v1";

/// What public keys start with in the configuration and in signature files.
const KEY_PREFIX: &str = "ed25519:";

/// A SHA-256 digest, shown as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sha256Digest([u8; 32]);

impl Sha256Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for Sha256Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        unhex(text)
            .map(Self)
            .ok_or_else(|| format!("{text:?} is no SHA-256 digest: give 64 hexadecimal digits"))
    }
}

impl<'de> Deserialize<'de> for Sha256Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// A public key, `ed25519:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl fmt::Display for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{KEY_PREFIX}{}", hex(self.0.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for PublicKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || {
            format!(
                "{text:?} is no public key: give {KEY_PREFIX} and 64 hexadecimal digits, as `stockade plugin keygen` prints"
            )
        };
        let bytes = text
            .strip_prefix(KEY_PREFIX)
            .and_then(unhex)
            .ok_or_else(refused)?;
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| refused())?;
        // Under a weak key, anybody can make signatures that verify.
        if key.is_weak() {
            return Err(refused());
        }
        Ok(Self(key))
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// A secret key, kept as 64 hexadecimal digits in a file of its own.
pub struct SecretKey(SigningKey);

impl fmt::Debug for SecretKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "SecretKey of {}", self.public())
    }
}

impl SecretKey {
    /// The key of 32 random bytes.
    #[must_use]
    pub fn from_random(bytes: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(bytes))
    }

    /// The text of a key file.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("{}\n", hex(self.0.as_bytes()))
    }

    /// The key whose signatures this one makes.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    /// The text of the signature file of a plugin and its manifest.
    #[must_use]
    pub fn sign(&self, plugin: &[u8], manifest: Option<&[u8]>) -> String {
        let signature = self.0.sign(statement(plugin, manifest).as_bytes());
        format!(
            "{SIGNATURE_FORMAT}\nkey {}\nsignature {}\n",
            self.public(),
            hex(&signature.to_bytes())
        )
    }
}

impl FromStr for SecretKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The text is a secret and has no place in the error.
        let bytes = unhex(text.trim()).ok_or(
            "the key file does not hold 64 hexadecimal digits, as `stockade plugin keygen` writes them",
        )?;
        Ok(Self(SigningKey::from_bytes(&bytes)))
    }
}

/// What is signed: the digests of the plugin and of its manifest, so that neither the one nor
/// what it asks for can be exchanged alone.
fn statement(plugin: &[u8], manifest: Option<&[u8]>) -> String {
    let manifest = manifest.map_or_else(
        || "none".to_owned(),
        |bytes| Sha256Digest::of(bytes).to_string(),
    );
    format!(
        "{SIGNATURE_FORMAT}\nplugin {}\nmanifest {manifest}\n",
        Sha256Digest::of(plugin)
    )
}

/// What a signature file says, checked against the trusted keys.
///
/// # Errors
/// One sentence: the file is no signature, its key is not trusted, or it signs something else.
pub(crate) fn verify(
    trusted: &[PublicKey],
    text: &str,
    plugin: &[u8],
    manifest: Option<&[u8]>,
) -> Result<PublicKey, String> {
    let mut lines = text.lines();
    let mut field = |name: &str| {
        lines
            .next()
            .and_then(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    if field(SIGNATURE_FORMAT) != Some("") {
        return Err(format!(
            "its signature file does not start with {SIGNATURE_FORMAT:?}; sign it with `stockade plugin sign`"
        ));
    }
    let key: PublicKey = field("key ")
        .ok_or("its signature file names no key")?
        .parse()?;
    let signature: [u8; 64] = field("signature ")
        .and_then(unhex)
        .ok_or("its signature file holds no signature of 128 hexadecimal digits")?;
    if !trusted.contains(&key) {
        return Err(format!(
            "it is signed by {key}, which is not among `trusted_keys` of [plugins]"
        ));
    }
    key.0
        .verify_strict(
            statement(plugin, manifest).as_bytes(),
            &Signature::from_bytes(&signature),
        )
        .map_err(|_| {
            format!("its signature by {key} is of another file or manifest; sign it again after each change")
        })?;
    Ok(key)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const LENGTH: usize>(text: &str) -> Option<[u8; LENGTH]> {
    if text.len() != 2 * LENGTH || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; LENGTH];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn key(seed: u8) -> SecretKey {
        SecretKey::from_random(&[seed; 32])
    }

    #[test]
    fn a_signature_holds_for_its_plugin_and_manifest_only() {
        let signature = key(1).sign(b"plugin", Some(b"manifest"));
        let trusted = [key(2).public(), key(1).public()];
        let check =
            |plugin: &[u8], manifest: Option<&[u8]>| verify(&trusted, &signature, plugin, manifest);
        assert_eq!(check(b"plugin", Some(b"manifest")), Ok(key(1).public()));
        for (plugin, manifest) in [
            (&b"plugin2"[..], Some(&b"manifest"[..])),
            (b"plugin", Some(b"manifest2")),
            (b"plugin", None),
            (b"manifest", Some(b"plugin")),
        ] {
            let error = check(plugin, manifest).unwrap_err();
            assert!(error.contains("another file or manifest"), "{error}");
        }
    }

    #[test]
    fn a_key_that_is_not_trusted_signs_nothing() {
        let signature = key(1).sign(b"plugin", None);
        let error = verify(&[key(2).public()], &signature, b"plugin", None).unwrap_err();
        assert!(error.contains("not among `trusted_keys`"), "{error}");
        // Claiming to be of another key does not help.
        let forged = signature.replace(&key(1).public().to_string(), &key(2).public().to_string());
        assert!(verify(&[key(2).public()], &forged, b"plugin", None).is_err());
    }

    #[test]
    fn junk_is_no_signature() {
        let good = key(1).sign(b"plugin", None);
        let trusted = [key(1).public()];
        for end in 0..good.trim_end().len() {
            assert!(verify(&trusted, &good[..end], b"plugin", None).is_err());
        }
        for junk in [
            "",
            "\n\n\n",
            "stockade plugin signature v2\nkey x\nsignature y\n",
            "\u{fe0f}",
        ] {
            assert!(verify(&trusted, junk, b"plugin", None).is_err(), "{junk}");
        }
    }

    #[test]
    fn keys_and_digests_are_read_as_they_are_written() {
        let secret = key(7);
        let again: SecretKey = secret.to_text().parse().unwrap();
        assert_eq!(again.public(), secret.public());
        assert_eq!(secret.public().to_string().parse(), Ok(secret.public()));
        let digest = Sha256Digest::of(b"abc");
        assert_eq!(
            digest.to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert!("ba78".parse::<Sha256Digest>().is_err());
        assert!("ed25519:00".parse::<PublicKey>().is_err());
        // The neutral element: a weak key.
        let weak = format!("ed25519:01{}", "00".repeat(31));
        assert!(weak.parse::<PublicKey>().is_err());
    }
}
