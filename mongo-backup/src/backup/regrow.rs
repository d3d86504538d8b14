//! Making a collection's tree from an older one, and reading only the segments in which something changed.

use std::{collections::VecDeque, sync::Arc};

use mongo_core::{
    Error, Result,
    progress::PhaseMeter,
    transfer::{
        partition::Key,
        scan::{ScanBatch, ScanSource},
    },
};
use tokio_util::task::AbortOnDropHandle;

use super::pieces::{Piece, Pieces};
use crate::repository::{Repository, assembly::Regrowth, segment::Content, store::Compressing, tree::TreeRoot};

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
                is_through = window.is_empty();
                ahead.push_back(AbortOnDropHandle::new(tokio::spawn(window.fill(source.clone(), by_filter))));
            }
            let Some(next) = ahead.pop_front() else { break };
            let next = next.await??;
            let grown = grow(&repository, &source, growth, &mut compressing, next, &meter).await?;
            growth = grown.growth;
            read += grown.read;
            taken_apart += grown.taken_apart;
        }
        growth.count_taken_over(older.segments.saturating_sub(pieces.visited() + taken_apart));
        compressing.finish().await?;
        let store = Arc::clone(growth.store());
        let (root, taken_over) = tokio::task::spawn_blocking(move || growth.finish()).await??;
        store.send_full().await?;
        Ok(Regrown { root, read, taken_over })
    }
}

/// A tree that was made from an older one.
pub(super) struct Regrown {
    pub(super) root: TreeRoot,
    /// Documents read.
    pub(super) read: u64,
    /// Segments taken over.
    pub(super) taken_over: u64,
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
                let (height, entries) = repository.read_node(entry.id).await?;
                match height.checked_sub(1) {
                    Some(height) => {
                        for entry in entries.into_iter().rev() {
                            pieces.push_front(Piece::Node { height, entry });
                        }
                    }
                    None => {
                        taken_apart += i64::try_from(entries.len()).unwrap_or(0);
                        pieces.push_front(Piece::Segments(entries.into()));
                    }
                }
            }
            Some(Piece::Segments(mut segments)) => {
                let next = segments.pop_front();
                if !segments.is_empty() {
                    pieces.push_front(Piece::Segments(segments));
                }
                for segment in repository.read_segments(Content::Documents, next.map(|next| next.id).as_slice()).await? {
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
            Piece::Segments(segments) if growth.takes_segments() => {
                for entry in segments {
                    growth.take_over_segment(entry)?;
                }
            }
            Piece::Documents(bytes) => documents += growth.cut(&bytes)?,
            other => {
                pieces.push_front(other);
                break;
            }
        }
    }
    Ok((growth, pieces, documents))
}

const WINDOWS_AHEAD: usize = 2;
/// Where documents of more bytes than this have changed in a range, they are streamed.
const HELD_BYTES: u64 = 2 << 20;
/// The same by their number.
const HELD_AT_MOST: usize = 2000;
