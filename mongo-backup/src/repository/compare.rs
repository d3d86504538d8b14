//! Comparing two trees from the top, reading only what differs.
//!
//! Both trees are walked side by side. Equal ids, of whole subtrees or of segments, are passed over unread. Where segments
//! differ, leaves are taken from both sides until both stand at a segment that begins with the same `_id`: as both sides are in the
//! same order, what was taken until then can only differ among itself. Boundaries depend on the `_id`s alone, so that is soon.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use mongo_core::Result;

use super::{
    Repository,
    segment::SegmentId,
    tree::{TreeEntry, TreeRoot},
};

/// Segments that cover the same stretch of a collection on both sides and do not all agree. Either side can be empty.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Difference {
    pub(crate) left: Vec<TreeEntry>,
    pub(crate) right: Vec<TreeEntry>,
}

/// Gives the differences of two trees one after the other.
#[derive(Debug)]
pub(crate) struct TreeComparison {
    left: Side,
    right: Side,
}

#[derive(Debug)]
struct Side {
    repository: Repository,
    /// What is left to visit, last first.
    pending: Vec<Pending>,
}

#[derive(Debug)]
struct Pending {
    /// How high it stands: 0 for a segment, one more than its height for a node.
    rank: u16,
    entry: TreeEntry,
}

impl TreeComparison {
    pub(crate) fn new(repository: &Repository, left: &TreeRoot, right: &TreeRoot) -> Result<Self> {
        Ok(Self { left: Side::new(repository, left)?, right: Side::new(repository, right)? })
    }

    /// All that the trees do not have in common as one stretch, for sides that are not in the same order.
    pub(crate) async fn whole(&mut self) -> Result<Difference> {
        let mut found = Difference::default();
        while let Some(entry) = self.left.next_leaf().await? {
            found.left.push(entry);
        }
        while let Some(entry) = self.right.next_leaf().await? {
            found.right.push(entry);
        }
        let ids = |entries: &[TreeEntry]| entries.iter().map(|entry| entry.id).collect::<HashSet<_>>();
        let (left, right) = (ids(&found.left), ids(&found.right));
        found.left.retain(|entry| !right.contains(&entry.id));
        found.right.retain(|entry| !left.contains(&entry.id));
        Ok(found)
    }

    /// The next stretch that differs. Both sides must be in the same order.
    pub(crate) async fn next(&mut self) -> Result<Option<Difference>> {
        loop {
            let (left, right) = match (self.left.pending.last(), self.right.pending.last()) {
                (None, None) => return Ok(None),
                (Some(left), Some(right)) if left.entry.id == right.entry.id => {
                    self.left.pending.pop();
                    self.right.pending.pop();
                    continue;
                }
                (left, right) => (left.map_or(0, |pending| pending.rank), right.map_or(0, |pending| pending.rank)),
            };
            // The higher one may hold what the other stands at.
            match (left, right) {
                (0, 0) => return self.until_in_step().await.map(Some),
                (left, right) if left > right => self.left.open().await?,
                (left, right) if left < right => self.right.open().await?,
                _ => {
                    self.left.open().await?;
                    self.right.open().await?;
                }
            }
        }
    }

    async fn until_in_step(&mut self) -> Result<Difference> {
        let mut found = Difference::default();
        let (mut left_starts, mut right_starts) = (HashMap::new(), HashMap::new());
        loop {
            let left = self.left.next_leaf().await?;
            let right_met = left.as_ref().and_then(|entry| right_starts.get(&entry.first_id).copied());
            if let (Some(entry), Some(position)) = (&left, right_met) {
                self.left.give_back(vec![entry.clone()]);
                self.right.give_back(found.right.split_off(position));
                return Ok(found);
            }
            let at_the_end = left.is_none();
            if let Some(entry) = left {
                left_starts.insert(entry.first_id.clone(), found.left.len());
                found.left.push(entry);
            }
            let right = self.right.next_leaf().await?;
            let left_met = right.as_ref().and_then(|entry| left_starts.get(&entry.first_id).copied());
            if let (Some(entry), Some(position)) = (&right, left_met)
                // Both sides begin the stretch with the same `_id`: that is where they are, not where they meet again.
                && (position, found.right.len()) != (0, 0)
            {
                self.right.give_back(vec![entry.clone()]);
                self.left.give_back(found.left.split_off(position));
                return Ok(found);
            }
            match right {
                None if at_the_end => return Ok(found),
                None => {}
                Some(entry) => {
                    right_starts.insert(entry.first_id.clone(), found.right.len());
                    found.right.push(entry);
                }
            }
        }
    }
}

impl Side {
    fn new(repository: &Repository, root: &TreeRoot) -> Result<Self> {
        let unread = |id: SegmentId| TreeEntry { id, level: 0, documents: 0, bytes: 0, first_id: Bytes::new() };
        // A root does not say how high it is: higher than anything until it is read.
        let pending = root.node_id()?.map(|id| Pending { rank: u16::MAX, entry: unread(id) });
        Ok(Self { repository: repository.clone(), pending: pending.into_iter().collect() })
    }

    /// Puts a node's children in its place.
    async fn open(&mut self) -> Result<()> {
        let Some(Pending { entry, .. }) = self.pending.pop() else { return Ok(()) };
        let (height, entries) = self.repository.read_node(entry.id).await?;
        self.pending.extend(entries.into_iter().rev().map(|entry| Pending { rank: u16::from(height), entry }));
        Ok(())
    }

    async fn next_leaf(&mut self) -> Result<Option<TreeEntry>> {
        while self.pending.last().is_some_and(|pending| pending.rank > 0) {
            self.open().await?;
        }
        Ok(self.pending.pop().map(|pending| pending.entry))
    }

    fn give_back(&mut self, entries: Vec<TreeEntry>) {
        self.pending.extend(entries.into_iter().rev().map(|entry| Pending { rank: 0, entry }));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mongo_core::bson::RawDocument;
    use proptest::prelude::*;

    use super::*;
    use crate::repository::segment::Content;
    use crate::{
        Key,
        archive::MemoryArchive,
        repository::{
            documents_of,
            testing::{self, Documents},
        },
    };

    /// `_id`s and values.
    type Pairs = BTreeSet<(i32, i32)>;

    async fn store(repository: &Repository, documents: &Documents) -> TreeRoot {
        let root = testing::store(repository, documents).await.unwrap();
        repository.reload_index().await.unwrap();
        root
    }

    #[tokio::test]
    async fn sides_in_different_order_are_compared_as_a_whole() {
        let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
        let left: Documents = (0..3000).map(|id| (id, 0)).collect();
        let right: Documents = (5..3010).map(|id| (id, i32::from(id == 700))).collect();
        let (a, b) = (store(&repository, &left).await, store(&repository, &right).await);
        let found = TreeComparison::new(&repository, &a, &b).unwrap().whole().await.unwrap();
        let (here, there) = (read(&repository, &found.left).await, read(&repository, &found.right).await);
        let only = |a: &Pairs, b: &Pairs| a.difference(b).copied().collect::<Pairs>();
        assert_eq!((only(&here, &there), only(&there, &here)), expected(&left, &right));
    }

    async fn read(repository: &Repository, entries: &[TreeEntry]) -> Pairs {
        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        let segments = repository.read_segments(Content::Documents, &ids).await.unwrap();
        let numbers = |document: &RawDocument| (document.get_i32("_id").unwrap(), document.get_i32("value").unwrap());
        segments.iter().flat_map(|segment| documents_of(segment)).map(|document| numbers(document.unwrap())).collect()
    }

    /// What the stretches say that only one side has, and how many stretches there were.
    async fn compare(left: &Documents, right: &Documents) -> (Pairs, Pairs, usize) {
        let repository = Repository::open_or_init(MemoryArchive::new(), Key::unencrypted()).await.unwrap();
        let (a, b) = (store(&repository, left).await, store(&repository, right).await);
        let mut comparison = TreeComparison::new(&repository, &a, &b).unwrap();
        let (mut only_left, mut only_right, mut stretches) = (BTreeSet::new(), BTreeSet::new(), 0);
        while let Some(stretch) = comparison.next().await.unwrap() {
            stretches += 1;
            let (here, there) = (read(&repository, &stretch.left).await, read(&repository, &stretch.right).await);
            only_left.extend(here.difference(&there).copied());
            only_right.extend(there.difference(&here).copied());
        }
        (only_left, only_right, stretches)
    }

    fn expected(left: &Documents, right: &Documents) -> (Pairs, Pairs) {
        let all = |documents: &Documents| documents.iter().map(|(id, value)| (*id, *value)).collect::<BTreeSet<_>>();
        let (left, right) = (all(left), all(right));
        (left.difference(&right).copied().collect(), right.difference(&left).copied().collect())
    }

    #[tokio::test]
    async fn equal_trees_have_no_stretch_that_differs_and_one_change_has_one() {
        let documents: Documents = (0..6000).map(|id| (id, 0)).collect();
        assert_eq!(compare(&documents, &documents).await, (BTreeSet::new(), BTreeSet::new(), 0));
        let mut other = documents.clone();
        other.insert(2718, 1);
        assert_eq!(compare(&documents, &other).await, (BTreeSet::from([(2718, 0)]), BTreeSet::from([(2718, 1)]), 1));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Values of 0 and 1 on both sides: changes, insertions, deletions, whole stretches that are gone, an empty side.
        #[test]
        fn stretches_hold_all_that_differs(
            base in 0_i32..3000,
            edits in proptest::collection::vec((0_i32..3200, any::<bool>(), 0_i32..3), 0..60),
            gone in (0_i32..3000, 0_i32..800),
        ) {
            let left: Documents = (0..base).map(|id| (id * 2, 0)).collect();
            let mut right = left.clone();
            for (id, remove, value) in edits {
                if remove { right.remove(&id); } else { right.insert(id, value); }
            }
            right.retain(|id, _| !(gone.0..gone.0 + gone.1).contains(id));
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (only_left, only_right, _) = runtime.block_on(compare(&left, &right));
            prop_assert_eq!((only_left, only_right), expected(&left, &right));
        }
    }
}
