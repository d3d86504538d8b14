//! Capped collections that grew while they were read.
//!
//! They cannot be read at a cluster time, and forget their oldest documents as they grow. What was inserted while they were read and is in the snapshot must not be
//! inserted again; what was forgotten before it was seen must not come back at the end, where it would push out others. They are
//! read in order of insertion: so of the inserts of that while, all up to the last one that is there were either seen or forgotten, and those behind it
//! were not seen.

use std::collections::HashMap;

use futures_util::TryStreamExt as _;
use mongo_core::{
    Namespace, Result,
    bson::{RawDocumentBuf, Timestamp, doc},
    mongodb::options::ReadPreference,
    transfer::partition::Key,
};

use super::Restore;

/// The inserts into capped collections while the snapshot was read, in order, by the numbers of the collections.
#[derive(Debug, Default)]
pub(super) struct Grown {
    inserted: HashMap<usize, Vec<Key>>,
}

/// How many of these are passed over.
#[derive(Debug, Default)]
pub(super) struct PassedOver {
    left: HashMap<usize, usize>,
}

impl Grown {
    pub(super) fn note(&mut self, number: usize, id: Key) {
        self.inserted.entry(number).or_default().push(id);
    }

    /// Finds out which of them are there, or were forgotten.
    pub(super) async fn pass_over(&self, restore: &Restore, targets: &HashMap<usize, Namespace>) -> Result<PassedOver> {
        let mut passed_over = PassedOver::default();
        for (number, ids) in &self.inserted {
            let Some(namespace) = targets.get(number) else { continue };
            let mut end = ids.len();
            while end > 0 {
                let begin = end.saturating_sub(IDS_AT_ONCE);
                if let Some(last) = last_there(restore, namespace, &ids[begin..end]).await? {
                    passed_over.left.insert(*number, begin + last + 1);
                    break;
                }
                end = begin;
            }
        }
        Ok(passed_over)
    }
}

impl PassedOver {
    /// Whether the next insert into a collection is passed over.
    pub(super) fn take(&mut self, number: usize) -> bool {
        match self.left.get_mut(&number) {
            Some(left) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}

/// The position of the last of these that the target has.
async fn last_there(restore: &Restore, namespace: &Namespace, ids: &[Key]) -> Result<Option<usize>> {
    let collection = restore.target.database(namespace.database()).collection::<RawDocumentBuf>(namespace.collection());
    let wanted: Vec<_> = ids.iter().filter_map(Key::to_bson).collect();
    let wanted = mongo_core::bson::serialize_to_bson(&wanted)?;
    let find = collection.find(doc! { "_id": { "$in": wanted } }).projection(doc! { "_id": 1 });
    let there: Vec<RawDocumentBuf> = find.selection_criteria(ReadPreference::Primary.into()).await?.try_collect().await?;
    let there: Vec<Key> = there.iter().map(|document| Key::of(document)).collect::<Result<_>>()?;
    Ok(ids.iter().rposition(|id| there.iter().any(|other| other.compare(id).is_eq())))
}

/// Whether an operation at a time belongs to the while in which a snapshot was read.
pub(super) fn is_in_doubt(at: Timestamp, read_until: Option<Timestamp>) -> bool {
    read_until.is_some_and(|until| at <= until)
}

const IDS_AT_ONCE: usize = 200;
