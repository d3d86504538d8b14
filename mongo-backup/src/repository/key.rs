//! Keys of an encrypted repository: each opens the one secret that everything else is derived from.
//!
//! The secret is random and never changes. Every passphrase and every host key has an object in `keys/` that holds the secret
//! sealed with it, so keys come and go without a pack being rewritten. The SHA-256 of the config is sealed along: a
//! config that was exchanged is noticed before anything is believed of it.

use std::fmt;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use chacha20poly1305::{AeadInOut as _, KeyInit as _, Tag, XChaCha20Poly1305, XNonce};
use mongo_core::{
    Error, Result,
    bson::{self, Binary, DateTime, spec::BinarySubtype},
};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::cipher::random;

/// What opens a repository.
///
/// ```
/// use mongo_backup::Key;
///
/// let key = Key::passphrase("correct horse battery staple");
/// assert_eq!(format!("{key:?}"), "Key(passphrase)");
/// ```
#[derive(Clone)]
pub struct Key(Kind);

#[derive(Clone)]
enum Kind {
    Unencrypted,
    Passphrase(Zeroizing<Vec<u8>>),
    Host(Zeroizing<[u8; 32]>),
}

impl Key {
    /// No encryption: whoever can read the archive can read the data.
    pub fn unencrypted() -> Self {
        Self(Kind::Unencrypted)
    }

    /// A passphrase, text or any other bytes. It is stretched by Argon2id, which takes 64 MiB and about a fifth of a second.
    pub fn passphrase(passphrase: impl Into<Vec<u8>>) -> Self {
        Self(Kind::Passphrase(Zeroizing::new(passphrase.into())))
    }

    /// 32 random bytes that the host keeps, for example in a key management service.
    pub fn host(key: [u8; 32]) -> Self {
        Self(Kind::Host(Zeroizing::new(key)))
    }

    pub(super) fn is_unencrypted(&self) -> bool {
        matches!(self.0, Kind::Unencrypted)
    }

    pub(super) fn check(&self) -> Result<()> {
        match &self.0 {
            Kind::Passphrase(passphrase) if passphrase.is_empty() => {
                Err(Error::invalid("the passphrase is empty: choose one, or Key::unencrypted()"))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Unencrypted => "Key(unencrypted)",
            Kind::Passphrase(_) => "Key(passphrase)",
            Kind::Host(_) => "Key(host)",
        })
    }
}

/// The name of a key of a repository: sixteen hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct KeyId(String);

impl KeyId {
    pub(super) fn generate() -> Result<Self> {
        let mut id = [0; 8];
        random(&mut id)?;
        Ok(Self(hex::encode(id)))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for KeyId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let good = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if good { Ok(Self(text.to_owned())) } else { Err(Error::invalid("this is no key id: list the keys to see theirs")) }
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is known of a key without having it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KeyInfo {
    /// Its name.
    pub id: KeyId,
    /// Whether it is a passphrase or a host key.
    pub kind: KeyKind,
    /// What it was labelled when it was added.
    pub label: String,
    /// When it was added.
    pub created: DateTime,
    /// Whether the repository was opened with it.
    pub in_use: bool,
}

/// The kinds of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KeyKind {
    /// A passphrase.
    Passphrase,
    /// A key that the host keeps.
    Host,
}

/// The payload of an object in `keys/`.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct KeyRecord {
    derivation: Derivation,
    pub(super) label: String,
    pub(super) created: DateTime,
    nonce: Binary,
    /// The secret and the SHA-256 of the config, sealed.
    wrapped: Binary,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase")]
enum Derivation {
    #[serde(rename_all = "camelCase")]
    Argon2id {
        memory_kib: i64,
        iterations: i64,
        lanes: i64,
        salt: Binary,
    },
    Host,
}

/// What a key's object holds when it is opened.
pub(crate) struct Unwrapped {
    pub(super) secret: Zeroizing<[u8; 32]>,
    pub(super) config_sum: [u8; 32],
}

impl KeyRecord {
    /// Seals the secret with a key. Stretches a passphrase: not for async tasks.
    pub(super) fn wrap(key: &Key, label: &str, secret: &[u8; 32], config_sum: &[u8; 32]) -> Result<Self> {
        let derivation = match &key.0 {
            Kind::Passphrase(_) => {
                let mut salt = [0; 16];
                random(&mut salt)?;
                Derivation::Argon2id { memory_kib: MEMORY_KIB, iterations: ITERATIONS, lanes: LANES, salt: binary(&salt) }
            }
            Kind::Host(_) => Derivation::Host,
            Kind::Unencrypted => return Err(Error::invalid("no key is no key to add: give a passphrase or a host key")),
        };
        let mut nonce = [0; 24];
        random(&mut nonce)?;
        Self::wrap_with(derivation, key, label, DateTime::now(), nonce, secret, config_sum)
    }

    fn wrap_with(
        derivation: Derivation,
        key: &Key,
        label: &str,
        created: DateTime,
        nonce: [u8; 24],
        secret: &[u8; 32],
        config_sum: &[u8; 32],
    ) -> Result<Self> {
        let wrapping = derivation.key(key)?.ok_or_else(|| Error::internal("a key does not fit its own record"))?;
        let mut wrapped = Zeroizing::new([&secret[..], &config_sum[..]].concat());
        let tag = XChaCha20Poly1305::new((&*wrapping).into())
            .encrypt_inout_detached(&XNonce::from(nonce), &associated(label), wrapped.as_mut_slice().into())
            .map_err(|_| Error::internal("the secret cannot be sealed"))?;
        let wrapped = binary(&[&wrapped[..], &tag[..]].concat());
        Ok(Self { derivation, label: label.to_owned(), created, nonce: binary(&nonce), wrapped })
    }

    /// Opens the record; none if it was made for another key. Stretches a passphrase: not for async tasks.
    pub(super) fn unwrap(&self, key: &Key) -> Result<Option<Unwrapped>> {
        let Some(wrapping) = self.derivation.key(key)? else { return Ok(None) };
        let malformed = || Error::corrupt("a key's record is malformed");
        let nonce: [u8; 24] = self.nonce.bytes.as_slice().try_into().map_err(|_| malformed())?;
        let (body, tag) = self.wrapped.bytes.split_last_chunk::<16>().ok_or_else(malformed)?;
        let mut plain: Zeroizing<[u8; 64]> = Zeroizing::new(body.try_into().map_err(|_| malformed())?);
        let opened = XChaCha20Poly1305::new((&*wrapping).into()).decrypt_inout_detached(
            &XNonce::from(nonce),
            &associated(&self.label),
            plain.as_mut_slice().into(),
            &Tag::from(*tag),
        );
        if opened.is_err() {
            return Ok(None);
        }
        let mut found = Unwrapped { secret: Zeroizing::new([0; 32]), config_sum: [0; 32] };
        found.secret.copy_from_slice(&plain[..32]);
        found.config_sum.copy_from_slice(&plain[32..]);
        Ok(Some(found))
    }

    pub(super) fn kind(&self) -> KeyKind {
        match self.derivation {
            Derivation::Argon2id { .. } => KeyKind::Passphrase,
            Derivation::Host => KeyKind::Host,
        }
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok(bson::serialize_to_vec(self)?)
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        bson::deserialize_from_slice(bytes).map_err(|error| Error::corrupt("a key's record is malformed").with_source(error))
    }
}

impl Derivation {
    /// The key that seals; none if the record is of another kind.
    fn key(&self, key: &Key) -> Result<Option<Zeroizing<[u8; 32]>>> {
        let mut derived = Zeroizing::new([0; 32]);
        match (self, &key.0) {
            (Self::Argon2id { memory_kib, iterations, lanes, salt }, Kind::Passphrase(passphrase)) => {
                // They come from the archive, and whoever can write there must not make us allocate a terabyte.
                let number = |value: i64, most: u32| u32::try_from(value).ok().filter(|value| *value <= most);
                let parameters = number(*memory_kib, MOST_MEMORY_KIB)
                    .zip(number(*iterations, MOST_ITERATIONS))
                    .zip(number(*lanes, MOST_LANES))
                    .and_then(|((memory, iterations), lanes)| Params::new(memory, iterations, lanes, Some(32)).ok())
                    .ok_or_else(|| Error::corrupt("a key's record asks for parameters that make no sense"))?;
                // The crate would leave what it computed in the memory that it gives back.
                let mut memory = Zeroizing::new(vec![Block::new(); parameters.block_count()]);
                Argon2::new(Algorithm::Argon2id, Version::V0x13, parameters)
                    .hash_password_into_with_memory(passphrase, &salt.bytes, &mut *derived, memory.as_mut_slice())
                    .map_err(|error| Error::corrupt(format!("a key's record cannot be used: {error}")))?;
            }
            (Self::Host, Kind::Host(host)) => {
                *derived = blake3::derive_key(HOST_CONTEXT, &host[..]);
            }
            _ => return Ok(None),
        }
        Ok(Some(derived))
    }
}

fn associated(label: &str) -> Vec<u8> {
    [PURPOSE, label.as_bytes()].concat()
}

fn binary(bytes: &[u8]) -> Binary {
    Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() }
}

const PURPOSE: &[u8] = b"mongo-backup 2026-11 key";
const HOST_CONTEXT: &str = "mongo-backup 2026-11 host key";

// RFC 9106's choice for machines without 2 GiB to spare.
const MEMORY_KIB: i64 = 64 << 10;
const ITERATIONS: i64 = 3;
const LANES: i64 = 4;

const MOST_MEMORY_KIB: u32 = 1 << 20;
const MOST_ITERATIONS: u32 = 64;
const MOST_LANES: u32 = 64;

#[cfg(test)]
mod tests {
    use mongo_core::ErrorKind;

    use super::*;

    fn wrap(key: &Key) -> KeyRecord {
        KeyRecord::wrap(key, "label", &[5; 32], &[6; 32]).unwrap()
    }

    #[test]
    fn each_key_opens_its_own_record_and_no_other() {
        let (passphrase, host) = (Key::passphrase("one"), Key::host([9; 32]));
        for (key, wrong) in [(&passphrase, Key::passphrase("two")), (&host, Key::host([8; 32]))] {
            let record = KeyRecord::from_bytes(&wrap(key).to_bytes().unwrap()).unwrap();
            let opened = record.unwrap(key).unwrap().unwrap();
            assert_eq!((*opened.secret, opened.config_sum), ([5; 32], [6; 32]));
            assert!(record.unwrap(&wrong).unwrap().is_none());
        }
        assert!(wrap(&passphrase).unwrap(&host).unwrap().is_none());
    }

    #[test]
    fn a_changed_record_opens_nothing() {
        let key = Key::host([9; 32]);
        let mut relabelled = wrap(&key);
        relabelled.label = "other".to_owned();
        assert!(relabelled.unwrap(&key).unwrap().is_none());
        let mut changed = wrap(&key);
        changed.wrapped.bytes[3] ^= 1;
        assert!(changed.unwrap(&key).unwrap().is_none());
    }

    #[test]
    fn parameters_from_the_archive_cannot_exhaust_the_reader() {
        let mut record = wrap(&Key::passphrase("one"));
        if let Derivation::Argon2id { memory_kib, .. } = &mut record.derivation {
            *memory_kib = 1 << 40;
        }
        let error = record.unwrap(&Key::passphrase("one")).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::CorruptData);
    }

    #[test]
    fn test_vectors() {
        // Also in docs/format.md.
        let argon = Derivation::Argon2id { memory_kib: 64, iterations: 1, lanes: 1, salt: binary(&[4; 16]) };
        let key = Key::passphrase("passphrase");
        assert_eq!(
            hex::encode(*argon.key(&key).unwrap().unwrap()),
            "77dacd40684184c59eaf0371594e10d8786cb826387bfb924469607df0a95c14"
        );
        assert_eq!(
            hex::encode(*Derivation::Host.key(&Key::host([9; 32])).unwrap().unwrap()),
            "ba2c91a1c35fffa22db0794173ef500d134f0878d47e4943bb0057da5074873e"
        );
        let record = KeyRecord::wrap_with(argon, &key, "label", DateTime::from_millis(0), [3; 24], &[5; 32], &[6; 32]).unwrap();
        let wrapped = "61858b130c6d798cb72b36d5c5785a77567e14e27da9260b0c99bbe7c80b021e\
                       a7af095c89225bb5e1745d18cc1750095b6324eca326ae761bb63e674bf7210a\
                       de48cd625864e6bc663227a6e623de67";
        assert_eq!(hex::encode(&record.wrapped.bytes), wrapped);
    }
}
