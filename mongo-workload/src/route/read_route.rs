//! What a read demands of the member that it goes to.

use std::time::Duration;

use mongo_core::bson::Timestamp;

use super::token::ReadToken;

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
    pub(super) chain: Vec<Tier>,
    pub(super) max_lag: Option<Duration>,
    pub(super) not_before: Option<Timestamp>,
    /// What it is like, if it is hedged.
    pub(super) hedged: Option<String>,
}

impl ReadRoute {
    /// These, one after the other: the next is asked where the one before has nobody who is fit, or fails. In a transaction read from the primary.
    pub fn chain(tiers: impl IntoIterator<Item = Tier>) -> Self {
        Self { chain: tiers.into_iter().collect(), max_lag: None, not_before: None, hedged: None }
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

    /// Asks a second member where the first takes longer than 95 of a hundred reads of this shape took lately, and takes what comes first.
    ///
    /// The second is a secondary that is fit for the route like the first; a read that is for the primary is not hedged. No more than a twentieth of the reads are asked of a second member, and ten
    /// more after a quiet time, so that hedging adds little to an overload. A shape is any name for reads that take alike, as for [`Submission::shape`](crate::Submission::shape); the first 32 of a shape are not
    /// hedged, and shapes beyond a thousand are taken for alike. If a manager runs the read, both have the one slot.
    ///
    /// What loses costs a connection, which is closed with it; and where all connections of the client to a member are taken, it is the driver's queue that is waited in: see the end of the crate's docs.
    ///
    /// ```
    /// use mongo_workload::ReadRoute;
    ///
    /// let route = ReadRoute::secondary_preferred().hedged("find orders by customer");
    /// ```
    pub fn hedged(mut self, shape: impl Into<String>) -> Self {
        self.hedged = Some(shape.into());
        self
    }
}
