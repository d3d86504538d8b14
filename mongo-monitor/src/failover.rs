//! Failovers: what happened to the members of a deployment, and for how long nobody took writes.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    time::Duration,
};

use mongo_core::bson::DateTime;
use serde::Serialize;

/// Something that happened to a deployment, as a driver's [topology events](crate::ClientWatch) show it.
///
/// The times are those at which the driver noticed: at once where a connection broke or a member told it, else with the next heartbeat (every ten seconds, if the client's
/// options do not say otherwise) and after its timeout.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct FailoverEvent {
    /// When it was noticed.
    pub at: DateTime,
    /// What happened.
    pub kind: FailoverKind,
    /// The member that it is about, and for [`NewPrimary`](FailoverKind::NewPrimary) the new one.
    pub server: Option<String>,
    /// For how long it was so, in seconds, of what is over: of [`ServerUp`](FailoverKind::ServerUp) how long the member was down, of
    /// [`NewPrimary`](FailoverKind::NewPrimary) and [`WritableServer`](FailoverKind::WritableServer) how long nobody took writes.
    pub down_seconds: Option<f64>,
    /// A sentence for a person.
    pub summary: String,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailoverKind {
    /// A member does no longer answer, or did not when it was first tried.
    ServerDown,
    /// A member that was down answers again.
    ServerUp,
    /// A replica set has no primary: nobody takes its writes.
    NoPrimary,
    /// A replica set has another primary than before, or one again.
    NewPrimary,
    /// Of what is no replica set, nobody answers who takes writes.
    NoWritableServer,
    /// Somebody takes them again.
    WritableServer,
    /// A member went down for the third time in ten minutes. Told once in as long.
    Flapping,
    /// So many members of a set are down that it loses its primary with the next one. Members without a vote are counted as if they had one, as drivers do not learn who has.
    MajorityAtRisk,
}

impl FailoverKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::ServerDown => "server_down",
            Self::ServerUp => "server_up",
            Self::NoPrimary => "no_primary",
            Self::NewPrimary => "new_primary",
            Self::NoWritableServer => "no_writable_server",
            Self::WritableServer => "writable_server",
            Self::Flapping => "flapping",
            Self::MajorityAtRisk => "majority_at_risk",
        }
    }
}

impl fmt::Display for FailoverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Is told of failovers as they are noticed.
///
/// Called by the driver's own tasks: what takes long belongs into a task of its own.
pub trait FailoverSink: fmt::Debug + Send + Sync + 'static {
    /// Takes one.
    fn tell_failover(&self, event: &FailoverEvent);
}

/// What a member is to a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// It has not answered yet, or what it is is about to be asked.
    Unknown,
    /// It does not answer.
    Down,
    Primary,
    /// A secondary, an arbiter, or another member of a set.
    Member,
    /// One that takes writes without being of a set: a server by itself, a router, a load balancer.
    Writable,
}

/// A deployment, as a driver sees it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) is_set: bool,
    pub(crate) servers: BTreeMap<String, Role>,
}

/// The time by both hands: milliseconds since some moment, and the wall clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) at: Duration,
    pub(crate) wall: DateTime,
}

/// What happens, by what is seen.
#[derive(Debug, Default)]
pub(crate) struct Failovers {
    servers: BTreeMap<String, Server>,
    primary: Option<String>,
    /// Since when nobody takes writes.
    without: Option<Duration>,
    is_at_risk: bool,
    /// How often a primary was found that was not the last, and how long there was none.
    pub(crate) found: u64,
    pub(crate) without_primary: Duration,
}

#[derive(Debug, Default)]
struct Server {
    down_since: Option<Duration>,
    falls: VecDeque<Duration>,
    told_flapping: Option<Duration>,
}

impl Failovers {
    /// What has happened since the last time.
    pub(crate) fn look(&mut self, now: Moment, seen: &Seen) -> Vec<FailoverEvent> {
        let mut events = Vec::new();
        // A client that ends forgets everybody first.
        if seen.servers.is_empty() {
            return events;
        }
        let mut tell = |kind: FailoverKind, server: Option<&str>, down: Option<Duration>, summary: String| {
            let down_seconds = down.map(|down| down.as_secs_f64());
            events.push(FailoverEvent { at: now.wall, kind, server: server.map(str::to_owned), down_seconds, summary });
        };
        // Who was taken out of the set is not down.
        self.servers.retain(|host, _| seen.servers.contains_key(host));
        for (host, role) in &seen.servers {
            let server = self.servers.entry(host.clone()).or_default();
            match (role, server.down_since) {
                (Role::Unknown, _) | (Role::Down, Some(_)) => {}
                (Role::Down, None) => {
                    server.down_since = Some(now.at);
                    tell(FailoverKind::ServerDown, Some(host), None, format!("{host} does not answer"));
                    server.falls.push_back(now.at);
                    server.falls.retain(|at| now.at.saturating_sub(*at) <= FLAPPING_WITHIN);
                    let was_told = server.told_flapping.is_some_and(|told| now.at.saturating_sub(told) <= FLAPPING_WITHIN);
                    if server.falls.len() >= FLAPPING_FALLS && !was_told {
                        server.told_flapping = Some(now.at);
                        let times = server.falls.len();
                        let summary = format!("{host} went down {times} times in ten minutes: look at its network");
                        tell(FailoverKind::Flapping, Some(host), None, summary);
                    }
                }
                (_, Some(since)) => {
                    server.down_since = None;
                    let down = now.at.saturating_sub(since);
                    tell(FailoverKind::ServerUp, Some(host), Some(down), format!("{host} answers again after {}", Seconds(down)));
                }
                (_, None) => {}
            }
        }
        let writable = seen.servers.iter().find(|(_, role)| matches!(role, Role::Primary | Role::Writable));
        match (writable, self.without) {
            (Some((host, _)), without) => {
                let (is_other, down) = (self.primary.as_ref() != Some(host), without.map(|since| now.at.saturating_sub(since)));
                let known = self.primary.is_some() || without.is_some();
                let after = down.map(|down| format!(", after {} without one", Seconds(down))).unwrap_or_default();
                match (seen.is_set, down) {
                    (true, _) if known && (is_other || down.is_some()) => {
                        self.found += u64::from(is_other && self.primary.is_some());
                        self.without_primary += down.unwrap_or_default();
                        let down = down.or(Some(Duration::ZERO));
                        tell(FailoverKind::NewPrimary, Some(host), down, format!("{host} is primary{after}"));
                    }
                    (false, Some(down)) => {
                        let summary = format!("{host} takes writes again after {}", Seconds(down));
                        tell(FailoverKind::WritableServer, Some(host), Some(down), summary);
                    }
                    _ => {}
                }
                self.primary = Some(host.clone());
                self.without = None;
            }
            // Before all have been asked for the first time nobody is missed.
            (None, None) if self.primary.is_some() || seen.servers.values().all(|role| *role != Role::Unknown) => {
                self.without = Some(now.at);
                match seen.is_set {
                    true => tell(FailoverKind::NoPrimary, None, None, "there is no primary: nobody takes writes".to_owned()),
                    false => tell(FailoverKind::NoWritableServer, None, None, "nobody answers who takes writes".to_owned()),
                }
            }
            (None, _) => {}
        }
        let (all, down) = (seen.servers.len(), seen.servers.values().filter(|role| **role == Role::Down).count());
        let majority = all / 2 + 1;
        let is_at_risk = seen.is_set && down > 0 && all - down == majority;
        if is_at_risk && !self.is_at_risk {
            let summary = format!("{down} of {all} members are down: with the next one the set has no primary");
            tell(FailoverKind::MajorityAtRisk, None, None, summary);
        }
        self.is_at_risk = is_at_risk;
        events
    }
}

/// A duration for a person.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} s", self.0.as_secs_f64())
    }
}

const FLAPPING_FALLS: usize = 3;
const FLAPPING_WITHIN: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;

    fn set(servers: &[(&str, Role)]) -> Seen {
        Seen { is_set: true, servers: servers.iter().map(|(host, role)| ((*host).to_owned(), *role)).collect() }
    }

    fn round(failovers: &mut Failovers, seconds: u64, seen: &Seen) -> Vec<(FailoverKind, Option<String>, Option<f64>)> {
        let now = Moment { at: Duration::from_secs(seconds), wall: DateTime::from_millis(0) };
        failovers.look(now, seen).into_iter().map(|event| (event.kind, event.server, event.down_seconds)).collect()
    }

    fn of(host: &str) -> Option<String> {
        Some(host.to_owned())
    }

    use FailoverKind::*;
    use Role::{Down, Member, Primary, Unknown, Writable};

    #[test]
    fn a_primary_that_dies_is_told_with_the_time_until_another_takes_over() {
        let mut failovers = Failovers::default();
        assert_eq!(round(&mut failovers, 0, &set(&[("a", Unknown), ("b", Unknown), ("c", Unknown)])), []);
        assert_eq!(round(&mut failovers, 0, &set(&[("a", Unknown), ("b", Member), ("c", Unknown)])), []);
        assert_eq!(round(&mut failovers, 1, &set(&[("a", Primary), ("b", Member), ("c", Unknown)])), []);
        assert_eq!(round(&mut failovers, 2, &set(&[("a", Primary), ("b", Member), ("c", Member)])), []);
        let dead = round(&mut failovers, 10, &set(&[("a", Down), ("b", Member), ("c", Member)]));
        assert_eq!(dead, [(ServerDown, of("a"), None), (NoPrimary, None, None), (MajorityAtRisk, None, None)]);
        assert_eq!(round(&mut failovers, 12, &set(&[("a", Down), ("b", Member), ("c", Member)])), []);
        let elected = round(&mut failovers, 17, &set(&[("a", Down), ("b", Primary), ("c", Member)]));
        assert_eq!(elected, [(NewPrimary, of("b"), Some(7.0))]);
        assert_eq!((failovers.found, failovers.without_primary), (1, Duration::from_secs(7)));
        let back = round(&mut failovers, 40, &set(&[("a", Member), ("b", Primary), ("c", Member)]));
        assert_eq!(back, [(ServerUp, of("a"), Some(30.0))]);
        // The risk is over, and told again the next time.
        let again = round(&mut failovers, 50, &set(&[("a", Down), ("b", Primary), ("c", Member)]));
        assert_eq!(again, [(ServerDown, of("a"), None), (MajorityAtRisk, None, None)]);
    }

    #[test]
    fn a_primary_that_is_found_again_is_no_failover_but_was_missed() {
        let mut failovers = Failovers::default();
        round(&mut failovers, 0, &set(&[("a", Primary), ("b", Member)]));
        assert_eq!(round(&mut failovers, 5, &set(&[("a", Member), ("b", Member)])), [(NoPrimary, None, None)]);
        assert_eq!(round(&mut failovers, 8, &set(&[("a", Primary), ("b", Member)])), [(NewPrimary, of("a"), Some(3.0))]);
        assert_eq!((failovers.found, failovers.without_primary), (0, Duration::from_secs(3)));
        // From one to the other with nothing between.
        assert_eq!(round(&mut failovers, 9, &set(&[("a", Member), ("b", Primary)])), [(NewPrimary, of("b"), Some(0.0))]);
    }

    #[test]
    fn who_is_only_about_to_be_asked_is_not_down() {
        let mut failovers = Failovers::default();
        round(&mut failovers, 0, &set(&[("a", Primary), ("b", Member), ("c", Member)]));
        assert_eq!(round(&mut failovers, 1, &set(&[("a", Primary), ("b", Unknown), ("c", Member)])), []);
        // Nor who was taken out of the set.
        assert_eq!(round(&mut failovers, 2, &set(&[("a", Primary), ("c", Member)])), []);
    }

    #[test]
    fn who_goes_down_again_and_again_is_told_once_in_a_while() {
        let mut failovers = Failovers::default();
        let mut flaps = Vec::new();
        for minute in 0..30 {
            for (second, role) in [(0, Member), (30, Down)] {
                let events = round(&mut failovers, minute * 60 + second, &set(&[("a", Primary), ("b", role), ("c", Member)]));
                flaps.extend(events.iter().filter(|event| event.0 == Flapping).map(|_| minute));
            }
        }
        assert_eq!(flaps, [2, 13, 24]);
    }

    #[test]
    fn a_server_by_itself_is_missed_too() {
        let one = |role: Role| Seen { is_set: false, servers: BTreeMap::from([("a".to_owned(), role)]) };
        let mut failovers = Failovers::default();
        assert_eq!(round(&mut failovers, 0, &one(Writable)), []);
        assert_eq!(round(&mut failovers, 1, &one(Down)), [(ServerDown, of("a"), None), (NoWritableServer, None, None)]);
        let back = round(&mut failovers, 4, &one(Writable));
        assert_eq!(back, [(ServerUp, of("a"), Some(3.0)), (WritableServer, of("a"), Some(3.0))]);
        // And one that was never there.
        let mut failovers = Failovers::default();
        assert_eq!(round(&mut failovers, 0, &one(Down)), [(ServerDown, of("a"), None), (NoWritableServer, None, None)]);
    }
}
