//! Storing segments: name, look up, compress, pack, upload.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use mongo_core::{Error, Result};
use sha2::{Digest as _, Sha256};
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    Repository,
    config::Config,
    envelope::{self, Magic},
    index::{self, Index},
    pack::{Encoding, Entry, Pack, PackBuilder, PackId},
    segment::{Content, SegmentId},
};
use crate::archive::{ArchiveSink, ObjectName, PutMode, PutOutcome};

/// Stores the segments of one backup. Shared by its workers.
///
/// Memory: one open pack, one waiting and two being written, each of the repository's pack size.
#[derive(Debug)]
pub(crate) struct SegmentStore {
    config: Arc<Config>,
    index: Arc<Index>,
    level: i32,
    state: Mutex<State>,
    full: mpsc::Sender<Pack>,
    counters: Counters,
}

#[derive(Debug)]
struct State {
    open: PackBuilder,
    /// Packs that wait for [`SegmentStore::send_full`].
    full: Vec<Pack>,
    /// Segments that this backup has stored itself.
    stored: HashSet<SegmentId>,
}

#[derive(Debug, Default)]
struct Counters {
    new_segments: AtomicU64,
    reused_segments: AtomicU64,
    stored_bytes: AtomicU64,
}

/// What a backup added to the repository.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StoreTotals {
    pub(crate) new_segments: u64,
    pub(crate) reused_segments: u64,
    pub(crate) stored_bytes: u64,
}

/// The other end of a store: puts packs into the archive, and index objects behind them.
#[derive(Debug)]
pub(crate) struct Uploader {
    archive: Arc<dyn ArchiveSink>,
    full: mpsc::Receiver<Pack>,
}

impl SegmentStore {
    pub(crate) fn new(repository: &Repository, level: i32) -> (Self, Uploader) {
        let (sender, receiver) = mpsc::channel(1);
        let store = Self {
            config: repository.config(),
            index: repository.index(),
            level,
            state: Mutex::new(State { open: PackBuilder::new(), full: Vec::new(), stored: HashSet::new() }),
            full: sender,
            counters: Counters::default(),
        };
        (store, Uploader { archive: Arc::clone(repository.archive()), full: receiver })
    }

    /// Stores a segment, unless the repository has it. Compresses: not for async tasks.
    pub(crate) fn put(&self, compressor: &mut Compressor, content: Content, plain: &[u8]) -> Result<SegmentId> {
        let id = SegmentId::of(&self.config.keys, content, plain);
        if self.index.get(id).is_some() || !self.state().stored.insert(id) {
            self.counters.reused_segments.fetch_add(1, Relaxed);
            return Ok(id);
        }
        let (encoding, stored) = compressor.compress(plain, self.level)?;
        let length = u32::try_from(plain.len()).map_err(|_| Error::internal("a segment is too large"))?;
        self.counters.new_segments.fetch_add(1, Relaxed);
        self.counters.stored_bytes.fetch_add(stored.len() as u64, Relaxed);
        let mut state = self.state();
        state.open.add(id, encoding, stored, length)?;
        if state.open.len() >= self.config.pack_bytes as usize {
            let pack = std::mem::take(&mut state.open).finish();
            state.full.push(pack);
        }
        Ok(id)
    }

    /// Hands full packs to the uploader, and waits while it has enough: to be called after every batch of segments.
    ///
    /// Not done by [`put`](Self::put), which runs on blocking threads: the uploader needs those too, and a host may have few.
    pub(crate) async fn send_full(&self) -> Result<()> {
        loop {
            let Some(pack) = self.state().full.pop() else { return Ok(()) };
            // The receiver is gone only when writing has failed; the uploader tells why.
            self.full.send(pack).await.map_err(|_| Error::cancelled())?;
        }
    }

    /// Sends the last pack and lets the uploader end.
    pub(crate) async fn finish(self) -> Result<StoreTotals> {
        self.send_full().await?;
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !state.open.is_empty() {
            self.full.send(state.open.finish()).await.map_err(|_| Error::cancelled())?;
        }
        Ok(StoreTotals {
            new_segments: self.counters.new_segments.into_inner(),
            reused_segments: self.counters.reused_segments.into_inner(),
            stored_bytes: self.counters.stored_bytes.into_inner(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Uploader {
    /// Writes packs until the store is finished, and an index object behind every 32 packs and at the end.
    ///
    /// An index object in between makes what an interrupted backup has stored so far usable by the next.
    pub(crate) async fn run(mut self) -> Result<()> {
        let mut writing: JoinSet<Result<(PackId, u64, Vec<Entry>)>> = JoinSet::new();
        let mut written = Vec::new();
        loop {
            let next = if writing.len() < WRITES_AT_ONCE {
                tokio::select! {
                    pack = self.full.recv() => Next::Pack(pack),
                    Some(done) = writing.join_next() => Next::Written(done),
                }
            } else {
                Next::Written(writing.join_next().await.unwrap_or_else(|| Ok(Err(Error::internal("no pack is being written")))))
            };
            match next {
                Next::Pack(Some(pack)) => {
                    let archive = Arc::clone(&self.archive);
                    writing.spawn(write_pack(archive, pack));
                }
                Next::Pack(None) => break,
                Next::Written(done) => written.push(done??),
            }
            if written.len() >= PACKS_AN_INDEX {
                write_index(&*self.archive, &std::mem::take(&mut written)).await?;
            }
        }
        while let Some(done) = writing.join_next().await {
            written.push(done??);
        }
        if written.is_empty() { Ok(()) } else { write_index(&*self.archive, &written).await }
    }
}

enum Next {
    Pack(Option<Pack>),
    Written(std::result::Result<Result<(PackId, u64, Vec<Entry>)>, tokio::task::JoinError>),
}

async fn write_pack(archive: Arc<dyn ArchiveSink>, pack: Pack) -> Result<(PackId, u64, Vec<Entry>)> {
    let (id, pack) = tokio::task::spawn_blocking(move || (pack.id(), pack)).await?;
    let size = pack.bytes.len() as u64;
    put_by_content(&*archive, &id.object()?, pack.bytes.into()).await?;
    Ok((id, size, pack.entries))
}

async fn write_index(archive: &dyn ArchiveSink, packs: &[(PackId, u64, Vec<Entry>)]) -> Result<()> {
    let object = envelope::seal(Magic::INDEX, &index::encode(packs));
    let name = ObjectName::new(format!("{}{}", index::PREFIX, hex::encode(Sha256::digest(&object))))?;
    put_by_content(archive, &name, object).await
}

/// Puts an object whose name is a hash of its bytes. One that exists has the same bytes, unless it was damaged since.
async fn put_by_content(archive: &dyn ArchiveSink, name: &ObjectName, bytes: Bytes) -> Result<()> {
    if archive.put(name, bytes.clone(), PutMode::CreateOnly).await? == PutOutcome::AlreadyExists
        && archive.head(name).await?.size != bytes.len() as u64
    {
        tracing::warn!(object = %name, "an object of the archive was truncated; it is written anew");
        archive.put(name, bytes, PutMode::Replace).await?;
    }
    Ok(())
}

/// A zstd context and its buffer, kept for the life of a worker: making one costs more than compressing a segment.
pub(crate) struct Compressor {
    context: Option<(i32, zstd::bulk::Compressor<'static>)>,
    buffer: Vec<u8>,
}

impl Compressor {
    pub(crate) fn new() -> Self {
        Self { context: None, buffer: Vec::new() }
    }

    fn compress<'a>(&'a mut self, plain: &'a [u8], level: i32) -> Result<(Encoding, &'a [u8])> {
        let failed = |error: std::io::Error| Error::internal("zstd failed").with_source(error);
        let context = match &mut self.context {
            Some((current, context)) if *current == level => context,
            slot => {
                let context = zstd::bulk::Compressor::new(level).map_err(failed)?;
                &mut slot.insert((level, context)).1
            }
        };
        let bound = zstd::zstd_safe::compress_bound(plain.len());
        if self.buffer.len() < bound {
            // Only ever longer: a buffer that follows each segment's size is cleared anew for each.
            self.buffer.resize(bound, 0);
        }
        let length = context.compress_to_buffer(plain, &mut self.buffer[..]).map_err(failed)?;
        Ok(if length < plain.len() { (Encoding::Zstd, &self.buffer[..length]) } else { (Encoding::Plain, plain) })
    }
}

const WRITES_AT_ONCE: usize = 2;
const PACKS_AN_INDEX: usize = 32;
