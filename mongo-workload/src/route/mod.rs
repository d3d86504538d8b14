//! Which member a read goes to.
//!
//! The driver knows of a secondary's lag only by heartbeats of ten seconds and takes no limit below ninety. A [`ReadRouter`] asks the members itself, every second, and knows how far each
//! has come. What a read demands is a [`ReadRoute`]; [`members`] chooses, and [`read`] reads from who was chosen and sees what came of it.

mod hedge;
pub(crate) mod member;
mod members;
mod read;
mod read_route;
#[cfg(test)]
mod tests;
mod token;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mongo_core::{
    CancellationToken, Deployment, Result,
    breaker::BreakerSettings,
    metrics::{MetricsSink, NoMetrics},
    mongodb::options::SelectionCriteria,
};
use tokio::time::sleep;

use self::members::Members;
pub use self::{
    member::{MemberRole, MemberState},
    read_route::{ReadRoute, Tier},
    token::ReadToken,
};

/// How a router works.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RouterSettings {
    /// How often the members are asked. Default 1 s.
    pub ask_every: Duration,
    /// How long each has for its answer. Default 500 ms. One that hangs delays by so much what is learned of the others.
    pub answer_within: Duration,
    /// What is older than this is not believed. Default 5 s.
    pub believe_for: Duration,
    /// How much of the reads a member gets against the others that are fit, by its address; 0 for none. Default 1 each.
    pub weights: BTreeMap<String, u32>,
    /// When a member that fails is no longer asked, and for how long.
    pub breaker: BreakerSettings,
}

impl Default for RouterSettings {
    fn default() -> Self {
        let second = Duration::from_secs(1);
        Self {
            ask_every: second,
            answer_within: second / 2,
            believe_for: second * 5,
            weights: BTreeMap::new(),
            breaker: BreakerSettings::default(),
        }
    }
}

impl RouterSettings {
    /// Sets how much of the reads a member gets.
    #[must_use]
    pub fn with_weight(mut self, address: impl Into<String>, weight: u32) -> Self {
        self.weights.insert(address.into(), weight);
        self
    }
}

/// Knows the members of a replica set, and chooses one for each read. Clones share it.
///
/// ```no_run
/// use mongo_core::{CancellationToken, Deployment, bson::{Document, doc}};
/// use mongo_workload::{ReadRoute, ReadRouter, RouterSettings};
///
/// # async fn example(deployment: Deployment) -> mongo_core::Result<()> {
/// let router = ReadRouter::open(&deployment, RouterSettings::default()).await?;
/// // Asks the members every second, until it is cancelled.
/// let stop = CancellationToken::new();
/// tokio::spawn({
///     let (router, stop) = (router.clone(), stop.clone());
///     async move { router.watch(&stop).await }
/// });
///
/// let orders = deployment.database("shop").collection::<Document>("orders");
/// let open = router
///     .read(&ReadRoute::secondary_preferred(), |target| {
///         let find = orders.count_documents(doc! { "status": "open" }).selection_criteria(target.selection);
///         async move { Ok(find.await?) }
///     })
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct ReadRouter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    deployment: Deployment,
    members: Members,
}

/// The member that was chosen.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Target {
    /// Its address.
    pub address: String,
    /// What it does.
    pub role: MemberRole,
    /// For the operation: `find(…).selection_criteria(…)`.
    pub selection: SelectionCriteria,
}

impl ReadRouter {
    /// Asks the members for the first time.
    ///
    /// # Errors
    /// `Unsupported` for what is no replica set; that nobody answers.
    pub async fn open(deployment: &Deployment, settings: RouterSettings) -> Result<Self> {
        Self::open_with_metrics(deployment, settings, &NoMetrics).await
    }

    /// As [`open`](Self::open), and tells `metrics` of the reads: how they ended (`mongo_workload_routed_total` by `outcome`), how often one went on to the next member
    /// (`mongo_workload_rerouted_total`), and of reads that a second member was asked for whether it was the one that served (`mongo_workload_hedges_total` by `outcome`).
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_with_metrics(deployment: &Deployment, settings: RouterSettings, metrics: &dyn MetricsSink) -> Result<Self> {
        let router = Self(Arc::new(Inner { deployment: deployment.clone(), members: Members::new(settings, metrics) }));
        router.ask().await?;
        Ok(router)
    }

    /// Asks the members once. Needs no privilege.
    ///
    /// # Errors
    /// As [`open`](Self::open). What was known stays, and is not believed for ever.
    ///
    /// # Cancel safety
    /// If the future is dropped, nothing changes.
    pub async fn ask(&self) -> Result<()> {
        let known = self.0.members.lock().keys().cloned().collect();
        let states = member::ask_all(self.0.deployment.client(), known, self.0.members.settings.answer_within).await?;
        self.0.members.learn(states)
    }

    /// Asks the members again and again, until it is cancelled.
    pub async fn watch(&self, cancel: &CancellationToken) {
        let again = async {
            loop {
                sleep(self.0.members.settings.ask_every).await;
                if let Err(error) = self.ask().await {
                    tracing::debug!(kind = ?error.kind(), "no member could be asked how far it is");
                }
            }
        };
        tokio::select! {
            () = cancel.cancelled() => {}
            () = again => {}
        }
    }

    /// The members that have answered, by their addresses.
    pub fn members(&self) -> Vec<MemberState> {
        self.0.members.lock().values().map(|known| known.state.clone()).collect()
    }

    /// Chooses a member, for a read that the host does itself. How it goes is not told then: [`read`](Self::read) also learns who fails.
    ///
    /// # Errors
    /// `Unavailable` if nobody is fit; it says why.
    pub fn choose(&self, route: &ReadRoute) -> Result<Target> {
        Ok(self.0.members.choose(route, &[])?.target)
    }

    /// Reads from the member that is chosen, and where that one cannot be reached or is overloaded from the next, each at most once. So the work must be one that only reads.
    ///
    /// Who goes on because a member is overloaded pays for that from a [`RetryBudget`](mongo_core::RetryBudget) of the router, a fifth of all reads: an overload is not passed on as a multiple of itself. The driver
    /// has tried each member once more by then, as its own settings say.
    ///
    /// A [hedged](ReadRoute::hedged) read may be under way on two members at once. The one that is not needed any more is dropped, and with it its connection: the server ends a `find`, `aggregate`, `count` or
    /// `distinct` whose client has gone.
    ///
    /// # Errors
    /// `Unavailable` if nobody is fit; what the last of them said; and at once whatever is not about a member.
    ///
    /// # Cancel safety
    /// Dropping the future drops the work.
    pub async fn read<T, F, Fut>(&self, route: &ReadRoute, work: F) -> Result<T>
    where
        F: Fn(Target) -> Fut + Send + Sync,
        Fut: Future<Output = Result<T>> + Send,
        T: Send,
    {
        self.0.members.read(route, work).await
    }
}
