//! What a restore has done so far, and up to where it has done everything.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use mongo_core::{Error, Namespace, Result, lock::lock, transfer::write::Refused};
use serde::{Deserialize, Serialize};

use super::{DefinitionFailure, RefusedDocument, run::is_final};

/// How far a restore is without a gap: everything before was written, and what came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Reached {
    pub(super) position: Position,
    pub(super) documents: i64,
    pub(super) bytes: i64,
    pub(super) refused: i64,
    pub(super) refused_documents: Vec<RefusedDocument>,
}

/// A place in the sequence of all documents of a restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Position {
    /// Which of the namespaces, in the order in which they are written.
    pub(super) namespace: i64,
    /// How many of its segments.
    pub(super) segments: i64,
}

/// What came of writing some documents.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) documents: u64,
    pub(super) bytes: u64,
    pub(super) refused: Vec<(Namespace, Refused)>,
}

/// What all writers have done together.
#[derive(Debug)]
pub(super) struct Tally {
    totals: Mutex<Totals>,
    listed: usize,
}

#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) reached: Reached,
    pub(super) indexes: u64,
    pub(super) failures: Vec<DefinitionFailure>,
    /// The number of the group that comes next.
    next: u64,
    /// Groups that were written before one that comes earlier.
    ahead: BTreeMap<u64, (Position, Written)>,
}

impl Tally {
    /// Lists so many documents that are refused, and begins where an earlier run ended.
    pub(super) fn new(listed: usize, reached: Reached) -> Self {
        Self { totals: Mutex::new(Totals { reached, ..Totals::default() }), listed }
    }

    /// Notes that a group was written, which reaches up to `position`. Groups are numbered from 0 in the order of their documents.
    pub(super) fn wrote(&self, group: u64, position: Position, written: Written) {
        let mut totals = self.totals();
        totals.ahead.insert(group, (position, written));
        loop {
            let next = totals.next;
            let Some((position, written)) = totals.ahead.remove(&next) else { break };
            totals.next += 1;
            totals.reached.pass(position, written, self.listed);
        }
    }

    /// How far everything was written.
    pub(super) fn reached(&self) -> Reached {
        self.totals().reached.clone()
    }

    pub(super) fn built(&self, indexes: u64) {
        self.totals().indexes += indexes;
    }

    /// Notes a definition that the target refused.
    ///
    /// # Errors
    /// `error` itself, when it is not about the definition.
    pub(super) fn definition_failed(&self, namespace: &Namespace, index: Option<&str>, error: Error) -> Result<()> {
        if is_final(&error) {
            return Err(error);
        }
        let failure = DefinitionFailure { namespace: namespace.clone(), index: index.map(str::to_owned), reason: error.report() };
        self.totals().failures.push(failure);
        Ok(())
    }

    pub(super) fn into_totals(self) -> Totals {
        self.totals.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn totals(&self) -> MutexGuard<'_, Totals> {
        lock(&self.totals)
    }
}

impl Reached {
    fn pass(&mut self, position: Position, written: Written, listed: usize) {
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.position = position;
        self.documents = self.documents.saturating_add(signed(written.documents));
        self.bytes = self.bytes.saturating_add(signed(written.bytes));
        self.refused = self.refused.saturating_add(signed(written.refused.len() as u64));
        let room = listed.saturating_sub(self.refused_documents.len());
        let refused = written.refused.iter().take(room);
        self.refused_documents.extend(refused.map(|(namespace, refused)| describe(namespace, refused)));
    }
}

fn describe(namespace: &Namespace, refused: &Refused) -> RefusedDocument {
    let id = refused.id.to_extended_json();
    let reason = match refused.code {
        11000 if refused.is_duplicate_id() => "a document of this _id exists".to_owned(),
        11000 => match &refused.duplicate {
            Some(duplicate) => format!(
                "another document has its place in the unique index on {}",
                duplicate.pattern.keys().cloned().collect::<Vec<_>>().join(", ")
            ),
            None => "another document has its place in a unique index".to_owned(),
        },
        121 => "the collection's validator refuses it".to_owned(),
        10334 => "it is larger than the server allows".to_owned(),
        code => format!("server error {code}"),
    };
    RefusedDocument { namespace: namespace.clone(), id, code: refused.code, reason }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_reached_never_passes_a_group_that_is_not_written(
            order in Just((0..40_u64).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let tally = Tally::new(3, Reached::default());
            let mut done = std::collections::BTreeSet::new();
            for group in order {
                let position = Position { namespace: 0, segments: group as i64 + 1 };
                tally.wrote(group, position, Written { documents: group, ..Written::default() });
                done.insert(group);
                let whole = (0..).take_while(|group| done.contains(group)).count() as u64;
                let reached = tally.reached();
                prop_assert_eq!(reached.position.segments, whole as i64);
                prop_assert_eq!(reached.documents, (0..whole).sum::<u64>() as i64);
            }
        }
    }
}
