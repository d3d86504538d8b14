//! What holds for a whole repository, fixed when it is made.

use mongo_core::{
    Error, Result,
    bson::{self, Binary, DateTime, spec::BinarySubtype},
};
use serde::{Deserialize, Serialize};

use super::segment::SegmentSizes;

/// The repository's identity, keys and sizes.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) id: [u8; 16],
    pub(crate) created: DateTime,
    pub(crate) keys: Keys,
    pub(crate) sizes: SegmentSizes,
    pub(crate) pack_bytes: u32,
}

/// The keys that everything with a name or a boundary is computed with, each derived from the repository's secret.
#[derive(Clone)]
pub(crate) struct Keys {
    secret: [u8; 32],
    pub(crate) documents: [u8; 32],
    pub(crate) nodes: [u8; 32],
    pub(crate) boundaries: [u8; 16],
}

impl Keys {
    pub(crate) fn from_secret(secret: [u8; 32]) -> Self {
        let mut boundaries = [0; 16];
        boundaries.copy_from_slice(&blake3::derive_key(BOUNDARIES, &secret)[..16]);
        Self { documents: blake3::derive_key(DOCUMENTS, &secret), nodes: blake3::derive_key(NODES, &secret), boundaries, secret }
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
}

/// The payload of the object `config`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Stored {
    id: Binary,
    created: DateTime,
    secret: Binary,
    segment_min_bytes: i64,
    segment_target_bytes: i64,
    segment_max_bytes: i64,
    pack_bytes: i64,
}

impl Config {
    pub(crate) fn new(sizes: SegmentSizes, pack_bytes: u32) -> Result<Self> {
        let (mut id, mut secret) = ([0; 16], [0; 32]);
        for part in [&mut id[..], &mut secret[..]] {
            getrandom::fill(part).map_err(|error| Error::internal(format!("no randomness to be had: {error}")))?;
        }
        Ok(Self { id, created: DateTime::now(), keys: Keys::from_secret(secret), sizes, pack_bytes })
    }

    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let binary = |bytes: &[u8]| Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() };
        Ok(bson::serialize_to_vec(&Stored {
            id: binary(&self.id),
            created: self.created,
            secret: binary(&self.keys.secret),
            segment_min_bytes: i64::from(self.sizes.min),
            segment_target_bytes: i64::from(self.sizes.target),
            segment_max_bytes: i64::from(self.sizes.max),
            pack_bytes: i64::from(self.pack_bytes),
        })?)
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let stored: Stored = bson::deserialize_from_slice(bytes)?;
        let wrong = |_| Error::corrupt("the repository's config has a field of the wrong size");
        let size = |size: i64| u32::try_from(size).map_err(|_| Error::corrupt("the repository's config has a size out of range"));
        let secret: [u8; 32] = stored.secret.bytes.try_into().map_err(wrong)?;
        Ok(Self {
            id: stored.id.bytes.try_into().map_err(wrong)?,
            created: stored.created,
            keys: Keys::from_secret(secret),
            sizes: SegmentSizes::new(
                size(stored.segment_min_bytes)?,
                size(stored.segment_target_bytes)?,
                size(stored.segment_max_bytes)?,
            )?,
            pack_bytes: size(stored.pack_bytes)?,
        })
    }
}

const DOCUMENTS: &str = "mongo-backup 2026-11 segment id of documents";
const NODES: &str = "mongo-backup 2026-11 segment id of tree nodes";
const BOUNDARIES: &str = "mongo-backup 2026-11 segment boundaries";
