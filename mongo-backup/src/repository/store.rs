//! Storing segments: name, look up, gather into blocks, compress, pack, upload.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use mongo_core::{CancellationToken, Error, ErrorKind, Result, lock::lock};
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
};

use super::{
    Repository,
    block::{Compressor, OpenBlock},
    config::Config,
    envelope::{self, Magic},
    index::{self, Index},
    pack::{Directory, Pack, PackBuilder, PackId},
    segment::{Content, SegmentId},
};
use crate::archive::{ArchiveSink, ObjectName, PutMode, PutOutcome};

/// Stores the segments of one backup. Shared by its workers.
///
/// Memory: one open pack, one or two that wait and two that are being written, each of the repository's pack size, an open
/// block a writer, and three blocks that are compressed beside their writers.
#[derive(Debug)]
pub(crate) struct SegmentStore {
    config: Arc<Config>,
    index: Arc<Index>,
    level: i32,
    packs: Arc<Mutex<Packs>>,
    /// Segments that this backup stores itself.
    claimed: Mutex<HashSet<SegmentId>>,
    /// What was left in the hands of writers that ended.
    leftovers: Mutex<BlockBuffer>,
    full: mpsc::UnboundedSender<(Pack, OwnedSemaphorePermit)>,
    /// Room for packs on their way into the archive.
    room: Arc<Semaphore>,
    /// Room for blocks that are compressed beside their writers, and what has compressed some.
    compressing: Arc<Semaphore>,
    compressors: Mutex<Vec<Compressor>>,
    spare_blocks: Mutex<Vec<OpenBlock>>,
    counters: Counters,
}

#[derive(Debug)]
struct Packs {
    open: PackBuilder,
    /// Those that wait for [`SegmentStore::send_full`].
    full: VecDeque<Pack>,
    /// The memory of packs that were written, for the next ones.
    spare: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Counters {
    new_segments: AtomicU64,
    reused_segments: AtomicU64,
    packed_segments: AtomicU64,
    stored_bytes: AtomicU64,
}

/// What a backup added to the repository.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StoreTotals {
    pub(crate) new_segments: u64,
    pub(crate) reused_segments: u64,
    pub(crate) stored_bytes: u64,
}

impl StoreTotals {
    /// Adds what was stored before for the same snapshot.
    pub(crate) fn add(&mut self, other: Self) {
        self.new_segments += other.new_segments;
        self.reused_segments += other.reused_segments;
        self.stored_bytes += other.stored_bytes;
    }
}

/// The other end of a store: puts packs into the archive, and index objects behind them.
#[derive(Debug)]
pub(crate) struct Uploader {
    archive: Arc<dyn ArchiveSink>,
    config: Arc<Config>,
    full: mpsc::UnboundedReceiver<(Pack, OwnedSemaphorePermit)>,
    packs: Arc<Mutex<Packs>>,
}

impl SegmentStore {
    pub(crate) fn new(repository: &Repository, level: i32) -> Result<(Self, Uploader)> {
        Self::with_index(repository, level, repository.index())
    }

    /// One that stores every segment, also what the repository has already.
    pub(crate) fn anew(repository: &Repository, level: i32) -> Result<(Self, Uploader)> {
        Self::with_index(repository, level, Arc::default())
    }

    fn with_index(repository: &Repository, level: i32, index: Arc<Index>) -> Result<(Self, Uploader)> {
        // Not bounded by its length but by the room for packs.
        let (sender, receiver) = mpsc::unbounded_channel();
        let config = repository.config();
        let open = PackBuilder::new(Vec::new(), config.cipher.as_ref())?;
        let packs = Arc::new(Mutex::new(Packs { open, full: VecDeque::new(), spare: Vec::new() }));
        let uploader = Uploader {
            archive: Arc::clone(repository.archive()),
            config: Arc::clone(&config),
            full: receiver,
            packs: Arc::clone(&packs),
        };
        let store = Self {
            config,
            index,
            level,
            packs,
            claimed: Mutex::default(),
            leftovers: Mutex::default(),
            full: sender,
            room: Arc::new(Semaphore::new(WRITES_AT_ONCE)),
            compressing: Arc::new(Semaphore::new(COMPRESSED_AT_ONCE)),
            compressors: Mutex::default(),
            spare_blocks: Mutex::default(),
            counters: Counters::default(),
        };
        Ok((store, uploader))
    }

    /// An empty block, in memory that was touched before if there is any.
    fn spare_block(&self) -> OpenBlock {
        lock(&self.spare_blocks).pop().unwrap_or_default()
    }

    /// Whether this segment is new, and from now on its caller's to store.
    fn claim(&self, id: SegmentId) -> bool {
        let new = !self.index.holds_for_good(id) && lock(&self.claimed).insert(id);
        let counter = if new { &self.counters.new_segments } else { &self.counters.reused_segments };
        counter.fetch_add(1, Relaxed);
        new
    }

    /// Compresses a block into the open pack, and empties it.
    fn add(&self, compressor: &mut Compressor, block: &mut OpenBlock) -> Result<()> {
        let cipher = self.config.cipher.as_ref();
        let (encoding, stored) = compressor.compress(&block.plain, self.level, cipher)?;
        self.counters.stored_bytes.fetch_add(stored.len() as u64, Relaxed);
        self.counters.packed_segments.fetch_add(block.segments.len() as u64, Relaxed);
        let mut packs = lock(&self.packs);
        packs.open.add(encoding, stored, &block.segments)?;
        if packs.open.len() >= self.config.pack_bytes as usize {
            let next = PackBuilder::new(packs.spare.pop().unwrap_or_default(), cipher)?;
            let pack = std::mem::replace(&mut packs.open, next).finish(cipher)?;
            packs.full.push_back(pack);
        }
        block.clear();
        Ok(())
    }

    /// Hands full packs to the uploader, and waits while it has enough: to be called after every batch of segments.
    ///
    /// Not done by [`BlockWriter::put`], which runs on blocking threads: the uploader needs those too, and a host may have few.
    pub(crate) async fn send_full(&self) -> Result<()> {
        while !lock(&self.packs).full.is_empty() {
            let room = self.room().await?;
            let Some(pack) = lock(&self.packs).full.pop_front() else { break };
            self.send(pack, room)?;
        }
        Ok(())
    }

    async fn room(&self) -> Result<OwnedSemaphorePermit> {
        let room = Arc::clone(&self.room).acquire_owned().await;
        room.map_err(|error| Error::internal("the room for packs is closed").with_source(error))
    }

    fn send(&self, pack: Pack, room: OwnedSemaphorePermit) -> Result<()> {
        // The receiver is gone only when writing has failed; the uploader tells why.
        self.full.send((pack, room)).map_err(|_| Error::cancelled())
    }

    /// Sends the last pack and lets the uploader end.
    pub(crate) async fn finish(self) -> Result<StoreTotals> {
        let this = tokio::task::spawn_blocking(move || {
            let BlockBuffer { mut open, mut compressor } = std::mem::take(&mut *lock(&self.leftovers));
            if !open.is_empty() {
                self.add(&mut compressor, &mut open)?;
            }
            Ok::<_, Error>(self)
        });
        let this = this.await??;
        this.send_full().await?;
        let new_segments = this.counters.new_segments.load(Relaxed);
        if this.counters.packed_segments.load(Relaxed) != new_segments {
            // A writer that was not flushed: a snapshot that needs its segments must not come to be.
            return Err(Error::internal("segments were left behind on the way into the archive"));
        }
        let cipher = this.config.cipher.as_ref();
        let last = std::mem::replace(&mut lock(&this.packs).open, PackBuilder::new(Vec::new(), cipher)?);
        if !last.is_empty() {
            let room = this.room().await?;
            this.send(last.finish(cipher)?, room)?;
        }
        Ok(StoreTotals {
            new_segments,
            reused_segments: this.counters.reused_segments.load(Relaxed),
            stored_bytes: this.counters.stored_bytes.load(Relaxed),
        })
    }
}

/// Runs work that stores segments, with the uploads beside it, and closes the store when the work is done.
///
/// When the archive fails, writers learn no more than that they are to stop; then the archive's error is the one to tell.
pub(crate) async fn storing<T, W: Future<Output = Result<T>>>(
    (store, uploader): (SegmentStore, Uploader),
    cancel: &CancellationToken,
    work: impl FnOnce(Arc<SegmentStore>) -> W,
) -> Result<(T, StoreTotals)> {
    let store = Arc::new(store);
    let uploading = tokio::spawn(uploader.run());
    let done = match work(Arc::clone(&store)).await {
        Ok(done) => done,
        Err(error) => {
            // The uploader ends when the last worker has let go of the store.
            drop(store);
            return match uploading.await? {
                Err(upload) if error.kind() == ErrorKind::Cancelled && !cancel.is_cancelled() => Err(upload),
                _ => Err(error),
            };
        }
    };
    let store = Arc::into_inner(store).ok_or_else(|| Error::internal("a worker outlived its work"))?;
    let finished = store.finish().await;
    uploading.await??;
    let totals = finished?;
    if cancel.is_cancelled() { Err(Error::cancelled()) } else { Ok((done, totals)) }
}

/// Puts the segments of one worker into blocks.
///
/// What it still holds when it is dropped without [`flush`](Self::flush) is not stored, and [`SegmentStore::finish`] fails.
#[derive(Debug)]
pub(crate) struct BlockWriter {
    store: Arc<SegmentStore>,
    buffer: BlockBuffer,
    /// Full blocks, where others compress them.
    full: Option<Vec<OpenBlock>>,
}

#[derive(Debug, Default)]
struct BlockBuffer {
    open: OpenBlock,
    compressor: Compressor,
}

impl BlockWriter {
    pub(crate) fn new(store: Arc<SegmentStore>) -> Self {
        Self { store, buffer: BlockBuffer::default(), full: None }
    }

    /// One whose full blocks are compressed elsewhere: they are to be [taken](Self::take_full) and given to a [`Compressing`].
    pub(crate) fn leaving_full_blocks(store: Arc<SegmentStore>) -> Self {
        Self { full: Some(Vec::new()), ..Self::new(store) }
    }

    pub(crate) fn take_full(&mut self) -> Vec<OpenBlock> {
        self.full.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(crate) fn store(&self) -> &Arc<SegmentStore> {
        &self.store
    }

    /// Stores a segment, unless the repository has it. Compresses now and then: not for async tasks.
    pub(crate) fn put(&mut self, content: Content, plain: &[u8]) -> Result<SegmentId> {
        let id = SegmentId::of(&self.store.config.keys, content, plain);
        if self.store.claim(id) {
            let BlockBuffer { open, compressor } = &mut self.buffer;
            open.push(id, plain)?;
            if open.is_full(content) {
                match &mut self.full {
                    Some(full) => full.push(std::mem::replace(open, self.store.spare_block())),
                    None => self.store.add(compressor, open)?,
                }
            }
        }
        Ok(id)
    }

    /// Stores what it holds, and gives its memory back. Small rests of many writers share blocks. Compresses.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let full = self.take_full();
        let BlockBuffer { mut open, mut compressor } = std::mem::take(&mut self.buffer);
        for mut block in full {
            self.store.add(&mut compressor, &mut block)?;
        }
        if open.plain.len() >= WORTH_A_BLOCK {
            return self.store.add(&mut compressor, &mut open);
        }
        let BlockBuffer { open: rest, compressor } = &mut *lock(&self.store.leftovers);
        rest.append(&open);
        if rest.is_full(Content::Documents) { self.store.add(compressor, rest) } else { Ok(()) }
    }
}

/// Compresses the blocks of a writer beside it, some of all writers at a time.
pub(crate) struct Compressing {
    store: Arc<SegmentStore>,
    running: JoinSet<Result<()>>,
}

impl Compressing {
    pub(crate) fn new(store: Arc<SegmentStore>) -> Self {
        Self { store, running: JoinSet::new() }
    }

    /// Takes a block on. Waits while there is enough to do.
    pub(crate) async fn add(&mut self, mut block: OpenBlock) -> Result<()> {
        let room = Arc::clone(&self.store.compressing).acquire_owned().await;
        let room = room.map_err(|error| Error::internal("the room for blocks is closed").with_source(error))?;
        while let Some(done) = self.running.try_join_next() {
            done??;
        }
        let store = Arc::clone(&self.store);
        self.running.spawn_blocking(move || {
            let mut compressor = lock(&store.compressors).pop().unwrap_or_default();
            store.add(&mut compressor, &mut block)?;
            lock(&store.compressors).push(compressor);
            lock(&store.spare_blocks).push(block);
            drop(room);
            Ok(())
        });
        self.store.send_full().await
    }

    /// Waits until everything is compressed.
    pub(crate) async fn finish(mut self) -> Result<()> {
        while let Some(done) = self.running.join_next().await {
            done??;
        }
        self.store.send_full().await
    }
}

impl Uploader {
    /// Writes packs until the store is finished, and an index object behind every 32 packs and at the end.
    ///
    /// An index object in between makes what an interrupted backup has stored so far usable by the next.
    pub(crate) async fn run(mut self) -> Result<()> {
        let mut writing: JoinSet<Result<Written>> = JoinSet::new();
        let mut written = Vec::new();
        loop {
            tokio::select! {
                next = self.full.recv() => match next {
                    Some((pack, room)) => {
                        let (archive, packs) = (Arc::clone(&self.archive), Arc::clone(&self.packs));
                        writing.spawn(async move {
                            let written = write_pack(archive, pack, &packs).await;
                            drop(room);
                            written
                        });
                    }
                    None => break,
                },
                Some(done) = writing.join_next() => written.push(done??),
            }
            if written.len() >= PACKS_AN_INDEX {
                write_index(&*self.archive, &self.config, &std::mem::take(&mut written)).await?;
            }
        }
        while let Some(done) = writing.join_next().await {
            written.push(done??);
        }
        if written.is_empty() { Ok(()) } else { write_index(&*self.archive, &self.config, &written).await }
    }
}

/// A pack that lies in the archive: its name, its size, and what it holds.
pub(crate) type Written = (PackId, u64, Directory);

async fn write_pack(archive: Arc<dyn ArchiveSink>, pack: Pack, packs: &Mutex<Packs>) -> Result<Written> {
    let Pack { id, bytes, directory } = pack;
    let bytes = Bytes::from(bytes);
    put_by_content(&*archive, &id.object()?, bytes.clone()).await?;
    let size = bytes.len() as u64;
    // Memory that was touched before is cheaper than new memory. An archive that keeps the bytes keeps them.
    if let Ok(buffer) = bytes.try_into_mut() {
        lock(packs).spare.push(buffer.into());
    }
    Ok((id, size, directory))
}

async fn write_index(archive: &dyn ArchiveSink, config: &Config, packs: &[Written]) -> Result<()> {
    let object = envelope::seal(Magic::INDEX, None, config.cipher.as_ref(), &index::encode(packs)?)?;
    let name = ObjectName::new(format!("{}{}", index::PREFIX, hex::encode(Sha256::digest(&object))))?;
    put_by_content(archive, &name, object).await
}

impl Repository {
    /// Writes an index object that names these packs.
    pub(crate) async fn write_index(&self, packs: &[Written]) -> Result<()> {
        write_index(&**self.archive(), &self.config(), packs).await
    }
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

const WRITES_AT_ONCE: usize = 2;
/// Blocks of all writers that are compressed beside them.
const COMPRESSED_AT_ONCE: usize = 3;
const PACKS_AN_INDEX: usize = 32;
/// What is smaller at the end of a range or a tree goes into a block with others of its kind.
const WORTH_A_BLOCK: usize = 256 << 10;
