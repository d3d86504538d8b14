//! Prunes beside backups, against a model of what every snapshot holds.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use mongo_core::clock::ManualClock;
use proptest::prelude::*;

use super::*;
use crate::{
    Key, MemoryArchive, ObjectMeta, ObjectName, PutMode, PutOutcome, Verify,
    archive::ArchiveSink,
    repository::{
        announcement::Purpose,
        testing::{Documents, Steps, read, snapshot},
    },
};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn keep_last(count: u32) -> RetentionPolicy {
    RetentionPolicy { keep_last: count, ..RetentionPolicy::default() }
}

fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_770_000_000)))
}

fn now(clock: &ManualClock) -> DateTime {
    DateTime::from_millis(i64::try_from(clock.wall().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis()).unwrap())
}

async fn open(archive: &Arc<dyn ArchiveSink>) -> Repository {
    Repository::open_or_init_shared(Arc::clone(archive), Key::host([1; 32])).await.unwrap()
}

async fn packs(repository: &Repository) -> usize {
    repository.archive().list("packs/").count().await
}

/// Sentences that were not carried out yet.
async fn open_sentences(archive: &dyn ArchiveSink) -> usize {
    let objects: Vec<ObjectMeta> = archive.list("condemned/").map(Result::unwrap).collect().await;
    objects.iter().filter(|object| !object.name.as_str().ends_with(".decision")).count()
}

fn documents(from: i32, to: i32, value: i32) -> Documents {
    (from..to).map(|id| (id, value)).collect()
}

#[tokio::test]
async fn what_is_being_read_is_not_deleted_before_the_reader_is_through() {
    let archive: Arc<dyn ArchiveSink> = Arc::new(MemoryArchive::new());
    let (repository, clock) = (open(&archive).await, clock());
    let first = snapshot(&repository, now(&clock), &documents(0, 500, 1)).await.unwrap();
    clock.advance(DAY);
    snapshot(&repository, now(&clock), &documents(0, 500, 2)).await.unwrap();
    let prune = || Prune::new(&repository, keep_last(1)).clock(Arc::<ManualClock>::clone(&clock));
    // A reader of its own: what it finds is not what the prune has in memory.
    let reader = open(&archive).await;
    let manifest = reader
        .while_reading(async {
            let manifest = reader.snapshot(&(&first).into()).await?;
            reader.reload_index().await?;
            let report = prune().run().await?;
            assert_eq!((report.removed.len(), report.deleted_packs), (1, 0), "{report:?}");
            assert!(report.postponed_packs > 0);
            let mut walk = reader.walk(&reader.namespaces(&manifest).await?[0].root)?;
            let mut segments = 0;
            while let Some(entry) = walk.next().await? {
                reader.read_segments(crate::repository::segment::Content::Documents, &[entry.id]).await?;
                segments += 1;
            }
            assert!(segments > 0);
            Ok(manifest)
        })
        .await
        .unwrap();
    assert!(reader.still_there(&manifest.id).await.is_err());
    let report = prune().run().await.unwrap();
    assert!(report.deleted_packs > 0 && report.revoked.is_empty(), "{report:?}");
    assert_eq!(archive.list("locks/").count().await, 0);
}

#[tokio::test]
async fn a_reader_that_has_died_holds_nothing_back_for_more_than_a_day() {
    let archive: Arc<dyn ArchiveSink> = Arc::new(MemoryArchive::new());
    let (repository, clock) = (open(&archive).await, clock());
    snapshot(&repository, now(&clock), &documents(0, 500, 1)).await.unwrap();
    clock.advance(DAY);
    snapshot(&repository, now(&clock), &documents(0, 500, 2)).await.unwrap();
    let died = SnapshotId::generate(now(&clock)).unwrap();
    repository.announce(&died, now(&clock), 0, Purpose::Reading).await.unwrap();
    let prune = || Prune::new(&repository, keep_last(1)).clock(Arc::<ManualClock>::clone(&clock));
    assert!(prune().run().await.unwrap().postponed_packs > 0);
    clock.advance(DAY + Duration::from_secs(1));
    let report = prune().run().await.unwrap();
    assert!(report.deleted_packs > 0 && report.revoked.is_empty(), "{report:?}");
    assert_eq!(archive.list("locks/").count().await, 0);
}

#[tokio::test]
async fn what_only_removed_snapshots_needed_is_deleted_at_once_where_no_backup_is_under_way() {
    let archive: Arc<dyn ArchiveSink> = Arc::new(MemoryArchive::new());
    let (repository, clock) = (open(&archive).await, clock());
    for value in 0..4 {
        snapshot(&repository, now(&clock), &documents(0, 500, value)).await.unwrap();
        clock.advance(DAY);
    }
    let before = packs(&repository).await;
    let prune = Prune::new(&repository, keep_last(1)).clock(Arc::<ManualClock>::clone(&clock));
    let planned = prune.plan().await.unwrap().summary().clone();
    assert_eq!((planned.removed, packs(&repository).await), (3, before), "a plan changes nothing");
    let report = prune.run().await.unwrap();
    assert_eq!((report.removed.len(), report.postponed_packs), (3, 0));
    assert!(report.deleted_packs >= 3 && report.freed_bytes == planned.unused_bytes, "{report:?}");
    let kept = repository.snapshots().await.unwrap().snapshots;
    assert_eq!(read(&repository, &kept[0].id).await.unwrap(), documents(0, 500, 3));
    assert!(Verify::new(&repository).run().await.unwrap().is_sound());
    assert_eq!(open_sentences(&*archive).await, 0);
}

#[tokio::test]
async fn packs_of_which_little_is_needed_are_written_anew_within_the_limit() {
    let archive: Arc<dyn ArchiveSink> = Arc::new(MemoryArchive::new());
    let (repository, clock) = (open(&archive).await, clock());
    snapshot(&repository, now(&clock), &documents(0, 3000, 0)).await.unwrap();
    clock.advance(DAY);
    // A tenth of what the first stored is still needed.
    let mut changed = documents(0, 3000, 1);
    changed.extend(documents(0, 300, 0));
    let last = snapshot(&repository, now(&clock), &changed).await.unwrap();
    let prune = |limit| {
        Prune::new(&repository, keep_last(1)).clock(Arc::<ManualClock>::clone(&clock)).max_unused(0.0).max_repack_bytes(limit)
    };
    assert_eq!(prune(10).plan().await.unwrap().summary().repacked_packs, 0);
    let held = |repository: Repository| async move {
        repository
            .archive()
            .list("packs/")
            .map(|object| object.unwrap().size)
            .fold(0, |sum, size| async move { sum + size })
            .await
    };
    let before = held(repository.clone()).await;
    let report = prune(1 << 30).run().await.unwrap();
    assert!(report.repacked_packs > 0 && report.deleted_packs >= report.repacked_packs, "{report:?}");
    assert!(held(repository.clone()).await < before);
    assert_eq!(read(&repository, &last).await.unwrap(), changed);
    assert!(Verify::new(&repository).run().await.unwrap().is_sound());
    assert_eq!(prune(1 << 30).plan().await.unwrap().summary().repacked_packs, 0, "nothing is left to be gained");
}

#[tokio::test]
async fn a_backup_that_slept_through_a_prune_either_publishes_what_is_there_or_nothing() {
    for (sleeps_for, publishes) in [(DAY / 2, true), (DAY * 3, false)] {
        let archive: Arc<dyn ArchiveSink> = Arc::new(MemoryArchive::new());
        let (repository, clock) = (open(&archive).await, clock());
        let content = documents(0, 500, 7);
        snapshot(&repository, now(&clock), &content).await.unwrap();
        clock.advance(DAY);
        snapshot(&repository, now(&clock), &documents(1000, 1500, 1)).await.unwrap();
        // It relies on what the first snapshot stored, and falls asleep.
        let mut sleeper = Steps::begin(&open(&archive).await, now(&clock)).await.unwrap();
        sleeper.store(&content).await.unwrap();
        let prune = |keep| Prune::new(&repository, keep_last(keep)).clock(Arc::<ManualClock>::clone(&clock));
        let report = prune(1).run().await.unwrap();
        assert!(report.deleted_packs == 0 && report.postponed_packs > 0, "{report:?}");
        clock.advance(sleeps_for);
        let report = prune(2).run().await.unwrap();
        assert_eq!(report.revoked.len(), usize::from(!publishes));
        let published = sleeper.publish().await;
        assert_eq!(published.is_ok(), publishes, "{published:?}");
        sleeper.end().await.unwrap();
        if let Err(error) = published {
            assert_eq!(error.kind(), ErrorKind::Conflict);
            assert!(repository.snapshot(&sleeper.id.clone().into()).await.is_err());
        } else {
            prune(2).run().await.unwrap();
            assert_eq!(read(&open(&archive).await, &sleeper.id).await.unwrap(), content);
        }
        assert!(Verify::new(&open(&archive).await).run().await.unwrap().is_sound());
        assert_eq!(open_sentences(&*archive).await, 0, "the sentence was carried out or taken back");
    }
}

#[tokio::test]
async fn a_damaged_snapshot_stops_every_deletion() {
    let archive: Arc<dyn ArchiveSink> = Arc::new(MemoryArchive::new());
    let (repository, clock) = (open(&archive).await, clock());
    let mut ids = Vec::new();
    for value in 0..3 {
        ids.push(snapshot(&repository, now(&clock), &documents(0, 100, value)).await.unwrap());
        clock.advance(DAY);
    }
    let name = ObjectName::new(format!("snapshots/{}", ids[1])).unwrap();
    let mut bytes = archive.get(&name, None).await.unwrap().to_vec();
    bytes[30] ^= 1;
    archive.put(&name, bytes.into(), PutMode::Replace).await.unwrap();
    let before = packs(&repository).await;
    let error = Prune::new(&repository, keep_last(1)).clock(clock).run().await.unwrap_err();
    assert!(error.kind() == ErrorKind::CorruptData && error.report().contains(name.as_str()), "{}", error.report());
    assert_eq!((packs(&repository).await, archive.list("snapshots/").count().await), (before, 3));
}

#[tokio::test]
async fn packs_without_any_snapshot_are_not_taken_for_rubbish() {
    let archive: Arc<dyn ArchiveSink> = Arc::new(MemoryArchive::new());
    let (repository, clock) = (open(&archive).await, clock());
    let id = snapshot(&repository, now(&clock), &documents(0, 100, 1)).await.unwrap();
    // As if the folder of the snapshots were not mounted.
    archive.delete(&ObjectName::new(format!("snapshots/{id}")).unwrap()).await.unwrap();
    let before = packs(&repository).await;
    let error = Prune::new(&repository, keep_last(1)).clock(clock).run().await.unwrap_err();
    assert_eq!((error.kind(), packs(&repository).await), (ErrorKind::NotFound, before));
}

/// An archive on which others get their turn between any two operations, which fails when it is told to, and
/// whose listings show what was there some operations ago.
#[derive(Debug)]
struct Adverse {
    inner: MemoryArchive,
    random: Mutex<fastrand::Rng>,
    operations: AtomicU64,
    /// All operations from this one on fail.
    dies_at: AtomicU64,
    /// How many changes the listings lag behind.
    lag: usize,
    past: Mutex<Vec<BTreeMap<String, u64>>>,
}

impl Adverse {
    fn new(seed: u64, lag: usize) -> Self {
        Self {
            inner: MemoryArchive::new(),
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            operations: AtomicU64::new(0),
            dies_at: AtomicU64::new(u64::MAX),
            lag,
            past: Mutex::new(vec![BTreeMap::new()]),
        }
    }

    async fn turn(&self) -> Result<()> {
        let yields = self.random.lock().unwrap().usize(0..6);
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        if self.operations.fetch_add(1, SeqCst) >= self.dies_at.load(SeqCst) {
            return Err(Error::new(ErrorKind::Unavailable, "the archive is gone"));
        }
        Ok(())
    }

    async fn remember(&self) {
        let all = self.inner.list("").map(|object| object.map(|object| (object.name.to_string(), object.size)).unwrap());
        let all = all.collect().await;
        self.past.lock().unwrap().push(all);
    }
}

#[async_trait]
impl ArchiveSink for Adverse {
    fn describe(&self) -> String {
        "adverse".to_owned()
    }

    async fn put(&self, name: &ObjectName, bytes: Bytes, mode: PutMode) -> Result<PutOutcome> {
        self.turn().await?;
        let outcome = self.inner.put(name, bytes, mode).await;
        self.remember().await;
        outcome
    }

    async fn get(&self, name: &ObjectName, range: Option<Range<u64>>) -> Result<Bytes> {
        self.turn().await?;
        self.inner.get(name, range).await
    }

    fn list(&self, prefix: &str) -> BoxStream<'static, Result<ObjectMeta>> {
        let past = self.past.lock().unwrap();
        let shown = &past[past.len().saturating_sub(1 + self.lag)];
        let found: Vec<_> = shown
            .iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .map(|(name, size)| Ok(ObjectMeta::new(ObjectName::new(name.clone()).unwrap(), *size)))
            .collect();
        stream::iter(found).boxed()
    }

    fn listing_lag(&self) -> Duration {
        if self.lag == 0 { Duration::ZERO } else { Duration::from_secs(3600) }
    }

    async fn delete(&self, name: &ObjectName) -> Result<()> {
        self.turn().await?;
        let outcome = self.inner.delete(name).await;
        self.remember().await;
        outcome
    }

    async fn head(&self, name: &ObjectName) -> Result<ObjectMeta> {
        self.turn().await?;
        self.inner.head(name).await
    }
}

/// One host that backs up, at times slowly, at times dying; what it has published stands in the model.
async fn backups(
    archive: Arc<dyn ArchiveSink>,
    clock: Arc<ManualClock>,
    seed: u64,
    model: Arc<Mutex<BTreeMap<SnapshotId, Documents>>>,
) {
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..6 {
        // Few contents: what one snapshot stored is often what another needs after it was removed.
        let content = documents(0, 200 + 100 * random.i32(0..3), random.i32(0..3));
        let repository = match Repository::open_or_init_shared(Arc::clone(&archive), Key::host([1; 32])).await {
            Ok(repository) => repository,
            Err(error) => panic!("{}", error.report()),
        };
        // Clocks of hosts differ, by up to a day.
        let skewed = now(&clock).timestamp_millis() + random.i64(-86_400_000..86_400_000);
        let Ok(mut steps) = Steps::begin(&repository, DateTime::from_millis(skewed)).await else { continue };
        if random.u8(0..8) == 0 {
            continue;
        }
        if steps.store(&content).await.is_err() {
            continue;
        }
        for _ in 0..random.usize(0..4) * random.usize(0..200) {
            tokio::task::yield_now().await;
        }
        if steps.publish().await.is_ok() {
            model.lock().unwrap().insert(steps.id.clone(), content);
        }
        if random.u8(0..8) > 0 {
            steps.end().await.unwrap();
        }
    }
}

async fn prunes(
    archive: Arc<dyn ArchiveSink>,
    clock: Arc<ManualClock>,
    seed: u64,
    model: Arc<Mutex<BTreeMap<SnapshotId, Documents>>>,
) {
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..8 {
        for _ in 0..random.usize(0..300) {
            tokio::task::yield_now().await;
        }
        clock.advance(Duration::from_secs(random.u64(0..48 * 3600)));
        let Ok(repository) = Repository::open_shared(Arc::clone(&archive), Key::host([1; 32])).await else { continue };
        let unused = if random.bool() { 0.0 } else { 0.5 };
        let prune =
            Prune::new(&repository, keep_last(random.u32(1..4))).max_unused(unused).clock(Arc::<ManualClock>::clone(&clock));
        let Ok(plan) = prune.plan().await else { continue };
        // What is to be removed is lost on purpose, whether or not it comes to that.
        for verdict in plan.summary().snapshots.iter().filter(|verdict| !verdict.is_kept()) {
            model.lock().unwrap().remove(&verdict.snapshot);
        }
        if let Err(error) = plan.execute().await {
            assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::NotFound), "{}", error.report());
        }
    }
}

async fn storm(seed: u64, lag: usize) {
    let archive = Arc::new(Adverse::new(seed, lag));
    let shared: Arc<dyn ArchiveSink> = Arc::<Adverse>::clone(&archive);
    let (clock, model) = (clock(), Arc::new(Mutex::new(BTreeMap::new())));
    open(&shared).await.make().await.unwrap();
    for number in 0..lag {
        // Old enough that its keys are listed.
        let name = ObjectName::new(format!("audit/{number}")).unwrap();
        shared.put(&name, Bytes::new(), PutMode::CreateOnly).await.unwrap();
    }
    let hosts = (0..3).map(|host| backups(Arc::clone(&shared), Arc::clone(&clock), seed * 10 + host, Arc::clone(&model)));
    let pruners = (5..7).map(|host| prunes(Arc::clone(&shared), Arc::clone(&clock), seed * 10 + host, Arc::clone(&model)));
    tokio::join!(futures_util::future::join_all(hosts), futures_util::future::join_all(pruners));
    // A prune that dies anywhere is gone on with by the next.
    let repository = open(&shared).await;
    archive.dies_at.store(archive.operations.load(SeqCst) + seed % 60, SeqCst);
    let _ = Prune::new(&repository, keep_last(100)).max_unused(0.0).clock(Arc::<ManualClock>::clone(&clock)).run().await;
    archive.dies_at.store(u64::MAX, SeqCst);
    for _ in 0..3 {
        clock.advance(DAY * 2);
        let repository = open(&shared).await;
        Prune::new(&repository, keep_last(100)).max_unused(0.0).clock(Arc::<ManualClock>::clone(&clock)).run().await.unwrap();
    }
    let repository = open(&shared).await;
    let model = model.lock().unwrap().clone();
    for (id, content) in &model {
        assert_eq!(&read(&repository, id).await.unwrap(), content, "snapshot {id}, seed {seed}");
    }
    if lag == 0 {
        assert_eq!(open_sentences(&*archive).await, 0, "seed {seed}");
    }
    let report = Verify::new(&repository).run().await.unwrap();
    assert!(report.is_sound(), "seed {seed}: {:?}", report.problems);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Three hosts back up while two prune, operation by operation in any order; backups sleep, die, and are revoked.
    #[test]
    fn no_kept_snapshot_ever_loses_anything(seed in 0_u64..1_000_000, stale: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(storm(seed, if stale { 5 } else { 0 }));
    }
}
