//! Slices: stretches of a replica set's oplog, each beginning with the entry with which the one before it ends.
//!
//! So that nothing is missing between two slices can be seen from their names, and proved by the sums of that entry in both. Where
//! something is missing for certain, because the oplog was overrun before it could be read, a gap says so.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use mongo_core::{
    Error, ErrorKind, Result,
    bson::{self, Binary, DateTime, RawDocument, Timestamp, spec::BinarySubtype},
    transfer::oplog::ReplicaSetId,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    Repository, TOOL, documents_of,
    envelope::{self, Magic},
    manifest::SnapshotManifest,
};
use crate::archive::{ObjectMeta, ObjectName, PutMode, PutOutcome};

/// A stretch of the oplog, both ends included; or one that is missing, of which the ends are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stretch {
    pub(crate) first: Timestamp,
    pub(crate) last: Timestamp,
}

/// What is stored of one replica set's oplog, by the names of the objects.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stretches {
    /// In order of their beginnings, with their sizes in the archive.
    pub(crate) slices: BTreeMap<Stretch, u64>,
    pub(crate) gaps: BTreeMap<Stretch, u64>,
}

/// The payload of a slice begins with this; behind it stand the entries, back to back and compressed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredHeader {
    entries: i64,
    bytes: i64,
    /// SHA-256 of the first and of the last entry.
    first_sum: Binary,
    last_sum: Binary,
    captured: DateTime,
    tool: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredGap {
    reason: String,
    noticed: DateTime,
    tool: String,
}

/// A slice that was read.
pub(crate) struct Slice {
    pub(crate) first_sum: EntrySum,
    pub(crate) last_sum: EntrySum,
    entries: Vec<u8>,
}

impl fmt::Debug for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slice").field("bytes", &self.entries.len()).finish_non_exhaustive()
    }
}

impl Slice {
    /// The entries, in order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = Result<&RawDocument>> {
        documents_of(&self.entries)
    }
}

/// The SHA-256 of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntrySum([u8; 32]);

impl EntrySum {
    pub(crate) fn of(entry: &RawDocument) -> Self {
        Self(Sha256::digest(entry.as_bytes()).into())
    }

    fn stored(self) -> Binary {
        Binary { subtype: BinarySubtype::Generic, bytes: self.0.to_vec() }
    }

    fn read(stored: &Binary) -> Result<Self> {
        let sum = stored.bytes.as_slice().try_into();
        sum.map(Self).map_err(|_| Error::corrupt("a slice of the oplog has a sum of the wrong size"))
    }
}

/// Entries that will be a slice.
#[derive(Default)]
pub(crate) struct OpenSlice {
    entries: Vec<u8>,
    count: i64,
    ends: Option<(Timestamp, EntrySum, Timestamp, EntrySum)>,
}

impl fmt::Debug for OpenSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenSlice").field("count", &self.count).finish_non_exhaustive()
    }
}

impl OpenSlice {
    pub(crate) fn push(&mut self, position: Timestamp, entry: &RawDocument) {
        let sum = EntrySum::of(entry);
        self.entries.extend_from_slice(entry.as_bytes());
        self.count += 1;
        self.ends = Some(match self.ends {
            None => (position, sum, position, sum),
            Some((first, first_sum, ..)) => (first, first_sum, position, sum),
        });
    }

    pub(crate) fn bytes(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn entries(&self) -> i64 {
        self.count
    }

    /// Where it ends.
    pub(crate) fn last(&self) -> Option<(Timestamp, EntrySum)> {
        self.ends.map(|(_, _, last, sum)| (last, sum))
    }

    /// What comes next: a slice that begins with the entry with which this one ends.
    pub(crate) fn next(&self) -> Result<Self> {
        let mut next = Self::default();
        if let (Some((last, _)), Some(entry)) = (self.last(), documents_of(&self.entries).last()) {
            next.push(last, entry?);
        }
        Ok(next)
    }
}

impl Repository {
    /// Stores a slice. One that is there already, of the same stretch, is the same.
    pub(crate) async fn store_slice(&self, set: ReplicaSetId, slice: &OpenSlice, level: i32) -> Result<u64> {
        let Some((first, first_sum, last, last_sum)) = slice.ends else { return Ok(0) };
        let name = Stretch { first, last }.slice(set)?;
        let header = StoredHeader {
            entries: slice.count,
            bytes: i64::try_from(slice.entries.len()).unwrap_or(i64::MAX),
            first_sum: first_sum.stored(),
            last_sum: last_sum.stored(),
            captured: DateTime::now(),
            tool: TOOL.to_owned(),
        };
        let mut payload = bson::serialize_to_vec(&header)?;
        let compressed = zstd::bulk::compress(&slice.entries, level);
        payload
            .extend(compressed.map_err(|error| Error::internal("a slice of the oplog cannot be compressed").with_source(error))?);
        let object = envelope::seal(Magic::SLICE, Some(&name), self.config().cipher.as_ref(), &payload)?;
        let stored = object.len() as u64;
        if self.archive().put(&name, object, PutMode::CreateOnly).await? == PutOutcome::AlreadyExists {
            let there = self.slice(set, Stretch { first, last }).await?;
            if (there.first_sum, there.last_sum) != (first_sum, last_sum) {
                return Err(other_history(&name));
            }
        }
        Ok(stored)
    }

    /// Says that a stretch between two entries is missing.
    pub(crate) async fn store_gap(&self, set: ReplicaSetId, gap: Stretch, reason: &str) -> Result<()> {
        let name = gap.gap(set)?;
        let stored = StoredGap { reason: reason.to_owned(), noticed: DateTime::now(), tool: TOOL.to_owned() };
        self.put_mark(&name, &stored, PutMode::Replace).await.map(drop)
    }

    /// What is stored of the oplogs of all replica sets.
    pub(crate) async fn all_stretches(&self) -> Result<Vec<(ReplicaSetId, Stretches)>> {
        let objects: Vec<ObjectMeta> = self.archive().list(SLICES).try_collect().await?;
        let mut all: BTreeMap<ReplicaSetId, Stretches> = BTreeMap::new();
        for object in objects {
            let Some((set, stretch, is_gap)) = parse(object.name.as_str()) else { continue };
            let stretches = all.entry(set).or_default();
            let kind = if is_gap { &mut stretches.gaps } else { &mut stretches.slices };
            kind.insert(stretch, object.size);
        }
        Ok(all.into_iter().collect())
    }

    /// What is stored of the oplog of one replica set.
    pub(crate) async fn stretches(&self, set: ReplicaSetId) -> Result<Stretches> {
        let found = self.all_stretches().await?.into_iter().find(|(other, _)| *other == set);
        Ok(found.map(|(_, stretches)| stretches).unwrap_or_default())
    }

    /// Reads a slice.
    pub(crate) async fn slice(&self, set: ReplicaSetId, stretch: Stretch) -> Result<Slice> {
        let name = stretch.slice(set)?;
        let object = match self.archive().get(&name, None).await {
            Ok(object) => object,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(Error::corrupt("a slice of the oplog is missing from the archive").with_context("object", name));
            }
            Err(error) => return Err(error),
        };
        let payload = envelope::open(Magic::SLICE, &name, self.config().cipher.as_ref(), &object)?;
        tokio::task::spawn_blocking(move || read(&name, stretch, &payload)).await?
    }

    pub(crate) async fn remove_stretch(&self, set: ReplicaSetId, stretch: Stretch, is_gap: bool) -> Result<()> {
        let name = if is_gap { stretch.gap(set)? } else { stretch.slice(set)? };
        self.archive().delete(&name).await
    }

    /// Up to when a snapshot can be rolled forward, with the oplog that is stored now; none if it cannot.
    ///
    /// # Errors
    /// The archive's own.
    pub async fn reach(&self, snapshot: &SnapshotManifest) -> Result<Option<Timestamp>> {
        let (Some(set), Some(from)) = (snapshot.replica_set, snapshot.resume_point) else { return Ok(None) };
        let until = self.stretches(set).await?.cover(from, None).last().map(|stretch| stretch.last);
        Ok(until.filter(|until| snapshot.consistent_from().is_some_and(|consistent| *until >= consistent)))
    }
}

impl Stretch {
    fn text(self) -> String {
        let hex = |at: Timestamp| format!("{:08x}{:08x}", at.time, at.increment);
        format!("{}-{}", hex(self.first), hex(self.last))
    }

    fn slice(self, set: ReplicaSetId) -> Result<ObjectName> {
        ObjectName::new(format!("{SLICES}{set}/{}", self.text()))
    }

    fn gap(self, set: ReplicaSetId) -> Result<ObjectName> {
        ObjectName::new(format!("{SLICES}{set}/{}{GAP}", self.text()))
    }
}

impl Stretches {
    /// The slices, in order, that together hold everything from `from` on without a hole, up to `until` or as far as they reach. The first entry of
    /// each is known from those before it, or is not later than `from`.
    pub(crate) fn cover(&self, from: Timestamp, until: Option<Timestamp>) -> Vec<Stretch> {
        let mut reached = from;
        let mut chain = Vec::new();
        while until.is_none_or(|until| reached < until) || chain.is_empty() {
            let next = self.slices.keys().take_while(|slice| slice.first <= reached).max_by_key(|slice| slice.last);
            match next.filter(|next| next.last > reached || (chain.is_empty() && next.last == reached)) {
                Some(next) => {
                    reached = next.last;
                    chain.push(*next);
                }
                None => break,
            }
        }
        chain
    }

    /// Where the newest slice ends.
    pub(crate) fn end(&self) -> Option<Stretch> {
        self.slices.keys().copied().max_by_key(|slice| slice.last)
    }
}

fn parse(name: &str) -> Option<(ReplicaSetId, Stretch, bool)> {
    let (set, rest) = name.strip_prefix(SLICES)?.split_once('/')?;
    let (stretch, is_gap) = rest.strip_suffix(GAP).map_or((rest, false), |stretch| (stretch, true));
    let (first, last) = stretch.split_once('-')?;
    let position = |text: &str| {
        let (time, increment) = text.split_at_checked(8).filter(|_| text.len() == 16)?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        Some(Timestamp { time: number(time)?, increment: number(increment)? })
    };
    Some((set.parse().ok()?, Stretch { first: position(first)?, last: position(last)? }, is_gap))
}

fn read(name: &ObjectName, stretch: Stretch, payload: &Bytes) -> Result<Slice> {
    let damaged = |what: &'static str| Error::corrupt(what).with_context("object", name);
    let (header, entries) = decode(payload).map_err(|error| error.with_context("object", name))?;
    let (first_sum, last_sum) = (EntrySum::read(&header.first_sum)?, EntrySum::read(&header.last_sum)?);
    let (mut count, mut first, mut last) = (0, None, None);
    for entry in documents_of(&entries) {
        let entry = entry?;
        first = first.or(Some(entry));
        last = Some(entry);
        count += 1;
    }
    let position = |entry: Option<&RawDocument>| entry.and_then(|entry| entry.get_timestamp("ts").ok());
    if count != header.entries || (position(first), position(last)) != (Some(stretch.first), Some(stretch.last)) {
        return Err(damaged("a slice of the oplog does not hold what its name says"));
    }
    if (first.map(EntrySum::of), last.map(EntrySum::of)) != (Some(first_sum), Some(last_sum)) {
        return Err(damaged("a slice of the oplog does not hold the entries that it was made with"));
    }
    Ok(Slice { first_sum, last_sum, entries })
}

fn decode(payload: &[u8]) -> Result<(StoredHeader, Vec<u8>)> {
    let damaged = || Error::corrupt("a slice of the oplog is malformed");
    let length = payload.first_chunk::<4>().map(|bytes| i32::from_le_bytes(*bytes));
    let length = length.and_then(|length| usize::try_from(length).ok()).ok_or_else(damaged)?;
    let (header, compressed) = payload.split_at_checked(length).ok_or_else(damaged)?;
    let header: StoredHeader = bson::deserialize_from_slice(header).map_err(|error| damaged().with_source(error))?;
    let plain = usize::try_from(header.bytes).ok().filter(|bytes| *bytes <= LARGEST).ok_or_else(damaged)?;
    let entries = zstd::bulk::decompress(compressed, plain).map_err(|error| damaged().with_source(error))?;
    if entries.len() == plain { Ok((header, entries)) } else { Err(damaged()) }
}

/// The parser of slices, for the fuzz target.
#[cfg(fuzzing)]
pub(crate) fn fuzz(payload: &[u8]) {
    if let Ok((_, entries)) = decode(payload) {
        let _ = documents_of(&entries).count();
    }
    let _ = bson::deserialize_from_slice::<StoredGap>(payload);
}

fn other_history(name: &ObjectName) -> Error {
    Error::new(
        ErrorKind::Conflict,
        "the archive holds another history of this replica set: was the set brought back from older files? use another archive",
    )
    .with_context("object", name)
}

pub(crate) const SLICES: &str = "slices/";
const GAP: &str = ".gap";
/// A slice is stored when it has reached a size, and the last entry can be 16 MiB.
const LARGEST: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use mongo_core::bson::rawdoc;

    use super::*;
    use crate::{Key, MemoryArchive};

    fn at(time: u32) -> Timestamp {
        Timestamp { time, increment: 1 }
    }

    fn stretches(slices: &[(u32, u32)]) -> Stretches {
        let slices = slices.iter().map(|(first, last)| (Stretch { first: at(*first), last: at(*last) }, 1)).collect();
        Stretches { slices, gaps: BTreeMap::new() }
    }

    fn covered(slices: &[(u32, u32)], from: u32, until: Option<u32>) -> Vec<(u32, u32)> {
        let cover = stretches(slices).cover(at(from), until.map(at));
        cover.iter().map(|stretch| (stretch.first.time, stretch.last.time)).collect()
    }

    #[test]
    fn a_chain_ends_where_nothing_proves_that_it_goes_on() {
        assert_eq!(covered(&[(1, 5), (5, 9), (10, 12)], 3, None), [(1, 5), (5, 9)]);
        assert_eq!(covered(&[(1, 5), (5, 9), (10, 12)], 3, Some(4)), [(1, 5)]);
        assert_eq!(covered(&[(4, 5)], 3, None), []);
        assert_eq!(covered(&[(1, 3)], 3, None), [(1, 3)]);
        assert_eq!(covered(&[(1, 5), (2, 8), (4, 6), (8, 9)], 3, None), [(2, 8), (8, 9)], "two that captured side by side");
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        let set: ReplicaSetId = "00112233445566778899aabbccddeeff".parse().unwrap();
        let stretch = Stretch { first: Timestamp { time: 7, increment: u32::MAX }, last: at(8) };
        assert_eq!(parse(stretch.slice(set).unwrap().as_str()), Some((set, stretch, false)));
        assert_eq!(parse(stretch.gap(set).unwrap().as_str()), Some((set, stretch, true)));
        for other in ["slices/x", "slices/00112233445566778899aabbccddeeff/1-2", "packs/00112233445566778899aabbccddeeff/1-2"] {
            assert_eq!(parse(other), None);
        }
    }

    #[tokio::test]
    async fn a_slice_comes_back_as_it_was_and_under_no_other_name() {
        let repository = Repository::open_or_init(MemoryArchive::new(), Key::host([1; 32])).await.unwrap();
        repository.make().await.unwrap();
        let set: ReplicaSetId = "00112233445566778899aabbccddeeff".parse().unwrap();
        let mut slice = OpenSlice::default();
        for time in 1..5 {
            slice.push(at(time), &rawdoc! { "ts": at(time), "op": "n" });
        }
        repository.store_slice(set, &slice, 1).await.unwrap();
        repository.store_slice(set, &slice, 1).await.unwrap();
        let stretch = Stretch { first: at(1), last: at(4) };
        let read = repository.slice(set, stretch).await.unwrap();
        assert_eq!(read.entries().count(), 4);
        let next = slice.next().unwrap();
        assert_eq!((next.entries(), next.last()), (1, Some((at(4), read.last_sum))));
        let other = Stretch { first: at(1), last: at(5) };
        let object = repository.archive().get(&stretch.slice(set).unwrap(), None).await.unwrap();
        repository.archive().put(&other.slice(set).unwrap(), object, PutMode::CreateOnly).await.unwrap();
        assert_eq!(repository.slice(set, other).await.unwrap_err().kind(), ErrorKind::CorruptData);
    }
}
