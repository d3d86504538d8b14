//! Changes that are applied together, and which of them make no difference.

use std::{collections::HashSet, fmt, sync::Arc};

use mongodb::bson::{RawDocument, RawDocumentBuf};

use super::{ReplayTarget, update::Update};
use crate::{
    error::Result,
    transfer::raw::{Element, OwnedId},
};

/// What becomes of a document.
#[derive(Clone)]
pub(super) enum Change {
    /// It is this, and most likely was not there before.
    Insert(RawDocumentBuf),
    /// It is this, whatever it was.
    Put(RawDocumentBuf),
    /// It is changed by an update of the oplog.
    Update(RawDocumentBuf),
    /// It is gone.
    Delete,
}

impl Change {
    pub(super) fn of_update(object: &RawDocument) -> Result<Self> {
        Ok(match Update::parse(object)? {
            Update::Replacement(document) => Self::Put(document.to_owned()),
            Update::Difference(_) | Update::Modifiers(_) => Self::Update(object.to_owned()),
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Insert(document) | Self::Put(document) | Self::Update(document) => document.as_bytes().len(),
            Self::Delete => 0,
        }
    }
}

/// A change of one document.
pub(super) struct Step {
    pub(super) target: Arc<ReplayTarget>,
    pub(super) id: OwnedId,
    pub(super) change: Change,
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What it holds is data.
        f.debug_struct("Step").field("namespace", &self.target.namespace).finish_non_exhaustive()
    }
}

/// Changes in order.
#[derive(Debug, Default)]
pub(super) struct Batch {
    steps: Vec<Step>,
    bytes: usize,
}

impl Batch {
    pub(super) fn push(&mut self, target: Arc<ReplayTarget>, id: Element<'_>, change: Change) {
        self.bytes += change.bytes() + id.value.len() + OVERHEAD;
        self.steps.push(Step { target, id: OwnedId::of(id), change });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    pub(super) fn is_full(&self, steps: usize, bytes: usize) -> bool {
        self.steps.len() >= steps || self.bytes >= bytes
    }

    pub(super) fn len(&self) -> usize {
        self.steps.len()
    }

    /// The changes that make a difference, in order: what comes before a document is there as a whole, or gone, does not matter.
    pub(super) fn needed(self) -> Vec<Step> {
        let mut settled: HashSet<(&ReplayTarget, &OwnedId)> = HashSet::new();
        let mut needed = vec![true; self.steps.len()];
        for (step, needed) in self.steps.iter().zip(&mut needed).rev() {
            if step.target.in_order {
                continue;
            }
            let place = (&*step.target, &step.id);
            if settled.contains(&place) {
                *needed = false;
            } else if !matches!(step.change, Change::Update(_)) {
                settled.insert(place);
            }
        }
        self.steps.into_iter().zip(needed).filter_map(|(step, needed)| needed.then_some(step)).collect()
    }
}

/// What an operation takes in a command beside its document and `_id`.
const OVERHEAD: usize = 128;

#[cfg(test)]
mod tests {
    use mongodb::bson::rawdoc;

    use super::*;
    use crate::transfer::raw::id_of;

    #[test]
    fn only_changes_that_make_a_difference_are_needed() {
        let target = Arc::new(ReplayTarget::new("a.b".parse().unwrap()));
        let in_order = Arc::new(ReplayTarget { in_order: true, ..ReplayTarget::new("a.capped".parse().unwrap()) });
        let mut batch = Batch::default();
        let mut push = |target: &Arc<ReplayTarget>, id: i32, change: Change| {
            batch.push(Arc::clone(target), id_of(&rawdoc! { "_id": id }).unwrap(), change);
        };
        let update = |number: i32| Change::Update(rawdoc! { "$v": 2, "diff": { "u": { "n": number } } });
        push(&target, 1, update(1));
        push(&in_order, 1, Change::Insert(rawdoc! { "_id": 1 }));
        push(&target, 1, Change::Put(rawdoc! { "_id": 1 }));
        push(&target, 2, update(2));
        push(&target, 1, update(3));
        push(&target, 3, Change::Insert(rawdoc! { "_id": 3 }));
        push(&target, 3, Change::Delete);
        push(&in_order, 1, Change::Delete);
        let kept: Vec<(bool, char)> = batch
            .needed()
            .iter()
            .map(|step| {
                let change = match step.change {
                    Change::Insert(_) => 'i',
                    Change::Put(_) => 'p',
                    Change::Update(_) => 'u',
                    Change::Delete => 'd',
                };
                (step.target.in_order, change)
            })
            .collect();
        assert_eq!(kept, [(true, 'i'), (false, 'p'), (false, 'u'), (false, 'u'), (false, 'd'), (true, 'd')]);
    }
}
