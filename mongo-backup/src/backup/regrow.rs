//! Making a collection's tree from an older one, and reading only the segments in which something changed.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use mongo_core::{
    Error, Result,
    progress::PhaseMeter,
    transfer::{
        partition::{Key, KeyRange},
        scan::{ScanBatch, ScanSource},
    },
};
use tokio_util::task::AbortOnDropHandle;

use crate::repository::{
    Repository,
    assembly::Regrowth,
    documents_of,
    segment::{Content, SegmentId},
    store::Compressing,
    tree::{self, TreeEntry, TreeRoot},
};

/// What a tree is made from.
pub(super) struct Regrow {
    pub(super) repository: Repository,
    pub(super) source: ScanSource,
    /// Whether a filter on `_id` finds what bounds of the index do.
    pub(super) by_filter: bool,
    pub(super) older: TreeRoot,
    /// The `_id`s of all documents that may have changed, in the order of the index.
    pub(super) touched: Arc<[Key]>,
    /// Of a document.
    pub(super) average_bytes: u64,
    pub(super) growth: Regrowth,
    pub(super) meter: Arc<PhaseMeter>,
}

impl Regrow {
    /// Makes the tree.
    pub(super) async fn run(self) -> Result<Regrown> {
        let Self { repository, source, by_filter, older, touched, average_bytes, mut growth, meter } = self;
        let held_at_most = usize::try_from(HELD_BYTES / average_bytes.max(1)).unwrap_or(HELD_AT_MOST).min(HELD_AT_MOST);
        let mut pieces = Pieces::of(repository.clone(), &older, touched)?;
        let (mut read, mut taken_apart) = (0, 0);
        let mut compressing = Compressing::new(Arc::clone(growth.store()));
        let mut ahead = VecDeque::new();
        let mut is_through = false;
        loop {
            // While one window is cut and compressed, the next ones are on their way.
            while ahead.len() < WINDOWS_AHEAD && !is_through {
                let window = pieces.window(held_at_most).await?;
                is_through = window.pieces.is_empty();
                ahead.push_back(AbortOnDropHandle::new(tokio::spawn(window.fill(source.clone(), by_filter))));
            }
            let Some(next) = ahead.pop_front() else { break };
            let grown = grow(&repository, &source, growth, &mut compressing, next.await??, &meter).await?;
            growth = grown.growth;
            read += grown.read;
            taken_apart += grown.taken_apart;
        }
        growth.count_taken_over(older.segments.saturating_sub(pieces.visited + taken_apart));
        compressing.finish().await?;
        let store = Arc::clone(growth.store());
        let (root, taken_over) = tokio::task::spawn_blocking(move || growth.finish()).await??;
        store.send_full().await?;
        Ok(Regrown { root, read, taken_over })
    }
}

/// How many segments of a tree hold documents that may have changed, or would hold them.
pub(super) async fn changed_segments(repository: &Repository, older: &TreeRoot, touched: Arc<[Key]>) -> Result<u64> {
    let mut pieces = Pieces::of(repository.clone(), older, touched)?;
    let mut changed = 0;
    while let Some(found) = pieces.next().await? {
        if let Found::Changed { segments, .. } = found {
            changed += segments as u64;
        }
    }
    Ok(changed)
}

/// A tree that was made from an older one.
pub(super) struct Regrown {
    pub(super) root: TreeRoot,
    /// Documents read.
    pub(super) read: u64,
    /// Segments taken over.
    pub(super) taken_over: u64,
}

/// A part of the older tree, in order.
enum Piece {
    /// A node below which nothing changed.
    Node { height: u8, entry: TreeEntry },
    /// A segment in which nothing changed.
    Segment(TreeEntry),
    /// The documents that are there now in place of some segments.
    Documents(Vec<u8>),
    /// The same, but too many to be held.
    Range(KeyRange),
}

/// Finds the pieces, reading only nodes below which something changed.
struct Pieces {
    repository: Repository,
    touched: Arc<[Key]>,
    /// Those before this one come before all that is left to visit.
    passed: usize,
    /// What is left to visit, last first: nodes and segments, each with where the next begins.
    pending: Vec<(Pending, Option<Key>)>,
    is_first: bool,
    /// An empty tree in place of which everything is read.
    was_empty: bool,
    /// Segments that were looked at one by one.
    visited: i64,
}

enum Pending {
    Root(SegmentId),
    /// With its bytes, if it was read already.
    Node {
        height: u8,
        entry: TreeEntry,
        bytes: Option<Bytes>,
    },
    Segment(TreeEntry),
}

/// A piece before it is read.
enum Found {
    Node { height: u8, entry: TreeEntry },
    Segment(TreeEntry),
    Changed { range: KeyRange, touched: usize, segments: usize },
}

impl Pieces {
    fn of(repository: Repository, older: &TreeRoot, touched: Arc<[Key]>) -> Result<Self> {
        let root = older.node_id()?;
        let was_empty = root.is_none();
        let pending = root.into_iter().map(|root| (Pending::Root(root), None)).collect();
        Ok(Self { repository, touched, passed: 0, pending, is_first: true, was_empty, visited: 0 })
    }

    /// Whether a touched key lies in a range, which comes behind all that were asked about before.
    fn is_touched(&mut self, range: &KeyRange) -> bool {
        if let Some(lower) = &range.lower {
            while self.touched.get(self.passed).is_some_and(|key| key.compare(lower).is_lt()) {
                self.passed += 1;
            }
        }
        let Some(next) = self.touched.get(self.passed) else { return false };
        range.upper.as_ref().is_none_or(|upper| next.compare(upper).is_lt())
    }

    /// How many touched keys lie in a range in which the next one lies.
    fn count_touched(&self, range: &KeyRange) -> usize {
        let rest = self.touched.get(self.passed..).unwrap_or_default();
        range.upper.as_ref().map_or(rest.len(), |upper| rest.partition_point(|key| key.compare(upper).is_lt()))
    }

    fn range_of(&self, entry: &TreeEntry, upper: Option<&Key>) -> Result<KeyRange> {
        // What comes before all that was there belongs to the first.
        let lower = if self.is_first { None } else { Some(Key::of_element(&entry.first_id)?) };
        Ok(KeyRange::between(lower, upper.cloned()))
    }

    /// Puts what is below a node in its place. Of nodes that are read in any case some are read at once.
    async fn expand(&mut self, node: SegmentId, bytes: Option<Bytes>, upper: Option<Key>) -> Result<()> {
        let bytes = match bytes {
            Some(bytes) => bytes,
            None => self.repository.read_segments(Content::Node, &[node]).await?.pop().unwrap_or_default(),
        };
        let (height, entries) = tree::decode(&bytes)?;
        let mut begins = entries.iter().map(|entry| Key::of_element(&entry.first_id)).collect::<Result<Vec<Key>>>()?;
        let Some(height) = height.checked_sub(1) else {
            let mut upper = upper;
            for entry in entries.into_iter().rev() {
                let behind = std::mem::replace(&mut upper, begins.pop());
                self.pending.push((Pending::Segment(entry), behind));
            }
            return Ok(());
        };
        let mut uppers: Vec<Option<Key>> = begins.drain(..).skip(1).map(Some).collect();
        uppers.push(upper);
        let mut read: Vec<SegmentId> = Vec::new();
        let rest = self.touched.get(self.passed..).unwrap_or_default();
        for (entry, upper) in entries.iter().zip(&uppers) {
            let lower = Key::of_element(&entry.first_id)?;
            let next = rest.get(rest.partition_point(|key| key.compare(&lower).is_lt()));
            if next.is_some_and(|next| upper.as_ref().is_none_or(|upper| next.compare(upper).is_lt())) {
                read.push(entry.id);
            }
        }
        read.truncate(NODES_AT_ONCE);
        let bytes = self.repository.read_segments(Content::Node, &read).await?;
        let mut known: HashMap<SegmentId, Bytes> = read.into_iter().zip(bytes).collect();
        for (entry, upper) in entries.into_iter().zip(uppers).rev() {
            let bytes = known.remove(&entry.id);
            self.pending.push((Pending::Node { height, entry, bytes }, upper));
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Found>> {
        if std::mem::take(&mut self.was_empty) {
            let touched = self.touched.len();
            return Ok(Some(Found::Changed { range: KeyRange::everything(), touched, segments: 1 }));
        }
        while let Some((pending, upper)) = self.pending.pop() {
            match pending {
                Pending::Root(node) => self.expand(node, None, upper).await?,
                Pending::Node { height, entry, bytes } => {
                    let range = self.range_of(&entry, upper.as_ref())?;
                    if self.is_touched(&range) {
                        self.expand(entry.id, bytes, upper).await?;
                        continue;
                    }
                    self.is_first = false;
                    return Ok(Some(Found::Node { height, entry }));
                }
                Pending::Segment(entry) => {
                    self.visited += 1;
                    let mut range = self.range_of(&entry, upper.as_ref())?;
                    let is_touched = self.is_touched(&range);
                    self.is_first = false;
                    if !is_touched {
                        return Ok(Some(Found::Segment(entry)));
                    }
                    let mut segments = 1;
                    // Neighbours that changed too are read with it.
                    while segments < TOGETHER
                        && let Some((Pending::Segment(next), upper)) = self.pending.last()
                    {
                        let next = self.range_of(next, upper.as_ref())?;
                        let rest = self.touched.get(self.passed + self.count_touched(&range)..).unwrap_or_default();
                        let is_touched =
                            rest.first().is_some_and(|key| next.upper.as_ref().is_none_or(|upper| key.compare(upper).is_lt()));
                        if !is_touched {
                            break;
                        }
                        self.pending.pop();
                        self.visited += 1;
                        range.upper = next.upper;
                        segments += 1;
                    }
                    let touched = self.count_touched(&range);
                    self.passed += touched;
                    return Ok(Some(Found::Changed { range, touched, segments }));
                }
            }
        }
        Ok(None)
    }

    /// The next pieces. None at the end.
    async fn window(&mut self, held_at_most: usize) -> Result<Window> {
        let mut window = Window::default();
        let mut changed = 0;
        while changed < SEGMENTS_A_WINDOW && window.pieces.len() < PIECES_A_WINDOW {
            let piece = match self.next().await? {
                None => break,
                Some(Found::Node { height, entry }) => Piece::Node { height, entry },
                Some(Found::Segment(entry)) => Piece::Segment(entry),
                Some(Found::Changed { range, touched, .. }) if touched > held_at_most => Piece::Range(range),
                Some(Found::Changed { range, segments, .. }) => {
                    changed += segments;
                    window.wanted.push((window.pieces.len(), range));
                    Piece::Documents(Vec::new())
                }
            };
            window.pieces.push_back(piece);
        }
        Ok(window)
    }
}

/// Some pieces, and which of them are to be filled with the documents of which range.
#[derive(Default)]
struct Window {
    pieces: VecDeque<Piece>,
    wanted: Vec<(usize, KeyRange)>,
}

impl Window {
    /// Reads the documents.
    async fn fill(mut self, source: ScanSource, by_filter: bool) -> Result<VecDeque<Piece>> {
        for some in self.wanted.chunks(RANGES_A_COMMAND) {
            let (positions, ranges): (Vec<usize>, Vec<KeyRange>) = some.iter().cloned().unzip();
            let read = source.read_ranges(&ranges, by_filter).await?;
            for (position, documents) in positions.into_iter().zip(read) {
                if let Some(piece) = self.pieces.get_mut(position) {
                    *piece = Piece::Documents(documents);
                }
            }
        }
        Ok(self.pieces)
    }
}

async fn read_node(repository: &Repository, node: SegmentId) -> Result<(u8, Vec<TreeEntry>)> {
    let bytes = repository.read_segments(Content::Node, &[node]).await?;
    tree::decode(bytes.first().map(|bytes| &bytes[..]).unwrap_or_default())
}

/// Adds pieces to the tree that grows.
async fn grow(
    repository: &Repository,
    source: &ScanSource,
    mut growth: Regrowth,
    compressing: &mut Compressing,
    mut pieces: VecDeque<Piece>,
    meter: &PhaseMeter,
) -> Result<Grown> {
    let (mut read, mut taken_apart) = (0, 0);
    while !pieces.is_empty() {
        let documents;
        (growth, pieces, documents) = grow_further(growth, pieces, compressing, meter).await?;
        read += documents;
        // Where the older tree does not fit, it is taken apart.
        match pieces.pop_front() {
            None => break,
            Some(Piece::Node { entry, .. }) => {
                let (height, entries) = read_node(repository, entry.id).await?;
                if height == 0 {
                    taken_apart += i64::try_from(entries.len()).unwrap_or(0);
                }
                for entry in entries.into_iter().rev() {
                    pieces.push_front(match height.checked_sub(1) {
                        Some(height) => Piece::Node { height, entry },
                        None => Piece::Segment(entry),
                    });
                }
            }
            Some(Piece::Segment(entry)) => {
                for segment in repository.read_segments(Content::Documents, &[entry.id]).await? {
                    pieces.push_front(Piece::Documents(segment.to_vec()));
                }
            }
            Some(Piece::Range(range)) => {
                let mut scan = source.scan(range);
                while let Some(batch) = scan.next().await? {
                    // Some at a time: what is cut waits in memory until it is compressed.
                    let parts = in_parts(&batch)?;
                    drop(batch);
                    for some in parts {
                        let count;
                        (growth, _, count) = grow_further(growth, [Piece::Documents(some)].into(), compressing, meter).await?;
                        read += count;
                    }
                }
            }
            Some(Piece::Documents(_)) => return Err(Error::internal("documents that were read were not cut")),
        }
    }
    Ok(Grown { growth, read, taken_apart })
}

/// The documents of a batch, back to back, in parts of about [`HELD_BYTES`].
fn in_parts(batch: &ScanBatch) -> Result<Vec<Vec<u8>>> {
    let mut parts = vec![Vec::new()];
    for document in batch.documents()? {
        let document = document?.as_bytes();
        match parts.last_mut() {
            Some(part) if part.len() as u64 <= HELD_BYTES => part.extend_from_slice(document),
            _ => parts.push(document.to_vec()),
        }
    }
    Ok(parts)
}

/// What came of growing.
struct Grown {
    growth: Regrowth,
    /// Documents read.
    read: u64,
    /// Segments below nodes that could not be taken over whole.
    taken_apart: i64,
}

/// Adds all that needs no reading, on a blocking thread, and hands full blocks on.
async fn grow_further(
    growth: Regrowth,
    pieces: VecDeque<Piece>,
    compressing: &mut Compressing,
    meter: &PhaseMeter,
) -> Result<(Regrowth, VecDeque<Piece>, u64)> {
    let work = tokio::task::spawn_blocking(move || grow_at_once(growth, pieces));
    let (mut growth, pieces, documents) = work.await??;
    for block in growth.take_full() {
        compressing.add(block).await?;
    }
    meter.advance(documents, 0);
    Ok((growth, pieces, documents))
}

/// Adds pieces until one comes for which something must be read.
fn grow_at_once(mut growth: Regrowth, mut pieces: VecDeque<Piece>) -> Result<(Regrowth, VecDeque<Piece>, u64)> {
    let mut documents = 0;
    while let Some(piece) = pieces.pop_front() {
        match piece {
            Piece::Node { height, entry } if growth.takes_nodes(height) => growth.take_over_node(height, entry)?,
            Piece::Segment(entry) if growth.takes_segments() => growth.take_over_segment(entry)?,
            Piece::Documents(bytes) => {
                documents += documents_of(&bytes).count() as u64;
                growth.cut(&bytes)?;
            }
            other => {
                pieces.push_front(other);
                break;
            }
        }
    }
    Ok((growth, pieces, documents))
}

/// So many neighbouring segments are read together.
const TOGETHER: usize = 8;
const RANGES_A_COMMAND: usize = 24;
/// So many segments that changed are held in each window: a MiB or two.
const SEGMENTS_A_WINDOW: usize = 24;
const WINDOWS_AHEAD: usize = 4;
const PIECES_A_WINDOW: usize = 8192;
const NODES_AT_ONCE: usize = 64;
/// Where documents of more bytes than this have changed in a range, they are streamed.
const HELD_BYTES: u64 = 2 << 20;
/// The same by their number.
const HELD_AT_MOST: usize = 2000;
