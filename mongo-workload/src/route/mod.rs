//! Which member a read goes to.
//!
//! The driver knows of a secondary's lag only by heartbeats of ten seconds and takes no limit below ninety. A [`ReadRouter`] asks the members itself, every second, and knows how far each
//! has come.

pub(crate) mod member;
#[cfg(test)]
mod tests;
mod token;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mongo_core::{
    CancellationToken, CircuitBreaker, Deployment, Error, ErrorKind, Result,
    breaker::{BreakerPermit, BreakerSettings},
    bson::Timestamp,
    mongodb::options::SelectionCriteria,
};
use tokio::time::{Instant, sleep};

pub use self::{
    member::{MemberRole, MemberState},
    token::ReadToken,
};

/// Whom to ask, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Tier {
    /// Any member.
    Any,
    /// The primary.
    Primary,
    /// A secondary.
    Secondaries,
}

/// Where a read may go: a value in the call, so that nobody's reads go anywhere because of what somebody else has set.
///
/// ```
/// use std::time::Duration;
/// use mongo_workload::{ReadRoute, ReadToken};
///
/// # fn example(token: &ReadToken) {
/// // A secondary that is not more than five seconds behind and has what this user has seen; if there is none, the primary.
/// let route = ReadRoute::secondary_preferred().max_lag(Duration::from_secs(5)).after(token, "shop");
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct ReadRoute {
    chain: Vec<Tier>,
    max_lag: Option<Duration>,
    not_before: Option<Timestamp>,
}

impl ReadRoute {
    /// These, one after the other: the next is asked where the one before has nobody who is fit, or fails. In a transaction read from the primary.
    pub fn chain(tiers: impl IntoIterator<Item = Tier>) -> Self {
        Self { chain: tiers.into_iter().collect(), max_lag: None, not_before: None }
    }

    /// The primary or nobody.
    pub fn primary() -> Self {
        Self::chain([Tier::Primary])
    }

    /// A secondary or nobody: never a burden to the primary.
    pub fn secondary() -> Self {
        Self::chain([Tier::Secondaries])
    }

    /// A secondary, or else the primary.
    pub fn secondary_preferred() -> Self {
        Self::chain([Tier::Secondaries, Tier::Primary])
    }

    /// Only members that are not further behind than this, in whole seconds: a server keeps its last write to the second, so less than two are of little use.
    pub fn max_lag(mut self, lag: Duration) -> Self {
        self.max_lag = Some(lag);
        self
    }

    /// Only members that have what the bearer of a token has seen of the deployment of this name. A primary always has. What a primary had acknowledged without a majority and lost by an election is
    /// not there again, whatever the token says.
    pub fn after(mut self, token: &ReadToken, deployment: &str) -> Self {
        self.not_before = self.not_before.max(token.seen(deployment));
        self
    }
}

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

/// The members that are known, and who of them is next.
#[derive(Debug)]
struct Members {
    settings: RouterSettings,
    by_address: Mutex<BTreeMap<String, Known>>,
}

/// A member, and how it has served.
#[derive(Debug)]
struct Known {
    state: MemberState,
    selection: SelectionCriteria,
    breaker: CircuitBreaker,
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
        let router = Self(Arc::new(Inner { deployment: deployment.clone(), members: Members::new(settings) }));
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
    /// # Errors
    /// `Unavailable` if nobody is fit; what the last of them said; and at once whatever is not about a member.
    ///
    /// # Cancel safety
    /// Dropping the future drops the work.
    pub async fn read<T, F, Fut>(&self, route: &ReadRoute, work: F) -> Result<T>
    where
        F: Fn(Target) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        self.0.members.read(route, work).await
    }
}

struct Chosen {
    target: Target,
    permit: BreakerPermit,
}

impl Members {
    fn new(settings: RouterSettings) -> Self {
        Self { settings, by_address: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.by_address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read<T, F, Fut>(&self, route: &ReadRoute, work: F) -> Result<T>
    where
        F: Fn(Target) -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let mut tried: Vec<String> = Vec::new();
        let mut last: Option<Error> = None;
        loop {
            let Chosen { target, permit } = match (self.choose(route, &tried), last) {
                (Ok(chosen), _) => chosen,
                (Err(nobody), None) => return Err(nobody),
                (Err(_), Some(last)) => return Err(last),
            };
            let address = target.address.clone();
            match work(target).await {
                Ok(value) => {
                    permit.succeeded();
                    return Ok(value);
                }
                Err(error) if error.kind() == ErrorKind::Unavailable => {
                    permit.failed();
                    last = Some(error.with_context("member", &address));
                    tried.push(address);
                }
                Err(error) => {
                    // The next would not do it in less time. A member that says itself that the time was up has answered; one that says nothing has not.
                    match error.kind() {
                        ErrorKind::Cancelled => drop(permit),
                        ErrorKind::Timeout if error.server_code().is_none() => permit.failed(),
                        _ => permit.succeeded(),
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Takes over what members have said. Who has not answered is known as before, for as long as that is believed; who does not belong to the set any more is forgotten then.
    fn learn(&self, states: Vec<MemberState>) -> Result<()> {
        let mut members = self.lock();
        for state in states {
            match members.get_mut(&state.address) {
                Some(known) => known.state = state,
                None => {
                    let selection = member::only(&state.address)?;
                    let breaker = CircuitBreaker::new(self.settings.breaker.clone());
                    members.insert(state.address.clone(), Known { state, selection, breaker });
                }
            }
        }
        members.retain(|_, known| known.state.seen.elapsed() < self.settings.believe_for.saturating_mul(FORGOTTEN_AFTER));
        Ok(())
    }

    fn choose(&self, route: &ReadRoute, tried: &[String]) -> Result<Chosen> {
        let members = self.lock();
        let now = Instant::now();
        for tier in &route.chain {
            let mut fit: Vec<(&Known, u32)> = members
                .values()
                .filter(|known| !tried.contains(&known.state.address) && self.is_fit(&known.state, *tier, route, now))
                .map(|known| (known, self.settings.weights.get(&known.state.address).copied().unwrap_or(1)))
                .filter(|(_, weight)| *weight > 0)
                .collect();
            while let Some(position) = by_weight(&fit) {
                let (known, _) = fit.swap_remove(position);
                // Whoever has failed too often is passed over.
                if let Ok(permit) = known.breaker.acquire() {
                    let MemberState { address, role, .. } = known.state.clone();
                    return Ok(Chosen { target: Target { address, role, selection: known.selection.clone() }, permit });
                }
            }
        }
        let tiers: Vec<String> = route.chain.iter().map(|tier| format!("{tier:?}").to_lowercase()).collect();
        Err(Error::new(ErrorKind::Unavailable, "no member is fit for this read: allow others, or more lag")
            .with_context("asked for", tiers.join(", then "))
            .with_context("known", members.len())
            .with_context("tried", tried.len()))
    }

    fn is_fit(&self, state: &MemberState, tier: Tier, route: &ReadRoute, now: Instant) -> bool {
        let age = now.saturating_duration_since(state.seen);
        let role = match tier {
            Tier::Any => true,
            Tier::Primary => state.role == MemberRole::Primary,
            Tier::Secondaries => state.role == MemberRole::Secondary,
        };
        let is_primary = state.role == MemberRole::Primary;
        role && age < self.settings.believe_for
            // It may have fallen behind by as much since it was asked.
            && (is_primary || route.max_lag.is_none_or(|most| state.lag + age <= most))
            && (is_primary || route.not_before.is_none_or(|at| state.applied >= at))
    }
}

/// The position of one of them, at random by their weights.
fn by_weight(members: &[(&Known, u32)]) -> Option<usize> {
    let total: u64 = members.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let mut pick = fastrand::u64(0..total.max(1));
    members.iter().position(|(_, weight)| match pick.checked_sub(u64::from(*weight)) {
        Some(left) => {
            pick = left;
            false
        }
        None => true,
    })
}

/// So many times as long as it is believed it is kept, so that how a member has served is not forgotten by a short absence.
const FORGOTTEN_AFTER: u32 = 12;
