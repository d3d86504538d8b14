//! What holds for a whole repository, fixed when it is made.

use bytes::Bytes;
use mongo_core::{
    Error, ErrorKind, Result,
    bson::{self, Binary, DateTime, spec::BinarySubtype},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::{
    cipher::{Cipher, random},
    envelope::{self, Magic},
    segment::CuttingRule,
};
use crate::archive::ObjectName;

/// The repository's identity, keys and sizes.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) keys: Keys,
    /// Seals everything but config and keys; none in a repository that is not encrypted.
    pub(crate) cipher: Option<Cipher>,
    pub(crate) cutting: CuttingRule,
    pub(crate) pack_bytes: u32,
    /// The [sum](sum()) of the object from which it was read, if it was. That may hold fields that are not known here.
    pub(crate) read_from: Option<[u8; 32]>,
    stored: StoredConfig,
}

/// The keys that everything with a name or a boundary is computed with, each derived from the repository's secret.
#[derive(Clone)]
pub(crate) struct Keys {
    pub(crate) secret: Zeroizing<[u8; 32]>,
    pub(crate) documents: [u8; 32],
    pub(crate) nodes: [u8; 32],
    pub(crate) boundaries: [u8; 16],
}

impl Keys {
    pub(crate) fn from_secret(secret: [u8; 32]) -> Self {
        let mut boundaries = [0; 16];
        boundaries.copy_from_slice(&blake3::derive_key(BOUNDARIES, &secret)[..16]);
        Self {
            documents: blake3::derive_key(DOCUMENTS, &secret),
            nodes: blake3::derive_key(NODES, &secret),
            boundaries,
            secret: Zeroizing::new(secret),
        }
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
}

/// The payload of the object `config`.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct StoredConfig {
    id: Binary,
    created: DateTime,
    /// Only where there is no cipher; else it lies in the objects of keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<Binary>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cipher: Option<String>,
    segment_min_bytes: i64,
    segment_target_bytes: i64,
    segment_max_bytes: i64,
    /// Not in the first repositories.
    #[serde(skip_serializing_if = "Option::is_none")]
    segment_anchor_bits: Option<i64>,
    pack_bytes: i64,
}

impl std::fmt::Debug for StoredConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredConfig").field("created", &self.created).field("cipher", &self.cipher).finish_non_exhaustive()
    }
}

impl Config {
    /// The config of a new repository.
    pub(crate) fn generate(cutting: CuttingRule, pack_bytes: u32, encrypted: bool) -> Result<Self> {
        let (mut id, mut secret) = ([0; 16], [0; 32]);
        random(&mut id)?;
        random(&mut secret)?;
        let binary = |bytes: &[u8]| Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() };
        let stored = StoredConfig {
            id: binary(&id),
            created: DateTime::now(),
            secret: (!encrypted).then(|| binary(&secret)),
            cipher: encrypted.then(|| CIPHER.to_owned()),
            segment_min_bytes: i64::from(cutting.min),
            segment_target_bytes: i64::from(cutting.target),
            segment_max_bytes: i64::from(cutting.max),
            segment_anchor_bits: Some(i64::from(cutting.anchor_bits)),
            pack_bytes: i64::from(pack_bytes),
        };
        stored.unlock(secret)
    }

    /// The object `config`.
    pub(crate) fn to_object(&self, name: &ObjectName) -> Result<Bytes> {
        envelope::seal(Magic::CONFIG, Some(name), None, &bson::serialize_to_vec(&self.stored)?)
    }
}

impl StoredConfig {
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let stored: Self = bson::deserialize_from_slice(bytes)?;
        match stored.cipher.as_deref() {
            None | Some(CIPHER) => Ok(stored),
            Some(other) => Err(Error::new(
                ErrorKind::Unsupported,
                "the repository is encrypted in a way that is not known here: use a newer version of mongo-backup",
            )
            .with_context("cipher", other.escape_debug())),
        }
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        self.cipher.is_some()
    }

    /// The secret of a repository that is not encrypted.
    pub(crate) fn plain_secret(&self) -> Result<[u8; 32]> {
        let secret = self.secret.as_ref().ok_or_else(|| Error::corrupt("the repository's config has no secret"))?;
        secret.bytes.as_slice().try_into().map_err(|_| wrong_size())
    }

    /// The config with its secret.
    pub(crate) fn unlock(self, secret: [u8; 32]) -> Result<Config> {
        let size = |size: i64| u32::try_from(size).map_err(|_| out_of_range());
        let id = self.id.bytes.as_slice().try_into().map_err(|_| wrong_size())?;
        Ok(Config {
            cipher: self.is_encrypted().then(|| Cipher::new(&blake3::derive_key(SEALING, &secret), id)),
            keys: Keys::from_secret(secret),
            cutting: CuttingRule::new(
                size(self.segment_min_bytes)?,
                size(self.segment_target_bytes)?,
                size(self.segment_max_bytes)?,
                self.segment_anchor_bits.map_or(Ok(FIRST_ANCHOR_BITS), |bits| u8::try_from(bits).map_err(|_| out_of_range()))?,
            )?,
            pack_bytes: size(self.pack_bytes)?,
            read_from: None,
            stored: self,
        })
    }
}

/// What is sealed together with the secret, so that a config cannot be exchanged.
pub(crate) fn sum(object: &[u8]) -> [u8; 32] {
    Sha256::digest(object).into()
}

fn out_of_range() -> Error {
    Error::corrupt("the repository's config has a number out of range")
}

fn wrong_size() -> Error {
    Error::corrupt("the repository's config has a field of the wrong size")
}

/// What holds where the config does not say it.
const FIRST_ANCHOR_BITS: u8 = 3;
const CIPHER: &str = "xchacha20-poly1305";
const DOCUMENTS: &str = "mongo-backup 2026-11 segment id of documents";
const NODES: &str = "mongo-backup 2026-11 segment id of tree nodes";
const BOUNDARIES: &str = "mongo-backup 2026-11 segment boundaries";
const SEALING: &str = "mongo-backup 2026-11 sealing";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_vectors_of_derived_keys() {
        // Also in docs/format.md.
        let keys = Keys::from_secret([5; 32]);
        assert_eq!(hex::encode(keys.documents), "cade5523557241f4c620a67fa463270450c0e02ead46ccce17e1ecce2cd46e43");
        assert_eq!(hex::encode(keys.nodes), "2d0f4b4c7e9743578120a430f2b2836b31063c27c096bdc1190aa99b9950ae53");
        assert_eq!(hex::encode(keys.boundaries), "6bb16521f1af52630b6267e2b9bc6c9a");
        let sealing = blake3::derive_key(SEALING, &[5; 32]);
        assert_eq!(hex::encode(sealing), "54da4659f09e204e8ce0b31cb9313d2394cfaa01373c3fc4d8f9f4394b6a9219");
    }

    #[test]
    fn a_config_of_the_first_repositories_cuts_as_they_were_cut() {
        let mut stored = Config::generate(CuttingRule::new(1, 2, 3, 4).unwrap(), 4, false).unwrap().stored;
        stored.segment_anchor_bits = None;
        let bytes = bson::serialize_to_vec(&stored).unwrap();
        let secret = stored.plain_secret().unwrap();
        let read = StoredConfig::from_bytes(&bytes).unwrap().unlock(secret).unwrap();
        assert_eq!(read.cutting, CuttingRule::new(1, 2, 3, 3).unwrap());
        assert_eq!(bson::serialize_to_vec(&read.stored).unwrap(), bytes);
    }

    #[test]
    fn a_config_reads_as_it_was_written_and_shows_no_secret() {
        let name = ObjectName::new("config").unwrap();
        for encrypted in [false, true] {
            let config = Config::generate(CuttingRule::new(1, 2, 3, 4).unwrap(), 4, encrypted).unwrap();
            let object = config.to_object(&name).unwrap();
            let stored = StoredConfig::from_bytes(&envelope::open(Magic::CONFIG, &name, None, &object).unwrap()).unwrap();
            assert_eq!(stored.plain_secret().is_err(), encrypted);
            let read = stored.unlock(*config.keys.secret).unwrap();
            assert_eq!((read.cutting, read.pack_bytes, read.cipher.is_some()), (config.cutting, 4, encrypted));
            assert_eq!(read.to_object(&name).unwrap(), object);
            let needle = hex::encode(&config.keys.secret[..4]);
            assert!(!format!("{config:?}").contains(&needle));
            assert_eq!(object.windows(32).any(|window| window == &config.keys.secret[..]), !encrypted);
        }
    }
}
