//! What a snapshot is: its manifest, and the record of each namespace in its catalog.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
    time::Duration,
};

use mongo_core::{
    Error, Namespace, NamespaceSelection, Result, Topology,
    bson::{Binary, DateTime, RawArrayBuf, RawDocument, RawDocumentBuf, Timestamp, cstr, rawdoc, spec::BinarySubtype},
    transfer::{
        catalog::{CollectionEntry, CollectionKind, LeftOut},
        oplog::ReplicaSetId,
    },
};
use serde::{Deserialize, Serialize};

use super::tree::TreeRoot;

/// The name of a snapshot: the millisecond of its beginning in UTC and eight random hexadecimal digits, as in
/// `20260228t021503007z-5f0c2a91`. Names sort by time.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(String);

impl SnapshotId {
    pub(crate) fn generate(now: DateTime) -> Result<Self> {
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(|error| Error::internal(format!("no randomness to be had: {error}")))?;
        let text = now.try_to_rfc3339_string().map_err(|error| Error::internal("the clock shows no date").with_source(error))?;
        let second: String = text.chars().take(19).filter(|c| !matches!(c, '-' | ':')).collect();
        let millis = now.timestamp_millis().rem_euclid(1000);
        format!("{}{millis:03}z-{}", second.to_ascii_lowercase(), hex::encode(random)).parse()
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SnapshotId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let good = text.len() == 28
            && text.bytes().enumerate().all(|(position, byte)| match position {
                8 => byte == b't',
                18 => byte == b'z',
                19 => byte == b'-',
                0..=17 => byte.is_ascii_digit(),
                _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
            });
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(Error::invalid("this is no snapshot id: list the snapshots to see theirs")
                .with_context("got", text.escape_debug()))
        }
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How the documents of a snapshot relate to each other in time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
#[non_exhaustive]
pub enum Consistency {
    /// Everything was read as it was at one cluster time, but for the namespaces named.
    #[non_exhaustive]
    PointInTime {
        /// The cluster time.
        cluster_time: Timestamp,
        /// Namespaces that the server cannot read at a cluster time, each with the reason; they were read at about that time.
        exceptions: BTreeMap<String, String>,
    },
    /// Read over a while. The oplog of that while is stored, and makes it the state of its end when everything is restored.
    #[non_exhaustive]
    Window {
        /// The end of that while.
        until: Timestamp,
        /// Why it is not a point in time.
        reason: String,
    },
    /// Each document was read whole, but one at another time than the next.
    #[non_exhaustive]
    BestEffort {
        /// Why it is no better.
        reason: String,
    },
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PointInTime { cluster_time, exceptions } => {
                write!(f, "point in time {}.{}", cluster_time.time, cluster_time.increment)?;
                if exceptions.is_empty() {
                    Ok(())
                } else {
                    write!(f, ", but for {}", exceptions.keys().cloned().collect::<Vec<_>>().join(", "))
                }
            }
            Self::Window { until, reason } => {
                write!(f, "window, restored as of {}.{}: {reason}", until.time, until.increment)
            }
            Self::BestEffort { reason } => write!(f, "best effort: {reason}"),
        }
    }
}

/// What a snapshot holds and how it came about.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct SnapshotManifest {
    /// Its name.
    pub id: SnapshotId,
    /// Wall-clock time at which the backup began.
    pub started: DateTime,
    /// Wall-clock time at which it was complete.
    pub finished: DateTime,
    /// The version of the server that was read.
    pub server_version: String,
    /// What kind of deployment it was.
    pub topology: Topology,
    /// How the documents relate in time.
    pub consistency: Consistency,
    /// The cluster time from which a later backup or an oplog replay must go on; none for a standalone.
    pub resume_point: Option<Timestamp>,
    /// The replica set that was read, if it could be told; without it the snapshot cannot be rolled forward.
    #[serde(default)]
    pub replica_set: Option<ReplicaSetId>,
    /// When the last document was read of what was not read at one cluster time: replaying the oplog from the resume point gives one state from then
    /// on. None if everything was read at one time.
    #[serde(default)]
    pub read_until: Option<Timestamp>,
    /// When collections and indexes were as the snapshot defines them, by the oplog.
    #[serde(default)]
    pub defined_at: Option<Timestamp>,
    /// The snapshot from which what has not changed was taken over; none after a full scan.
    #[serde(default)]
    pub parent: Option<SnapshotId>,
    /// Whether documents were changed on their way in.
    #[serde(default)]
    pub is_transformed: bool,
    /// What was asked for.
    pub selection: NamespaceSelection,
    /// What the selection covered but the snapshot does not hold, and why.
    pub left_out: Vec<LeftOut>,
    /// Collections and views.
    pub namespaces: u64,
    /// Documents.
    pub documents: u64,
    /// Bytes of the documents as BSON.
    pub bytes: u64,
    /// Segments of documents and nodes that this backup stored.
    pub new_segments: u64,
    /// Segments and nodes that the repository had already.
    pub reused_segments: u64,
    /// Bytes that this backup added to the archive as segments.
    pub stored_bytes: u64,
    /// Which program wrote it, with its version.
    pub tool: String,
    /// What the host calls the deployment; `import` for a dump that was taken in.
    #[serde(default)]
    pub source: Option<String>,
    /// What it was marked with: see [`RetentionPolicy::keep_tags`](crate::RetentionPolicy::keep_tags).
    #[serde(default)]
    pub tags: BTreeSet<String>,
    pub(crate) catalog: TreeRoot,
}

impl SnapshotManifest {
    /// From when on a replay of the oplog makes one consistent state of what the snapshot holds. None for a standalone.
    pub fn consistent_from(&self) -> Option<Timestamp> {
        let at = match &self.consistency {
            Consistency::PointInTime { cluster_time, .. } => Some(*cluster_time),
            Consistency::Window { .. } | Consistency::BestEffort { .. } => None,
        };
        self.read_until.max(at)
    }

    /// Up to where everything is in the snapshot for certain.
    pub(crate) fn reflected(&self) -> Option<Timestamp> {
        match &self.consistency {
            Consistency::PointInTime { cluster_time, .. } => Some(*cluster_time),
            Consistency::Window { .. } | Consistency::BestEffort { .. } => self.resume_point,
        }
    }

    /// How long the backup took, by the wall clock.
    pub fn duration(&self) -> Duration {
        let millis = self.finished.timestamp_millis().saturating_sub(self.started.timestamp_millis());
        Duration::from_millis(u64::try_from(millis).unwrap_or(0))
    }
}

/// A namespace in a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotNamespace {
    pub(crate) entry: CollectionEntry,
    pub(crate) root: TreeRoot,
    pub(crate) boundary_bits: u8,
    /// Whether its documents were read by the `_id` index; else they are in the order in which they were stored.
    pub(crate) in_id_order: bool,
}

impl SnapshotNamespace {
    /// Its name.
    pub fn namespace(&self) -> &Namespace {
        self.entry.namespace()
    }

    /// Its kind.
    pub fn kind(&self) -> CollectionKind {
        self.entry.kind()
    }

    /// Its definition.
    pub fn entry(&self) -> &CollectionEntry {
        &self.entry
    }

    /// Documents; of a time-series collection its buckets.
    pub fn documents(&self) -> u64 {
        u64::try_from(self.root.documents).unwrap_or(0)
    }

    /// Bytes of BSON.
    pub fn bytes(&self) -> u64 {
        u64::try_from(self.root.bytes).unwrap_or(0)
    }

    /// Segments.
    pub fn segments(&self) -> u64 {
        u64::try_from(self.root.segments).unwrap_or(0)
    }

    /// The record as a document of the snapshot's catalog.
    pub(crate) fn to_document(&self) -> Result<RawDocumentBuf> {
        let kind = match self.kind() {
            CollectionKind::Collection => "collection",
            CollectionKind::TimeSeries => "timeseries",
            CollectionKind::View => "view",
            other => return Err(Error::internal(format!("a kind of collection without a name in the format: {other}"))),
        };
        let mut indexes = RawArrayBuf::new();
        for index in self.entry.indexes() {
            indexes.push(index.clone());
        }
        let mut record = rawdoc! { "_id": self.namespace().to_string(), "kind": kind };
        record.append(cstr!("info"), self.entry.info().to_owned());
        record.append(cstr!("indexes"), indexes);
        record.append(cstr!("boundaryBits"), i32::from(self.boundary_bits));
        if let Some(uuid) = self.entry.uuid().filter(|_| self.kind() == CollectionKind::TimeSeries) {
            record.append(cstr!("bucketsUuid"), Binary { subtype: BinarySubtype::Uuid, bytes: uuid.to_vec() });
        }
        if !self.in_id_order {
            record.append(cstr!("order"), STORED_ORDER);
        }
        let root = mongo_core::bson::serialize_to_vec(&self.root)?;
        record.append(cstr!("root"), RawDocumentBuf::from_bytes(root)?);
        Ok(record)
    }

    pub(crate) fn from_document(record: &RawDocument) -> Result<Self> {
        let malformed =
            |error: mongo_core::bson::error::Error| Error::corrupt("a catalog record is malformed").with_source(error);
        let namespace: Namespace = record.get_str("_id").map_err(malformed)?.parse()?;
        let kind = match record.get_str("kind").map_err(malformed)? {
            "collection" => CollectionKind::Collection,
            "timeseries" => CollectionKind::TimeSeries,
            "view" => CollectionKind::View,
            _ => return Err(Error::corrupt("a catalog record is of an unknown kind").with_context("namespace", &namespace)),
        };
        let info = record.get_document("info").map_err(malformed)?.to_owned();
        let mut indexes = Vec::new();
        for index in record.get_array("indexes").map_err(malformed)? {
            let index = index.map_err(malformed)?;
            let index = index.as_document().ok_or_else(|| Error::corrupt("a catalog record is malformed"))?;
            indexes.push(index.to_owned());
        }
        let stored_order = record.get("order").map_err(malformed)?.is_some();
        let root: TreeRoot =
            mongo_core::bson::deserialize_from_slice(record.get_document("root").map_err(malformed)?.as_bytes())?;
        let bits = u8::try_from(record.get_i32("boundaryBits").map_err(malformed)?)
            .map_err(|_| Error::corrupt("a catalog record is malformed"))?;
        let buckets_uuid = record.get_binary("bucketsUuid").ok().and_then(|uuid| uuid.bytes.try_into().ok());
        let entry = CollectionEntry::from_parts(namespace, kind, info, indexes)?.with_buckets_uuid(buckets_uuid);
        let in_id_order = !stored_order && !entry.is_capped();
        Ok(Self { entry, root, boundary_bits: bits, in_id_order })
    }
}

/// The `order` of a collection whose documents were not read by their `_id`s.
const STORED_ORDER: &str = "stored";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_read_as_they_are_written_and_sort_by_time() {
        let early = SnapshotId::generate(DateTime::from_millis(0)).unwrap();
        let late = SnapshotId::generate(DateTime::from_millis(1_800_000_000_000)).unwrap();
        assert!(early < late);
        assert!(early.as_str().starts_with("19700101t000000000z-"));
        assert_eq!(late.as_str().parse::<SnapshotId>().unwrap(), late);
        for bad in ["", "latest", "../../x", "19700101t000000000z-0000000G"] {
            assert!(bad.parse::<SnapshotId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn records_read_as_they_are_written() {
        let info = rawdoc! { "name": "c", "type": "collection", "options": { "capped": true, "size": 4096 } };
        let index = rawdoc! { "v": 2, "key": { "_id": 1 }, "name": "_id_" };
        let entry = CollectionEntry::from_parts("db.c".parse().unwrap(), CollectionKind::Collection, info, vec![index]).unwrap();
        let record = SnapshotNamespace {
            entry,
            root: TreeRoot { node: None, documents: 0, bytes: 0, segments: 0 },
            boundary_bits: 6,
            in_id_order: true,
        };
        let read = SnapshotNamespace::from_document(&record.to_document().unwrap()).unwrap();
        assert_eq!(read.entry, record.entry);
        assert_eq!((read.root, read.boundary_bits), (record.root, 6));
    }

    fn consistency() -> impl Strategy<Value = Consistency> {
        let exceptions = proptest::collection::btree_map("[a-z.]{1,12}", ".{0,20}", 0..4);
        prop_oneof![
            (any::<u32>(), any::<u32>(), exceptions).prop_map(|(time, increment, exceptions)| Consistency::PointInTime {
                cluster_time: Timestamp { time, increment },
                exceptions,
            }),
            ".{0,40}".prop_map(|reason| Consistency::BestEffort { reason }),
            (any::<u32>(), ".{0,40}")
                .prop_map(|(time, reason)| Consistency::Window { until: Timestamp { time, increment: 1 }, reason }),
        ]
    }

    fn manifest() -> impl Strategy<Value = SnapshotManifest> {
        let count = || 0..i64::MAX as u64;
        let counts = (count(), count(), count(), count(), count(), count());
        let texts = (".{0,20}", ".{0,20}", proptest::option::of(".{0,20}"), proptest::collection::btree_set(".{0,12}", 0..4));
        let times = (0..4_000_000_000_000_i64, any::<i64>(), proptest::option::of((any::<u32>(), any::<u32>())));
        (times, consistency(), counts, texts, any::<[u8; 32]>()).prop_map(|(times, consistency, counts, texts, node)| {
            let (started, finished, resume_point) = times;
            SnapshotManifest {
                id: SnapshotId::generate(DateTime::from_millis(started)).unwrap(),
                started: DateTime::from_millis(started),
                finished: DateTime::from_millis(finished),
                server_version: texts.0,
                topology: Topology::ReplicaSet("rs \u{e9}".to_owned()),
                consistency,
                resume_point: resume_point.map(|(time, increment)| Timestamp { time, increment }),
                replica_set: resume_point.map(|_| "00112233445566778899aabbccddeeff".parse().unwrap()),
                read_until: resume_point.map(|(time, increment)| Timestamp { time, increment }),
                defined_at: resume_point.map(|(time, increment)| Timestamp { time, increment }),
                parent: resume_point.map(|_| SnapshotId::generate(DateTime::from_millis(started)).unwrap()),
                is_transformed: started % 2 == 0,
                selection: NamespaceSelection::all().including("shop.*").unwrap().excluding("*.tmp").unwrap(),
                left_out: vec![LeftOut::new("local.*", "belongs to the server itself")],
                namespaces: counts.0,
                documents: counts.1,
                bytes: counts.2,
                new_segments: counts.3,
                reused_segments: counts.4,
                stored_bytes: counts.5,
                tool: texts.1,
                source: texts.2,
                tags: texts.3,
                catalog: TreeRoot {
                    node: Some(Binary { subtype: BinarySubtype::Generic, bytes: node.to_vec() }),
                    documents: 1,
                    bytes: 2,
                    segments: 3,
                },
            }
        })
    }

    proptest! {
        #[test]
        fn manifests_read_as_they_are_written(manifest in manifest()) {
            let stored = mongo_core::bson::serialize_to_vec(&manifest).unwrap();
            let read: SnapshotManifest = mongo_core::bson::deserialize_from_slice(&stored).unwrap();
            prop_assert_eq!(format!("{read:?}"), format!("{manifest:?}"));
            prop_assert_eq!(mongo_core::bson::serialize_to_vec(&read).unwrap(), stored);
        }

        #[test]
        fn no_changed_byte_of_a_manifest_is_a_panic(manifest in manifest(), at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
            let mut stored = mongo_core::bson::serialize_to_vec(&manifest).unwrap();
            let at = at.index(stored.len());
            stored[at] ^= flip;
            let _ = mongo_core::bson::deserialize_from_slice::<SnapshotManifest>(&stored);
        }
    }
}
