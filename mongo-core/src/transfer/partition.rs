//! Cutting a collection into `_id` ranges that can be read side by side.
//!
//! A filter such as `{_id: {$gte: x, $lt: y}}` compares only values of the same type ("type bracketing"): ranges made
//! that way silently lose every document whose `_id` has another type than the bounds. The ranges here are bounds of the
//! `_id` *index* (`min`, `max` and `hint`), which know one total order over all types. One thing is left to know: an
//! index scan without `max` ends *before* `MaxKey`, so the last range reads the document whose `_id` is `MaxKey` apart
//! (tried on 4.4.2, 5.0.4, 6.0.5, 6.0.27).

use std::fmt;

use futures_util::TryStreamExt as _;
use mongodb::{
    bson::{Bson, RawBson, RawDocument, RawDocumentBuf, cstr, doc},
    options::SelectionCriteria,
};

use super::{catalog::CollectionEntry, raw};
use crate::{
    connect::{Deployment, ServerVersion},
    error::{Error, Result},
    namespace::Namespace,
};

/// The `_id` of a document as the bytes that the server sent, whatever they are. Equal means equal bytes.
#[derive(Clone, PartialEq)]
pub struct Key(RawDocumentBuf);

impl Key {
    /// The key of a document.
    ///
    /// # Errors
    /// [`ErrorKind::CorruptData`](crate::ErrorKind::CorruptData) when the document has no `_id` or is malformed.
    pub fn of(document: &RawDocument) -> Result<Self> {
        raw::id_of(document)?.alone_as("_id").map(Self)
    }

    /// The key whose element, as [`leading_id`](super::leading_id) gives it, stands in these bytes.
    ///
    /// # Errors
    /// [`ErrorKind::CorruptData`](crate::ErrorKind::CorruptData) for anything else.
    pub fn of_element(element: &[u8]) -> Result<Self> {
        let malformed = || Error::corrupt("there is no _id where one should be");
        let length = i32::try_from(element.len() + 5).map_err(|_| malformed())?;
        let document = [&length.to_le_bytes()[..], element, &[0]].concat();
        if super::leading_id(&document).map(<[u8]>::len) != Some(element.len()) {
            return Err(malformed());
        }
        RawDocumentBuf::from_bytes(document).map(Self).map_err(|error| malformed().with_source(error))
    }

    /// The document `{_id: …}`, as `min`, `max` and a filter for documents take it.
    pub fn as_document(&self) -> &RawDocument {
        &self.0
    }

    /// The value, if it is one that can be read.
    pub fn to_bson(&self) -> Option<RawBson> {
        self.0.get("_id").ok().flatten().map(Into::into)
    }

    /// The value for a person to read: canonical extended JSON, or all bytes in hexadecimal if they are no valid value.
    pub fn to_extended_json(&self) -> String {
        match self.to_bson().map(Bson::try_from) {
            Some(Ok(id)) => id.into_canonical_extjson().to_string(),
            _ => self.0.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    /// The value as it stands in its document.
    pub(super) fn element(&self) -> Option<raw::Element<'_>> {
        raw::elements(&self.0).next()?.ok()
    }

    pub(super) fn is(&self, kind: u8) -> bool {
        self.0.as_bytes().get(4) == Some(&kind)
    }

    pub(super) const MIN_KEY: u8 = 0xff;
    pub(super) const MAX_KEY: u8 = 0x7f;
}

impl From<RawBson> for Key {
    fn from(id: RawBson) -> Self {
        let mut document = RawDocumentBuf::new();
        document.append(cstr!("_id"), id);
        Self(document)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An `_id` is data, and often personal.
        f.write_str("Key")
    }
}

/// A run of documents in the order of the `_id` index.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct KeyRange {
    /// The first `_id` of the range, included; `None` for the beginning.
    pub lower: Option<Key>,
    /// The first `_id` behind the range; `None` for the end.
    pub upper: Option<Key>,
}

impl KeyRange {
    /// The whole collection.
    pub fn everything() -> Self {
        Self::default()
    }

    /// From `lower` (included) to `upper` (not included).
    pub fn between(lower: Option<Key>, upper: Option<Key>) -> Self {
        Self { lower, upper }
    }
}

/// The order in which a collection is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScanOrder {
    /// By the `_id` index, under the collection's collation. Can be cut into ranges and restarted from a key.
    Id,
    /// As stored. For capped collections, where that is the order of insertion, and for the buckets of 5.0, which
    /// have neither an `_id` index nor a hint that stands for it.
    Natural,
}

impl ScanOrder {
    /// The order that keeps what the collection's order means.
    pub fn of(entry: &CollectionEntry, server: ServerVersion) -> Self {
        let clustered_without_hint = entry.is_clustered() && server < ServerVersion::new(5, 3, 0);
        if entry.is_capped() || clustered_without_hint { Self::Natural } else { Self::Id }
    }
}

/// How finely to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct PartitionSettings {
    /// Plain bytes that a range should hold. Default 64 MiB.
    pub target_bytes: u64,
    /// No more ranges than this, however large the collection. Default 4096.
    pub max_ranges: usize,
}

impl Default for PartitionSettings {
    fn default() -> Self {
        Self { target_bytes: 64 << 20, max_ranges: 4096 }
    }
}

impl PartitionSettings {
    /// Sets the plain bytes that a range should hold.
    #[must_use]
    pub fn with_target_bytes(mut self, bytes: u64) -> Self {
        self.target_bytes = bytes.max(1);
        self
    }

    /// Sets the most ranges.
    #[must_use]
    pub fn with_max_ranges(mut self, ranges: usize) -> Self {
        self.max_ranges = ranges.max(1);
        self
    }
}

/// Cuts `namespace` into ranges of about equal size that together hold every possible `_id` exactly once.
///
/// `documents` and `bytes` are the collection's size, from its statistics. The bounds are a sorted random sample, so
/// sizes vary by some tens of percent. The server samples about ten `_id`s a range and never more than a twentieth
/// of the collection, beyond which `$sample` would read all of it; a small collection stays whole.
///
/// # Errors
/// The server's own.
pub async fn partition(
    deployment: &Deployment,
    namespace: &Namespace,
    (documents, bytes): (u64, u64),
    settings: PartitionSettings,
    from: Option<&SelectionCriteria>,
) -> Result<Vec<KeyRange>> {
    let wanted = usize::try_from(bytes.div_ceil(settings.target_bytes.max(1))).unwrap_or(usize::MAX).min(settings.max_ranges);
    let affordable = usize::try_from(documents / 20).unwrap_or(usize::MAX);
    let sample = wanted.saturating_mul(SAMPLES_A_RANGE).min(affordable);
    if wanted < 2 || sample < 2 {
        return Ok(vec![KeyRange::everything()]);
    }
    let collection = deployment.database(namespace.database()).collection::<RawDocumentBuf>(namespace.collection());
    let pipeline = vec![
        doc! { "$sample": { "size": i64::try_from(sample).unwrap_or(i64::MAX) } },
        doc! { "$project": { "_id": 1 } },
        doc! { "$sort": { "_id": 1 } },
    ];
    let mut aggregate = collection.aggregate(pipeline).allow_disk_use(true);
    if let Some(criteria) = from {
        aggregate = aggregate.selection_criteria(criteria.clone());
    }
    let mut batches = aggregate.batch().await?;
    let mut keys = Vec::with_capacity(sample);
    while let Some(batch) = batches.try_next().await? {
        for document in raw::documents_in(batch.doc_slices()?)? {
            keys.push(Key::of(document?)?);
        }
    }
    Ok(ranges_between(&keys, wanted))
}

/// Ranges between about `wanted` evenly spaced keys of a sorted sample.
fn ranges_between(sorted: &[Key], wanted: usize) -> Vec<KeyRange> {
    let mut bounds: Vec<&Key> = Vec::new();
    for position in 1..wanted {
        // `$sample` can return a document twice: equal neighbours make no range.
        if let Some(key) = sorted.get(position * sorted.len() / wanted)
            && bounds.last() != Some(&key)
        {
            bounds.push(key);
        }
    }
    let mut lower = None;
    let mut ranges = Vec::with_capacity(bounds.len() + 1);
    for bound in bounds {
        ranges.push(KeyRange { lower: lower.take(), upper: Some(bound.clone()) });
        lower = Some(bound.clone());
    }
    ranges.push(KeyRange { lower, upper: None });
    ranges
}

const SAMPLES_A_RANGE: usize = 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_touch_without_gap_or_overlap(mut keys in proptest::collection::vec(any::<i32>(), 0..200), wanted in 1_usize..50) {
            keys.sort_unstable();
            let keys: Vec<Key> = keys.into_iter().map(|key| Key::from(RawBson::Int32(key))).collect();
            let ranges = ranges_between(&keys, wanted);
            prop_assert!(ranges.len() <= wanted);
            prop_assert_eq!(&ranges[0].lower, &None);
            prop_assert_eq!(&ranges[ranges.len() - 1].upper, &None);
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].upper.is_some());
                prop_assert_eq!(&pair[0].upper, &pair[1].lower);
                prop_assert_ne!(&pair[0].lower, &pair[0].upper);
            }
        }
    }
}
