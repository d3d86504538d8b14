//! What a replica set is made of, and which configurations a server accepts.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use mongodb::bson::Document;

use super::wire::{Dialect, integer};
use crate::error::{Error, ErrorKind, Result};

/// The configuration of a replica set.
///
/// Fields that this crate does not model are kept in `other` and sent back as they are, so changing a configuration
/// that a newer server wrote loses nothing.
///
/// ```
/// use mongo_core::replica_set::{Member, ReplicaSetConfig};
///
/// let config = ReplicaSetConfig::new("rs0")
///     .with_member(Member::new("a.example:27017"))
///     .with_member(Member::new("b.example:27017"))
///     .with_member(Member::new("c.example:27017").hidden());
/// config.validate()?;
/// assert_eq!(config.data_bearing_members(), 3);
/// # Ok::<(), mongo_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct ReplicaSetConfig {
    /// Name of the set: what its servers have been started with as `--replSet`.
    pub name: String,
    /// Counts the changes; 1 for a new set.
    pub version: i64,
    /// The members, at most 50.
    pub members: Vec<Member>,
    /// Settings of the set as a whole.
    pub settings: ReplicaSetSettings,
    /// Whether `w: "majority"` waits for the journal. Default true.
    pub majority_writes_are_journaled: bool,
    /// All other fields, such as `term`, `protocolVersion` and `configsvr`.
    pub other: Document,
}

/// One member of a replica set.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Member {
    /// Number of the member, 0 to 255, for life. `None` until the member is put into a configuration.
    pub id: Option<u8>,
    /// Host name and port under which the *other members and all clients* reach it. The port defaults to 27017.
    pub host: String,
    /// How much it wants to be primary, 0 to 1000; 0 never. Default 1.
    pub priority: f64,
    /// Votes in elections, 0 or 1; at most seven members vote. Default 1.
    pub votes: u8,
    /// Whether it only votes and holds no data. Default false.
    pub arbiter: bool,
    /// Whether clients do not see it. Default false.
    pub hidden: bool,
    /// Whether it builds indexes; cannot be changed later. Default true.
    pub build_indexes: bool,
    /// How far it stays behind the primary, in whole seconds, up to 366 days. Default 0.
    pub delay: Duration,
    /// Names for read preferences and custom write concerns.
    pub tags: BTreeMap<String, String>,
    /// All other fields, such as `horizons`.
    pub other: Document,
}

/// Settings of a replica set as a whole. What is `None` is the server's default.
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct ReplicaSetSettings {
    /// How long a primary may be silent before the others elect a new one. Server's default 10 s.
    pub election_timeout: Option<Duration>,
    /// Time between heartbeats. Server's default 2 s.
    pub heartbeat_interval: Option<Duration>,
    /// How long a member waits for a heartbeat, in whole seconds. Server's default 10 s.
    pub heartbeat_timeout: Option<Duration>,
    /// Whether secondaries may replicate from secondaries. Server's default true.
    pub chaining_allowed: Option<bool>,
    /// Custom write concerns: name → tag → how many different values of the tag must have acknowledged.
    pub write_concern_modes: BTreeMap<String, BTreeMap<String, u32>>,
    /// All other fields, such as `catchUpTimeoutMillis` and `replicaSetId`.
    pub other: Document,
}

const MAX_MEMBERS: usize = 50;
const MAX_VOTERS: usize = 7;
const MAX_PRIORITY: f64 = 1000.0;
const MAX_DELAY: Duration = Duration::from_secs(366 * 24 * 3600);
const DEFAULT_PORT: u16 = 27017;

impl ReplicaSetConfig {
    /// A configuration without members.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            version: 1,
            members: Vec::new(),
            settings: ReplicaSetSettings::default(),
            majority_writes_are_journaled: true,
            other: Document::new(),
        }
    }

    /// Adds a member, and gives it the lowest number that is free above all others when it has none.
    #[must_use]
    pub fn with_member(mut self, mut member: Member) -> Self {
        if member.id.is_none() {
            member.id = match self.members.iter().filter_map(|member| member.id).max() {
                None => Some(0),
                Some(highest) => highest.checked_add(1).or_else(|| self.free_id()),
            };
        }
        self.members.push(member);
        self
    }

    /// Sets the settings of the set as a whole.
    #[must_use]
    pub fn with_settings(mut self, settings: ReplicaSetSettings) -> Self {
        self.settings = settings;
        self
    }

    /// Takes the member with this host out. `host` may leave out the default port.
    #[must_use]
    pub fn without_member(mut self, host: &str) -> Self {
        let gone = address(host);
        self.members.retain(|member| address(&member.host) != gone);
        self
    }

    /// The member with this host, for a change. `host` may leave out the default port.
    pub fn member_mut(&mut self, host: &str) -> Option<&mut Member> {
        let wanted = address(host);
        self.members.iter_mut().find(|member| address(&member.host) == wanted)
    }

    /// Members that hold data: what `w: n` can count to.
    pub fn data_bearing_members(&self) -> usize {
        self.members.iter().filter(|member| !member.arbiter).count()
    }

    /// Members that vote, arbiters included: what a majority is of.
    pub fn voting_members(&self) -> usize {
        self.members.iter().filter(|member| member.votes > 0).count()
    }

    /// Checks the configuration by the rules of MongoDB's servers.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`], naming everything that is wrong.
    pub fn validate(&self) -> Result<()> {
        let mut wrong = Vec::new();
        if self.name.trim().is_empty() {
            wrong.push("the set needs a name".to_owned());
        }
        if !(1..=i64::from(i32::MAX)).contains(&self.version) {
            wrong.push(format!("version {} is not 1 to {}", self.version, i32::MAX));
        }
        if !(1..=MAX_MEMBERS).contains(&self.members.len()) {
            wrong.push(format!("{} members are not 1 to {MAX_MEMBERS}", self.members.len()));
        }
        for member in &self.members {
            wrong.extend(member.faults().into_iter().map(|fault| format!("member {}: {fault}", member.host)));
        }
        self.check_uniqueness(&mut wrong);
        let local = self.members.iter().filter(|member| is_local(&member.host)).count();
        if local != 0 && local != self.members.len() {
            wrong.push(format!(
                "{local} of {} hosts are localhost: either all or none must be, since members and clients on other \
                 machines connect to these names",
                self.members.len()
            ));
        }
        if !self.members.is_empty() {
            let voters = self.voting_members();
            if !(1..=MAX_VOTERS).contains(&voters) {
                wrong.push(format!("{voters} voting members are not 1 to {MAX_VOTERS}"));
            }
            if !self.members.iter().any(Member::is_electable) {
                wrong.push("no member can become primary: one without arbiter needs a priority above 0".to_owned());
            }
        }
        self.settings.check(&self.members, &mut wrong);
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(format!("the replica set configuration is invalid: {}", wrong.join("; "))))
    }

    /// What a server of this dialect would not survive, or cannot do.
    pub(super) fn check_dialect(&self, dialect: Dialect) -> Result<()> {
        let Some(defaults) = self.settings.other.get("getLastErrorDefaults") else { return Ok(()) };
        let untouched = defaults.as_document().is_some_and(|defaults| {
            defaults.iter().all(|(name, value)| match (name.as_str(), integer(value)) {
                ("w", Some(nodes)) => nodes == 1,
                ("wtimeout", Some(millis)) => millis == 0,
                _ => false,
            })
        });
        if untouched || dialect == Dialect::Slave {
            return Ok(());
        }
        // Tried on 6.0.5: `replSetInitiate` with it ends the server's process.
        Err(Error::new(
            ErrorKind::Unsupported,
            "servers from 5.0 on have no getLastErrorDefaults: set a default write concern with setDefaultRWConcern",
        ))
    }

    /// Whether a running set can go from `self` to `next` in one step, by the server's rules.
    pub(super) fn check_change(&self, next: &Self, force: bool) -> Result<()> {
        let incompatible = |what: String| Err(Error::invalid(what));
        if self.name != next.name {
            return incompatible("the name of a replica set cannot be changed".to_owned());
        }
        for (old, new) in self.members.iter().flat_map(|old| next.members.iter().map(move |new| (old, new))) {
            let same_host = address(&old.host) == address(&new.host);
            if same_host && old.id != new.id {
                return incompatible(format!("member {} must keep its number", new.host));
            }
            if old.id == new.id && (old.arbiter != new.arbiter || old.build_indexes != new.build_indexes) {
                return incompatible(format!(
                    "member {}: arbiter and build_indexes cannot be changed; remove the member, then add it again",
                    new.host
                ));
            }
        }
        if !force {
            let voters = |config: &Self| -> BTreeSet<Option<u8>> {
                config.members.iter().filter(|member| member.votes > 0).map(|member| member.id).collect()
            };
            let changed = voters(self).symmetric_difference(&voters(next)).count();
            if changed > 1 {
                return incompatible(format!(
                    "{changed} votes would change at once: add or remove one voting member at a time, so that the old and \
                     the new majority overlap"
                ));
            }
        }
        Ok(())
    }

    fn free_id(&self) -> Option<u8> {
        (0..=u8::MAX).find(|id| !self.members.iter().any(|member| member.id == Some(*id)))
    }

    fn check_uniqueness(&self, wrong: &mut Vec<String>) {
        let (mut ids, mut hosts) = (BTreeSet::new(), BTreeSet::new());
        for member in &self.members {
            if let Some(id) = member.id
                && !ids.insert(id)
            {
                wrong.push(format!("two members have the number {id}"));
            }
            // A host that is no address is a fault of its own.
            if let Ok(address) = address(&member.host)
                && !hosts.insert(address)
            {
                wrong.push(format!("two members have the host {}", member.host));
            }
        }
    }
}

impl Member {
    /// A member with one vote and priority 1. `host` is `name:port`, or a name for port 27017.
    pub fn new(host: impl Into<String>) -> Self {
        Self {
            id: None,
            host: host.into(),
            priority: 1.0,
            votes: 1,
            arbiter: false,
            hidden: false,
            build_indexes: true,
            delay: Duration::ZERO,
            tags: BTreeMap::new(),
            other: Document::new(),
        }
    }

    /// A member that votes and holds no data.
    ///
    /// It keeps a majority for elections but cannot acknowledge writes: with one arbiter and one data-bearing member
    /// down, a set of three accepts writes and never acknowledges `w: "majority"`. From server 5.0 on, adding one to a
    /// running set needs a default write concern to be set first.
    pub fn arbiter(host: impl Into<String>) -> Self {
        let mut member = Self::new(host);
        member.arbiter = true;
        member.priority = 0.0;
        member
    }

    /// Sets its number.
    #[must_use]
    pub fn with_id(mut self, id: u8) -> Self {
        self.id = Some(id);
        self
    }

    /// Sets how much it wants to be primary.
    #[must_use]
    pub fn with_priority(mut self, priority: f64) -> Self {
        self.priority = priority;
        self
    }

    /// Takes its vote, and with it the chance to become primary.
    #[must_use]
    pub fn non_voting(mut self) -> Self {
        self.votes = 0;
        self.priority = 0.0;
        self
    }

    /// Hides it from clients, which takes the chance to become primary: for backups and reports.
    #[must_use]
    pub fn hidden(mut self) -> Self {
        self.hidden = true;
        self.priority = 0.0;
        self
    }

    /// Lets it stay behind, hidden, so that a mistake can be undone from it. It still votes and still
    /// acknowledges writes, late: add [`non_voting`](Self::non_voting) to keep it out of majorities.
    #[must_use]
    pub fn delayed_by(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self.hidden()
    }

    /// Lets it build no indexes but that of `_id`, which takes the chance to become primary.
    #[must_use]
    pub fn without_indexes(mut self) -> Self {
        self.build_indexes = false;
        self.priority = 0.0;
        self
    }

    /// Adds a tag.
    #[must_use]
    pub fn with_tag(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.insert(name.into(), value.into());
        self
    }

    /// Whether it can become primary.
    pub fn is_electable(&self) -> bool {
        !self.arbiter && self.priority > 0.0
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut fault_if = |wrong: bool, fault: &str| {
            if wrong {
                faults.push(fault.to_owned());
            }
        };
        fault_if(self.id.is_none(), "it has no number: add it by with_member, or set one by with_id");
        fault_if(self.votes > 1, "a member has 0 votes or 1");
        fault_if(!(0.0..=MAX_PRIORITY).contains(&self.priority), "its priority is not 0 to 1000");
        fault_if(self.delay > MAX_DELAY, "its delay is more than 366 days");
        fault_if(self.delay.subsec_nanos() != 0, "its delay is not in whole seconds");
        if self.arbiter {
            fault_if(self.priority != 0.0 && self.priority != 1.0, "an arbiter has priority 0");
            fault_if(self.votes == 0, "an arbiter must vote");
            fault_if(!self.tags.is_empty(), "an arbiter has no tags");
            fault_if(self.delay > Duration::ZERO, "an arbiter has no delay");
        } else if self.priority > 0.0 {
            fault_if(self.votes == 0, "without a vote its priority must be 0");
            fault_if(self.hidden, "a hidden member must have priority 0");
            fault_if(self.delay > Duration::ZERO, "a delayed member must have priority 0");
            fault_if(!self.build_indexes, "a member without indexes must have priority 0");
        }
        if let Err(fault) = address(&self.host) {
            faults.push(fault);
        }
        faults
    }
}

impl ReplicaSetSettings {
    /// Sets how long a primary may be silent before the others elect a new one.
    #[must_use]
    pub fn with_election_timeout(mut self, timeout: Duration) -> Self {
        self.election_timeout = Some(timeout);
        self
    }

    /// Sets the time between heartbeats.
    #[must_use]
    pub fn with_heartbeat_interval(mut self, interval: Duration) -> Self {
        self.heartbeat_interval = Some(interval);
        self
    }

    /// Sets how long a member waits for a heartbeat.
    #[must_use]
    pub fn with_heartbeat_timeout(mut self, timeout: Duration) -> Self {
        self.heartbeat_timeout = Some(timeout);
        self
    }

    /// Lets secondaries replicate from the primary only.
    #[must_use]
    pub fn without_chaining(mut self) -> Self {
        self.chaining_allowed = Some(false);
        self
    }

    /// Adds a custom write concern: acknowledged when members with `values` different values of `tag` have the write.
    ///
    /// Use it as [`WriteConcern::custom`](mongodb::options::WriteConcern::custom)`(name)`. Called again with the same
    /// name, it adds a further demand.
    #[must_use]
    pub fn with_write_concern_mode(mut self, name: impl Into<String>, tag: impl Into<String>, values: u32) -> Self {
        self.write_concern_modes.entry(name.into()).or_default().insert(tag.into(), values);
        self
    }

    fn check(&self, members: &[Member], wrong: &mut Vec<String>) {
        let times = [
            ("election_timeout", self.election_timeout),
            ("heartbeat_interval", self.heartbeat_interval),
            ("heartbeat_timeout", self.heartbeat_timeout),
        ];
        for (name, time) in times {
            if time.is_some_and(|time| time < Duration::from_millis(1) || millis(time).is_none()) {
                wrong.push(format!("{name} is not 1 ms to {} ms", i32::MAX));
            }
        }
        if self.heartbeat_timeout.is_some_and(|time| time.subsec_nanos() != 0) {
            wrong.push("heartbeat_timeout is not in whole seconds".to_owned());
        }
        for (mode, demands) in &self.write_concern_modes {
            for (tag, &demanded) in demands {
                let values: BTreeSet<&String> = members.iter().filter_map(|member| member.tags.get(tag)).collect();
                if demanded == 0 || demanded as usize > values.len() {
                    wrong.push(format!(
                        "write concern mode {mode} asks for {demanded} values of tag {tag}, and members have {}",
                        values.len()
                    ));
                }
            }
        }
    }
}

/// Host and port in the form that makes two spellings of one address equal, or what is wrong with it.
fn address(host: &str) -> Result<(String, u16), String> {
    if host.contains("://") || host.contains('@') || host.contains('/') {
        return Err("its host is not host:port: a connection string names it, not the configuration".to_owned());
    }
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (name, after) = rest.split_once(']').ok_or("the bracket of its IPv6 address is not closed")?;
            (name, after.strip_prefix(':').or(if after.is_empty() { None } else { Some(after) }))
        }
        // Without brackets more than one colon is an IPv6 address without a port.
        None if host.matches(':').count() > 1 => (host, None),
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    if name.is_empty() || name.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err("its host has no name, or white space in it".to_owned());
    }
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => match port.parse::<u16>() {
            Ok(port) if port > 0 => port,
            _ => return Err("its port is not 1 to 65535".to_owned()),
        },
    };
    Ok((name.to_ascii_lowercase(), port))
}

/// What servers take for a name that means another machine to everybody.
fn is_local(host: &str) -> bool {
    address(host).is_ok_and(|(name, _)| name == "localhost" || name.starts_with("127.") || name == "::1")
}

pub(super) fn millis(time: Duration) -> Option<i32> {
    i32::try_from(time.as_millis()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> ReplicaSetConfig {
        ReplicaSetConfig::new("rs")
            .with_member(Member::new("a.example:1"))
            .with_member(Member::new("b.example:1"))
            .with_member(Member::new("c.example:1"))
    }

    fn fault(config: &ReplicaSetConfig) -> String {
        let error = config.validate().expect_err("must be refused");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        error.to_string()
    }

    #[test]
    fn a_plain_configuration_is_valid_and_numbers_its_members() {
        let config = three();
        config.validate().unwrap();
        assert_eq!(config.members.iter().map(|member| member.id).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
        let config = config.with_member(Member::new("d.example").with_id(255)).with_member(Member::new("e.example"));
        assert_eq!(config.members[4].id, Some(3), "after the highest number comes the lowest that is free");
    }

    #[test]
    fn the_numbers_of_members_are_bounded() {
        assert!(fault(&ReplicaSetConfig::new("rs")).contains("0 members"));
        let many = |voting: usize, all: usize| {
            (0..all).fold(ReplicaSetConfig::new("rs"), |config, n| {
                let member = Member::new(format!("m{n}.example:1"));
                config.with_member(if n < voting { member } else { member.non_voting() })
            })
        };
        many(7, 50).validate().unwrap();
        assert!(fault(&many(7, 51)).contains("51 members"));
        assert!(fault(&many(8, 8)).contains("8 voting members"));
    }

    #[test]
    fn someone_must_be_able_to_become_primary() {
        let config =
            ReplicaSetConfig::new("rs").with_member(Member::new("a.example").hidden()).with_member(Member::arbiter("b.example"));
        assert!(fault(&config).contains("no member can become primary"));
    }

    #[test]
    fn priority_is_zero_for_those_who_cannot_be_primary() {
        for (member, what) in [
            (Member::new("d.example").hidden(), "hidden"),
            (Member::new("d.example").non_voting(), "vote"),
            (Member::new("d.example").delayed_by(Duration::from_secs(60)), "delayed"),
            (Member::new("d.example").without_indexes(), "indexes"),
        ] {
            three().with_member(member.clone()).validate().unwrap();
            assert!(fault(&three().with_member(member.with_priority(1.0))).contains(what), "{what}");
        }
        assert!(fault(&three().with_member(Member::new("d.example").with_priority(1001.0))).contains("0 to 1000"));
        assert!(fault(&three().with_member(Member::new("d.example").with_priority(f64::NAN))).contains("0 to 1000"));
    }

    #[test]
    fn arbiters_vote_and_have_no_tags() {
        three().with_member(Member::arbiter("d.example")).validate().unwrap();
        let mut silent = Member::arbiter("d.example");
        silent.votes = 0;
        assert!(fault(&three().with_member(silent)).contains("must vote"));
        assert!(fault(&three().with_member(Member::arbiter("d.example").with_tag("a", "b"))).contains("no tags"));
    }

    #[test]
    fn numbers_and_hosts_are_unique_whatever_their_spelling() {
        let config = ReplicaSetConfig::new("rs")
            .with_member(Member::new("a.example:27017").with_id(1))
            .with_member(Member::new("A.example").with_id(1));
        let fault = fault(&config);
        assert!(fault.contains("the number 1") && fault.contains("the host A.example"), "{fault}");
    }

    #[test]
    fn localhost_is_for_all_or_none() {
        for local in ["localhost:1", "127.0.0.1:1", "[::1]:1", "127.9.9.9"] {
            assert!(fault(&three().with_member(Member::new(local))).contains("localhost"), "{local}");
        }
        ReplicaSetConfig::new("rs")
            .with_member(Member::new("localhost:1"))
            .with_member(Member::new("127.0.0.1:2"))
            .validate()
            .unwrap();
    }

    #[test]
    fn hosts_that_are_no_addresses_are_refused() {
        for host in ["", ":1", "a b:1", "mongodb://a", "a:0", "a:65536", "a:x", "[::1", "[::1]x", "user@host"] {
            assert!(address(host).is_err(), "{host}");
        }
        assert_eq!(address("h"), Ok(("h".to_owned(), 27017)));
        assert_eq!(address("[fe80::1]:5"), Ok(("fe80::1".to_owned(), 5)));
        assert_eq!(address("fe80::1"), Ok(("fe80::1".to_owned(), 27017)));
    }

    #[test]
    fn write_concern_modes_need_their_tags() {
        let settings = ReplicaSetSettings::default().with_write_concern_mode("everywhere", "dc", 2);
        assert!(fault(&three().with_settings(settings.clone())).contains("everywhere"));
        ReplicaSetConfig::new("rs")
            .with_member(Member::new("a.example").with_tag("dc", "north"))
            .with_member(Member::new("b.example").with_tag("dc", "south"))
            .with_settings(settings)
            .validate()
            .unwrap();
    }

    #[test]
    fn one_vote_changes_at_a_time_unless_forced() {
        let two_more = three().with_member(Member::new("d.example")).with_member(Member::new("e.example"));
        assert!(three().check_change(&two_more, false).is_err());
        three().check_change(&two_more, true).unwrap();
        three().check_change(&three().with_member(Member::new("d.example")), false).unwrap();
        three().check_change(&three().without_member("c.example:1"), false).unwrap();
        let swapped = three().without_member("c.example:1").with_member(Member::new("d.example").with_id(7));
        assert!(three().check_change(&swapped, false).is_err(), "one out and one in are two");
        let silent = three()
            .with_member(Member::new("d.example").non_voting())
            .with_member(Member::new("e.example").hidden().non_voting());
        three().check_change(&silent, false).unwrap();
    }

    #[test]
    fn what_a_member_is_cannot_be_changed_in_place() {
        let mut next = three();
        next.member_mut("c.example:1").unwrap().arbiter = true;
        assert!(three().check_change(&next, true).is_err());
        let renumbered = three().without_member("c.example:1").with_member(Member::new("c.example:1").with_id(9));
        assert!(three().check_change(&renumbered, true).is_err());
        let mut renamed = three();
        renamed.name = "other".to_owned();
        assert!(three().check_change(&renamed, true).is_err());
    }
}
