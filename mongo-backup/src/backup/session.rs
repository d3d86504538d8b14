//! A backup's announcement: prunes delete nothing that a backup which is under way may rely on.

use std::{
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::Duration,
};

use mongo_core::{Error, Result, bson::DateTime};
use tokio::task::JoinHandle;

use crate::repository::{
    Repository,
    manifest::{SnapshotId, SnapshotManifest},
};

/// A backup that is under way. Gives signs of life until it is dropped.
#[derive(Debug)]
pub(crate) struct Session {
    repository: Repository,
    snapshot: SnapshotId,
    beating: JoinHandle<()>,
    /// Whether the manifest is, or may be, on its way into the archive.
    publishing: AtomicBool,
}

impl Session {
    /// Announces a backup. The index must be read after this.
    pub(crate) async fn begin(repository: &Repository, started: DateTime) -> Result<Self> {
        let snapshot = SnapshotId::generate(started)?;
        repository.announce(&snapshot, started, 0).await?;
        let (beating, id) = (repository.clone(), snapshot.clone());
        let beating = tokio::spawn(async move {
            for beat in 1.. {
                tokio::time::sleep(BEAT).await;
                if let Err(error) = beating.announce(&id, started, beat).await {
                    // A few that are missed do no harm, and without any the backup fails in the end and says why.
                    tracing::warn!(error = %error.report(), "a sign of life could not be given");
                }
            }
        });
        let session = Self { repository: repository.clone(), snapshot, beating, publishing: AtomicBool::new(false) };
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
        &self.snapshot
    }

    /// Publishes the snapshot.
    pub(crate) async fn publish(&self, manifest: &SnapshotManifest) -> Result<()> {
        self.publishing.store(true, SeqCst);
        self.repository.publish(manifest).await
    }

    /// Takes the announcement back.
    pub(crate) async fn end(self, failed: bool) {
        self.beating.abort();
        let may_be_published = failed && self.publishing.load(SeqCst);
        let concluded: Result<(), Error> = async {
            if may_be_published {
                // It must not appear later, by a request that is still on its way, when nobody minds what it needs any more.
                self.repository.revoke(&self.snapshot).await?;
            }
            self.repository.conclude(&self.snapshot).await
        }
        .await;
        if let Err(error) = concluded {
            tracing::warn!(error = %error.report(), "the announcement of the backup could not be removed; a prune will");
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.beating.abort();
    }
}

const BEAT: Duration = Duration::from_secs(300);
