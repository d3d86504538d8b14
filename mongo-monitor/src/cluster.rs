//! Several deployments that are shards of one whole.

use serde::Serialize;

use crate::{
    Monitor,
    monitor::{MemberView, View},
};

/// How deployments fare that together hold one whole, as those of `mongo-shard` do. Plain data.
///
/// ```no_run
/// # fn f(monitors: Vec<(String, mongo_monitor::Monitor)>) {
/// use mongo_monitor::ClusterView;
///
/// let cluster = ClusterView::of(monitors.iter().map(|(name, monitor)| (name.as_str(), monitor)));
/// println!("{:.0} % of the shards take writes", cluster.shard_health_ratio * 100.0);
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ClusterView {
    /// The shards, in the order in which they were given.
    pub shards: Vec<ShardView>,
    /// Which share of all members of all shards answers; 0 to 1, and 0 without any.
    pub replica_health_ratio: f64,
    /// Which share of the shards takes writes; 0 to 1, and 0 without any.
    pub shard_health_ratio: f64,
}

/// How a shard fares.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ShardView {
    /// Its name, as it was given.
    pub name: String,
    /// Who takes its writes.
    pub primary: Option<String>,
    /// How many members it has.
    pub members: usize,
    /// How many of them answer.
    pub members_up: usize,
    /// How many documents it holds, the server's own left out; by the member that has the most of them, and none before that was counted.
    pub documents: Option<f64>,
}

impl ClusterView {
    /// What the monitors of the shards have read last. Asks nobody.
    pub fn of<'a>(shards: impl IntoIterator<Item = (&'a str, &'a Monitor)>) -> Self {
        Self::of_views(shards.into_iter().map(|(name, monitor)| (name, monitor.view())))
    }

    fn of_views<'a>(shards: impl Iterator<Item = (&'a str, View)>) -> Self {
        let shards: Vec<ShardView> = shards
            .map(|(name, view)| ShardView {
                name: name.to_owned(),
                primary: view.primary().map(|member| member.host.clone()),
                members: view.members.len(),
                members_up: view.members.iter().filter(|member| member.is_up()).count(),
                documents: view.members.iter().filter_map(documents).reduce(f64::max),
            })
            .collect();
        let (all, up) = shards.iter().fold((0, 0), |(all, up), shard| (all + shard.members, up + shard.members_up));
        let well = shards.iter().filter(|shard| shard.primary.is_some()).count();
        Self { replica_health_ratio: ratio(up, all), shard_health_ratio: ratio(well, shards.len()), shards }
    }
}

fn documents(member: &MemberView) -> Option<f64> {
    member.number("mongodb_stored_documents", &[])
}

#[expect(clippy::cast_precision_loss, reason = "counts of members and shards")]
fn ratio(part: usize, all: usize) -> f64 {
    if all == 0 { 0.0 } else { part as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use mongo_core::bson::DateTime;

    use super::*;
    use crate::reading::reading;

    fn member(host: &str, state: Option<&str>, documents: f64) -> MemberView {
        let is_primary = state == Some("PRIMARY");
        let up = reading("mongodb_up", &[], f64::from(u8::from(state.is_some())));
        let state = state.and_then(|state| reading("mongodb_member_state", &[state], 1.0));
        let readings = up.into_iter().chain(state).chain(reading("mongodb_stored_documents", &[], documents)).collect();
        MemberView {
            host: host.to_owned(),
            takes_writes: is_primary,
            collectors: Vec::new(),
            readings,
            slow_operations: Vec::new(),
        }
    }

    fn view(members: Vec<MemberView>) -> View {
        View { at: DateTime::from_millis(0), members, client: Vec::new() }
    }

    #[test]
    fn a_shard_is_well_that_takes_writes_and_its_members_count_each() {
        let well = view(vec![member("a:1", Some("PRIMARY"), 10.0), member("a:2", Some("SECONDARY"), 9.0)]);
        let not = view(vec![member("b:1", Some("SECONDARY"), 5.0), member("b:2", None, 0.0)]);
        let cluster = ClusterView::of_views([("a", well), ("b", not)].into_iter());
        assert_eq!((cluster.replica_health_ratio, cluster.shard_health_ratio), (0.75, 0.5));
        assert_eq!(cluster.shards[0].primary.as_deref(), Some("a:1"));
        let documents: Vec<_> = cluster.shards.iter().map(|shard| shard.documents).collect();
        assert_eq!(documents, [Some(10.0), Some(5.0)]);
        assert_eq!(ClusterView::of_views(std::iter::empty()).shard_health_ratio, 0.0);
    }
}
