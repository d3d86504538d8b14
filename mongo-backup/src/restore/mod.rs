//! Bringing a snapshot back: plan, inspect, run, report.

mod capped;
mod checkpoint;
mod documents;
mod ids;
mod mirror;
mod plan;
mod references;
mod replay;
mod report;
mod run;
mod settings;
mod tally;
mod transaction;
mod users;

use std::sync::Arc;

use mongo_core::{
    CancellationToken, Deployment, Result, gate::Background, mongodb::options::WriteConcern, progress::ProgressSink,
    state::StateStore, transform::Transform,
};

use self::ids::DocumentChoice;
pub(crate) use self::users::is_authorization;
pub use self::{
    ids::{DocumentFilter, IdRange},
    plan::{PlannedNamespace, RestoreAction, RestoreItem, RestorePlan, RestoreSummary},
    report::{DefinitionFailure, RefusedDocument, RestoreReport, UsersAndRoles},
    settings::{DropExisting, RestoreBuilder, RestoreMode, RestoreSettings},
};
use crate::{
    metrics::RestoreMetrics,
    repository::{Repository, SnapshotChoice},
};

/// A restore of a snapshot into a deployment.
///
/// ```no_run
/// # async fn f(repository: mongo_backup::Repository, other: mongo_core::Deployment) -> mongo_backup::Result<()> {
/// use mongo_backup::{Restore, SnapshotChoice};
///
/// let report = Restore::builder(&repository, SnapshotChoice::Latest)
///     .into(&other)
///     .namespaces("shop.*")
///     .rename("shop.*", "shop_copy.*")
///     .build()?
///     .run()
///     .await?;
/// assert!(report.is_complete());
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Restore {
    repository: Repository,
    snapshot: SnapshotChoice,
    target: Deployment,
    settings: RestoreSettings,
    choice: DocumentChoice,
    transforms: Vec<Arc<dyn Transform>>,
    write_concern: WriteConcern,
    checkpoints: Option<Arc<dyn StateStore>>,
    anew: bool,
    progress: Arc<dyn ProgressSink>,
    metrics: RestoreMetrics,
    cancel: CancellationToken,
    background: Background,
}

impl Restore {
    /// Prepares a restore of everything in a snapshot.
    pub fn builder(repository: &Repository, snapshot: impl Into<SnapshotChoice>) -> RestoreBuilder {
        RestoreBuilder::new(repository.clone(), snapshot.into())
    }

    /// [`plan`](Self::plan) and [`RestorePlan::execute`] in one.
    ///
    /// # Errors
    /// As those.
    ///
    /// # Cancel safety
    /// As [`RestorePlan::execute`].
    pub async fn run(&self) -> Result<RestoreReport> {
        self.plan().await?.execute().await
    }
}
