//! Announcements: prunes delete nothing that an operation which is under way may rely on.
//!
//! A backup announces itself under the id of the snapshot that it will publish; whoever only reads announces itself under an id
//! of its own. Both give signs of life until they end.

use std::{
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use mongo_core::{ErrorKind, Result, bson::DateTime};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::{
    Repository, TOOL,
    manifest::{SnapshotId, SnapshotManifest},
};
use crate::archive::{ObjectMeta, ObjectName, PutMode};

/// What an operation that is under way will do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Purpose {
    /// It will publish a snapshot under the id of its announcement. So it is where nothing is said.
    #[default]
    Backup,
    /// It reads what snapshots hold.
    Reading,
}

/// An operation that was under way, and how often it had given a sign of life.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Announced {
    #[serde(rename = "snapshot")]
    pub(crate) id: SnapshotId,
    pub(crate) beat: i64,
    #[serde(default)]
    pub(crate) purpose: Purpose,
}

impl From<UnderWay> for Announced {
    fn from(UnderWay { id, purpose, beat, .. }: UnderWay) -> Self {
        Self { id, beat, purpose }
    }
}

/// An operation that has announced itself and not ended: it is in progress, or its process has died.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct UnderWay {
    /// Its own id; of a backup that of the snapshot that it will publish.
    pub id: SnapshotId,
    /// What it will do.
    pub purpose: Purpose,
    /// Since when, by its own clock.
    pub started: DateTime,
    /// When it has given the last sign of life, by its own clock. It gives one every five minutes.
    pub last_sign: DateTime,
    #[serde(skip)]
    pub(crate) beat: i64,
}

/// The payload of an announcement.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredAnnouncement {
    started: DateTime,
    /// When this sign of life was given, by the clock of the operation.
    at: DateTime,
    beat: i64,
    #[serde(default)]
    purpose: Purpose,
    tool: String,
}

impl Repository {
    /// The operations that are under way, of all hosts, oldest first. One that was killed is among them until a prune finds that it is dead.
    ///
    /// How operations have ended tells the [audit log](Self::audit_records).
    ///
    /// # Errors
    /// The archive's own.
    pub async fn under_way(&self) -> Result<Vec<UnderWay>> {
        let listed: Vec<ObjectMeta> = self.archive().list(ANNOUNCEMENTS).try_collect().await?;
        let mut found = Vec::new();
        for object in listed {
            let Some(id) = object.name.as_str().strip_prefix(ANNOUNCEMENTS).and_then(|id| id.parse().ok()) else { continue };
            found.extend(self.sign_of_life(&id).await?);
        }
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }

    /// The announcement of one operation; none if it is not under way.
    pub(crate) async fn sign_of_life(&self, id: &SnapshotId) -> Result<Option<UnderWay>> {
        let found = |started, last_sign, beat, purpose| Some(UnderWay { id: id.clone(), purpose, started, last_sign, beat });
        match self.read_mark::<StoredAnnouncement>(&announcement_name(id)?).await {
            Ok(Some(stored)) => Ok(found(stored.started, stored.at, stored.beat, stored.purpose)),
            Ok(None) => Ok(None),
            // It may be alive all the same.
            Err(error) if error.kind() == ErrorKind::CorruptData => Ok(found(DateTime::MIN, DateTime::MIN, -1, Purpose::Backup)),
            Err(error) => Err(error),
        }
    }

    /// Announces an operation, or gives a sign of life.
    pub(crate) async fn announce(&self, id: &SnapshotId, started: DateTime, beat: i64, purpose: Purpose) -> Result<()> {
        let stored = StoredAnnouncement { started, at: DateTime::now(), beat, purpose, tool: TOOL.to_owned() };
        self.put_mark(&announcement_name(id)?, &stored, PutMode::Replace).await.map(drop)
    }

    /// Says that an operation has ended.
    pub(crate) async fn conclude(&self, id: &SnapshotId) -> Result<()> {
        self.archive().delete(&announcement_name(id)?).await
    }

    /// Announces that snapshots are read while `work` is done. The work must look whether its snapshots are there, and read the index.
    ///
    /// Whoever may not write to the archive reads all the same, and fails if a prune removes the snapshot meanwhile.
    pub(crate) async fn while_reading<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        // The futures of whole operations are large, and would lie on the stack once for each caller.
        let work = Box::pin(work);
        // Nothing can be removed of what is not there yet, and the first object of a repository is its config.
        if self.is_unmade().await {
            return work.await;
        }
        let announcement = match Announcement::begin(self, DateTime::now(), Purpose::Reading).await {
            Ok(announcement) => Some(announcement),
            Err(error) => {
                tracing::warn!(error = %error.report(), "prunes cannot be told that a snapshot is being read");
                None
            }
        };
        let result = work.await;
        if let Some(announcement) = announcement {
            announcement.end().await;
        }
        result
    }
}

/// An operation that is under way. Gives signs of life until it is dropped.
#[derive(Debug)]
struct Announcement {
    repository: Repository,
    id: SnapshotId,
    beating: JoinHandle<()>,
}

impl Announcement {
    async fn begin(repository: &Repository, started: DateTime, purpose: Purpose) -> Result<Self> {
        let id = SnapshotId::generate(started)?;
        repository.announce(&id, started, 0, purpose).await?;
        let beating = tokio::spawn(beat(repository.clone(), id.clone(), started, purpose));
        Ok(Self { repository: repository.clone(), id, beating })
    }

    /// Takes the announcement back.
    async fn end(self) {
        self.beating.abort();
        if let Err(error) = self.repository.conclude(&self.id).await {
            tracing::warn!(error = %error.report(), "an announcement could not be removed; a prune will");
        }
    }
}

async fn beat(repository: Repository, id: SnapshotId, started: DateTime, purpose: Purpose) {
    for beat in 1.. {
        tokio::time::sleep(BEAT).await;
        if let Err(error) = repository.announce(&id, started, beat, purpose).await {
            // A few that are missed do no harm, and without any the operation fails in the end and says why.
            tracing::warn!(error = %error.report(), "a sign of life could not be given");
        }
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        self.beating.abort();
    }
}

/// A backup that is under way.
#[derive(Debug)]
pub(crate) struct Session {
    announcement: Announcement,
    /// Whether the manifest is, or may be, on its way into the archive.
    publishing: AtomicBool,
}

impl Session {
    /// Announces a backup. The index must be read after this, or found to be what was read before.
    pub(crate) async fn begin(repository: &Repository, started: DateTime) -> Result<Self> {
        let announcement = Announcement::begin(repository, started, Purpose::Backup).await?;
        let session = Self { announcement, publishing: AtomicBool::new(false) };
        if let Some((_, error)) = repository.read_condemned().await?.damaged.pop() {
            session.end(true).await;
            return Err(error.wrap(
                "what a prune has left for others is damaged, so nothing can be stored safely: delete the object named, and prune again",
            ));
        }
        Ok(session)
    }

    /// The id under which the snapshot will be published.
    pub(crate) fn snapshot(&self) -> &SnapshotId {
        &self.announcement.id
    }

    /// Publishes the snapshot.
    pub(crate) async fn publish(&self, manifest: &SnapshotManifest) -> Result<()> {
        self.publishing.store(true, SeqCst);
        self.announcement.repository.publish(manifest).await
    }

    /// Takes the announcement back.
    pub(crate) async fn end(self, failed: bool) {
        if failed && self.publishing.load(SeqCst) {
            // It must not appear later, by a request that is still on its way, when nobody minds what it needs any more.
            if let Err(error) = self.announcement.repository.revoke(self.snapshot()).await {
                tracing::warn!(error = %error.report(), "the backup could not be revoked, so its announcement stays; a prune will remove it");
                return;
            }
        }
        self.announcement.end().await;
    }
}

fn announcement_name(id: &SnapshotId) -> Result<ObjectName> {
    ObjectName::new(format!("{ANNOUNCEMENTS}{id}"))
}

/// The parser of announcements, for the fuzz target.
#[cfg(fuzzing)]
pub(crate) fn parse(bytes: &[u8]) {
    let _ = mongo_core::bson::deserialize_from_slice::<StoredAnnouncement>(bytes);
}

const ANNOUNCEMENTS: &str = "locks/";
const BEAT: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Key, MemoryArchive, repository::testing::Steps};

    #[tokio::test]
    async fn whatever_is_under_way_is_told_until_it_ends() {
        let repository = Repository::open_or_init(MemoryArchive::new(), Key::host([1; 32])).await.unwrap();
        assert!(repository.while_reading(repository.under_way()).await.unwrap().is_empty(), "there is nothing to read yet");
        let backup = Steps::begin(&repository, DateTime::now()).await.unwrap();
        let told = repository.while_reading(repository.under_way()).await.unwrap();
        let told: Vec<Purpose> = told.iter().map(|operation| operation.purpose).collect();
        assert!(told.len() == 2 && told.contains(&Purpose::Backup) && told.contains(&Purpose::Reading), "{told:?}");
        let told = repository.under_way().await.unwrap();
        assert_eq!((told.len(), &told[0].id), (1, &backup.id));
        backup.end().await.unwrap();
        assert!(repository.under_way().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn whoever_may_not_write_reads_all_the_same() {
        use crate::{FailingArchive, FailureMode};
        let inner = std::sync::Arc::new(MemoryArchive::new());
        let id = {
            let shared: std::sync::Arc<dyn crate::ArchiveSink> = std::sync::Arc::<MemoryArchive>::clone(&inner);
            let repository = Repository::open_or_init_shared(shared, Key::host([1; 32])).await.unwrap();
            crate::repository::testing::snapshot(&repository, DateTime::now(), &[(1, 1)].into()).await.unwrap()
        };
        let archive = FailingArchive::new(inner, 0, FailureMode::Before);
        let repository = Repository::open(archive, Key::host([1; 32])).await.unwrap();
        repository.while_reading(repository.still_there(&id)).await.unwrap();
    }
}
