//! Comparing two copies of a collection, down to the `_id`s that differ.
//!
//! Each side gives its documents as fingerprints: the key, and a digest of all bytes. Two sides in the order of the `_id` index are
//! merged with flat memory; sides in any order are matched with the fingerprints of one in memory. Digests are BLAKE3, cut to 128 bits, of
//! every document by itself: nothing cancels out as in a sum.

use std::{cmp::Ordering, collections::HashMap};

use async_trait::async_trait;
use mongodb::bson::RawDocument;

use super::{partition::Key, scan::RangeScan};
use crate::error::{Error, Result};

/// A document of one side.
#[derive(Clone, Debug)]
pub struct Fingerprint {
    /// Its key.
    pub key: Key,
    digest: [u8; 16],
}

impl Fingerprint {
    /// The fingerprint of a document.
    ///
    /// # Errors
    /// [`ErrorKind::CorruptData`](crate::ErrorKind::CorruptData) when it has no `_id`.
    pub fn of(document: &RawDocument) -> Result<Self> {
        let mut digest = [0; 16];
        digest.copy_from_slice(&blake3::hash(document.as_bytes()).as_bytes()[..16]);
        Ok(Self { key: Key::of(document)?, digest })
    }

    /// Whether both documents have the same bytes.
    pub fn is_like(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

/// One of two copies that are compared.
#[async_trait]
pub trait ComparedSide: Send {
    /// The next documents, or `None` at the end. An empty batch is not the end.
    async fn next(&mut self) -> Result<Option<Vec<Fingerprint>>>;
}

#[async_trait]
impl ComparedSide for RangeScan {
    async fn next(&mut self) -> Result<Option<Vec<Fingerprint>>> {
        let Some(batch) = Self::next(self).await? else { return Ok(None) };
        // Hashing is work for a blocking thread.
        let fingerprints = tokio::task::spawn_blocking(move || {
            batch.documents()?.map(|document| Fingerprint::of(document?)).collect::<Result<Vec<_>>>()
        });
        fingerprints.await?.map(Some)
    }
}

/// How two copies differ in a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Finding {
    /// Only the left has it.
    OnlyLeft,
    /// Only the right has it.
    OnlyRight,
    /// Both have it, with different bytes.
    Differs,
}

/// Compares two sides that are in the order of the `_id` index of a collection without a collation. `found` is called with each difference, in
/// that order; gives how many documents both sides have alike.
///
/// # Errors
/// Those of the sides; `CorruptData` when one is not in that order.
///
/// # Cancel safety
/// Dropping the future ends the comparison.
pub async fn compare_ordered(
    left: &mut dyn ComparedSide,
    right: &mut dyn ComparedSide,
    found: &mut (dyn FnMut(Finding, &Key) + Send),
) -> Result<u64> {
    let (mut left, mut right) = (Cursor::new(left), Cursor::new(right));
    let mut alike = 0;
    loop {
        left.fill().await?;
        right.fill().await?;
        let order = match (left.current(), right.current()) {
            (None, None) => return Ok(alike),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(a), Some(b)) => a.key.compare(&b.key),
        };
        match (order, left.current(), right.current()) {
            (Ordering::Less, Some(a), _) => found(Finding::OnlyLeft, &a.key),
            (Ordering::Greater, _, Some(b)) => found(Finding::OnlyRight, &b.key),
            // Equal numbers of different types have one place, and different bytes.
            (Ordering::Equal, Some(a), Some(b)) if !a.is_like(b) => found(Finding::Differs, &a.key),
            _ => alike += 1,
        }
        if order.is_le() {
            left.advance();
        }
        if order.is_ge() {
            right.advance();
        }
    }
}

/// Compares two sides in any order. Memory: about 70 bytes and the key for each document of the left.
///
/// # Errors
/// Those of the sides.
///
/// # Cancel safety
/// Dropping the future ends the comparison.
pub async fn compare_unordered(
    left: &mut dyn ComparedSide,
    right: &mut dyn ComparedSide,
    found: &mut (dyn FnMut(Finding, &Key) + Send),
) -> Result<u64> {
    let mut known: HashMap<Vec<u8>, Fingerprint> = HashMap::new();
    while let Some(batch) = left.next().await? {
        known.extend(batch.into_iter().map(|document| (document.key.as_document().as_bytes().to_vec(), document)));
    }
    let mut alike = 0;
    while let Some(batch) = right.next().await? {
        for document in batch {
            match known.remove(document.key.as_document().as_bytes()) {
                None => found(Finding::OnlyRight, &document.key),
                Some(other) if !other.is_like(&document) => found(Finding::Differs, &document.key),
                Some(_) => alike += 1,
            }
        }
    }
    let mut rest: Vec<Fingerprint> = known.into_values().collect();
    rest.sort_by(|a, b| a.key.compare(&b.key));
    rest.iter().for_each(|document| found(Finding::OnlyLeft, &document.key));
    Ok(alike)
}

struct Cursor<'a> {
    side: &'a mut dyn ComparedSide,
    batch: std::vec::IntoIter<Fingerprint>,
    /// The last key of the batch.
    last: Option<Key>,
    ended: bool,
}

impl<'a> Cursor<'a> {
    fn new(side: &'a mut dyn ComparedSide) -> Self {
        Self { side, batch: Vec::new().into_iter(), last: None, ended: false }
    }

    /// Makes sure that there is a current document, unless the side is through.
    async fn fill(&mut self) -> Result<()> {
        while self.batch.as_slice().is_empty() && !self.ended {
            match self.side.next().await? {
                Some(batch) => {
                    // One that is out of order would be missed on this side, and taken for one that only the other has.
                    let ordered = |pair: &[Fingerprint]| pair[0].key.compare(&pair[1].key).is_lt();
                    let goes_on = self.last.iter().zip(batch.first()).all(|(last, first)| last.compare(&first.key).is_lt());
                    if !goes_on || !batch.windows(2).all(ordered) {
                        return Err(Error::corrupt("the documents of a collection are not in the order of their _ids"));
                    }
                    if let Some(last) = batch.last() {
                        self.last = Some(last.key.clone());
                    }
                    self.batch = batch.into_iter();
                }
                None => self.ended = true,
            }
        }
        Ok(())
    }

    fn current(&self) -> Option<&Fingerprint> {
        self.batch.as_slice().first()
    }

    fn advance(&mut self) {
        self.batch.next();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use mongodb::bson::rawdoc;
    use proptest::prelude::*;

    use super::*;

    /// Documents in batches, empty ones among them.
    struct InMemory(Vec<Vec<Fingerprint>>);

    #[async_trait]
    impl ComparedSide for InMemory {
        async fn next(&mut self) -> Result<Option<Vec<Fingerprint>>> {
            Ok(if self.0.is_empty() { None } else { Some(self.0.remove(0)) })
        }
    }

    fn side(documents: &BTreeMap<i32, i32>, batch: usize) -> InMemory {
        let all: Vec<Fingerprint> =
            documents.iter().map(|(id, value)| Fingerprint::of(&rawdoc! { "_id": *id, "value": *value }).unwrap()).collect();
        InMemory(all.chunks(batch).flat_map(|batch| [batch.to_vec(), Vec::new()]).collect())
    }

    proptest! {
        #[test]
        fn every_difference_is_found_and_no_other(
            left in proptest::collection::btree_map(0_i32..60, 0_i32..3, 0..40),
            right in proptest::collection::btree_map(0_i32..60, 0_i32..3, 0..40),
            batch in 1_usize..7,
            ordered: bool,
        ) {
            let mut expected: BTreeSet<(Finding, String)> = BTreeSet::new();
            let name = |id: &i32| Key::of(&rawdoc! { "_id": *id }).unwrap().to_extended_json();
            for id in left.keys().chain(right.keys()) {
                match (left.get(id), right.get(id)) {
                    (Some(_), None) => { expected.insert((Finding::OnlyLeft, name(id))); }
                    (None, Some(_)) => { expected.insert((Finding::OnlyRight, name(id))); }
                    (a, b) if a != b => { expected.insert((Finding::Differs, name(id))); }
                    _ => {}
                }
            }
            let mut found = BTreeSet::new();
            let mut note = |finding, key: &Key| { found.insert((finding, key.to_extended_json())); };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (mut a, mut b) = (side(&left, batch), side(&right, batch));
            let alike = runtime.block_on(async {
                if ordered { compare_ordered(&mut a, &mut b, &mut note).await } else { compare_unordered(&mut a, &mut b, &mut note).await }
            }).unwrap();
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(usize::try_from(alike).unwrap(), left.iter().filter(|(id, value)| right.get(id) == Some(value)).count());
        }
    }
}
