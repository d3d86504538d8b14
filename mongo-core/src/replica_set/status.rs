//! How the members of a replica set are.

use std::{fmt, time::Duration};

use mongodb::bson::{Bson, DateTime, Document, Timestamp};

use super::wire::integer;
use crate::error::{Error, Result};

/// What one member knows of its replica set, from
/// [`replSetGetStatus`](https://www.mongodb.com/docs/manual/reference/command/replSetGetStatus/).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct ReplicaSetStatus {
    /// Name of the set.
    pub name: String,
    /// The election term: how many elections there have been.
    pub term: i64,
    /// The members, in the order of the configuration.
    pub members: Vec<MemberStatus>,
    /// When the member answered, by its own clock.
    pub at: Option<DateTime>,
    /// When the newest operation was made that the asked member has applied; that and the following by the primary's clock. `None` for arbiters.
    pub applied_at: Option<DateTime>,
    /// The same, of the newest operation that it has in its journal.
    pub durable_at: Option<DateTime>,
    /// The same, of the newest operation that, as far as it knows, a majority of the members has.
    pub majority_at: Option<DateTime>,
}

impl ReplicaSetStatus {
    /// The primary, where this member knows one.
    pub fn primary(&self) -> Option<&MemberStatus> {
        self.members.iter().find(|member| member.state == MemberState::Primary)
    }

    /// How far `member` is behind the primary, by the wall clock of their last applied operations, to the second.
    ///
    /// `None` without a primary, and for members that hold no data or are down. A quiet set lags by up to 10 seconds
    /// without meaning it: the primary writes a no-op only that often.
    pub fn lag(&self, member: &MemberStatus) -> Option<Duration> {
        let ahead = self.primary()?.applied_at?.timestamp_millis();
        let behind = member.applied_at?.timestamp_millis();
        u64::try_from(ahead - behind).ok().or(Some(0)).map(Duration::from_millis)
    }

    /// Reads an answer of `replSetGetStatus`, wherever it comes from.
    ///
    /// # Errors
    /// [`CorruptData`](crate::ErrorKind::CorruptData) for what is none.
    pub fn from_reply(reply: &Document) -> Result<Self> {
        let name = reply.get_str("set").map_err(|_| malformed("set"))?.to_owned();
        let term = reply.get("term").and_then(integer).unwrap_or(-1);
        let members = reply.get_array("members").map_err(|_| malformed("members"))?;
        let members = members
            .iter()
            .map(|member| member.as_document().and_then(MemberStatus::from_document).ok_or_else(|| malformed("members")))
            .collect::<Result<_>>()?;
        // Without data there is a zero.
        let date = |of: &Document, name: &str| of.get_datetime(name).ok().copied().filter(|at| at.timestamp_millis() > 0);
        let reached = |name: &str| reply.get_document("optimes").ok().and_then(|optimes| date(optimes, name));
        let (applied_at, durable_at) = (reached("lastAppliedWallTime"), reached("lastDurableWallTime"));
        Ok(Self {
            name,
            term,
            members,
            at: date(reply, "date"),
            applied_at,
            durable_at,
            majority_at: reached("lastCommittedWallTime"),
        })
    }
}

/// How one member is.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct MemberStatus {
    /// Its number in the configuration.
    pub id: i64,
    /// Its host and port.
    pub host: String,
    /// What it is doing.
    pub state: MemberState,
    /// Whether it answers heartbeats.
    pub is_up: bool,
    /// Whether it is the member that was asked.
    pub is_asked: bool,
    /// How long it has been up, as the asked member sees it.
    pub uptime: Duration,
    /// Position of the last operation that it has applied. `None` for arbiters and members that are down.
    pub applied: Option<Timestamp>,
    /// When that operation was made, by the primary's clock.
    pub applied_at: Option<DateTime>,
    /// Round trip of heartbeats. `None` for the member that was asked.
    pub ping: Option<Duration>,
    /// When the asked member last heard of it, by the clock of the asked one. `None` for the asked one itself.
    pub heard_at: Option<DateTime>,
    /// The member that it replicates from.
    pub sync_source: Option<String>,
    /// Version of the configuration that it has.
    pub config_version: i64,
    /// What its last heartbeat complained of.
    pub message: Option<String>,
}

impl MemberStatus {
    fn from_document(member: &Document) -> Option<Self> {
        let text = |name: &str| member.get_str(name).ok().filter(|text| !text.is_empty()).map(str::to_owned);
        // Members that are down or vote only have a zero where others have a position.
        let applied = match member.get("optime") {
            Some(Bson::Document(position)) => position.get_timestamp("ts").ok(),
            Some(Bson::Timestamp(position)) => Some(*position),
            _ => None,
        }
        .filter(|position| position.time > 0);
        Some(Self {
            id: integer(member.get("_id")?)?,
            host: member.get_str("name").ok()?.to_owned(),
            state: MemberState::from_code(integer(member.get("state")?)?),
            is_up: member.get("health").and_then(integer).is_some_and(|health| health > 0),
            is_asked: member.get_bool("self").unwrap_or(false),
            uptime: seconds(member.get("uptime")),
            applied,
            applied_at: applied.and_then(|_| member.get_datetime("optimeDate").ok().copied()),
            ping: member.get("pingMs").and_then(integer).and_then(|ms| u64::try_from(ms).ok()).map(Duration::from_millis),
            heard_at: member.get_datetime("lastHeartbeatRecv").ok().copied().filter(|at| at.timestamp_millis() > 0),
            sync_source: text("syncSourceHost"),
            config_version: member.get("configVersion").and_then(integer).unwrap_or(-1),
            message: text("lastHeartbeatMessage").or_else(|| text("infoMessage")),
        })
    }
}

/// What a member is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum MemberState {
    /// It starts, and has not read its configuration yet.
    Startup,
    /// It takes the writes.
    Primary,
    /// It replicates, and can serve reads.
    Secondary,
    /// It checks itself or catches up, and serves no reads.
    Recovering,
    /// It starts, or copies all data for the first time.
    Startup2,
    /// Others see it, and do not know what it is doing.
    Unknown,
    /// It votes only.
    Arbiter,
    /// It does not answer.
    Down,
    /// It undoes writes that no majority has.
    Rollback,
    /// It has been taken out of the configuration.
    Removed,
}

impl MemberState {
    fn from_code(code: i64) -> Self {
        match code {
            0 => Self::Startup,
            1 => Self::Primary,
            2 => Self::Secondary,
            3 => Self::Recovering,
            5 => Self::Startup2,
            7 => Self::Arbiter,
            8 => Self::Down,
            9 => Self::Rollback,
            10 => Self::Removed,
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for MemberState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Startup => "STARTUP",
            Self::Primary => "PRIMARY",
            Self::Secondary => "SECONDARY",
            Self::Recovering => "RECOVERING",
            Self::Startup2 => "STARTUP2",
            Self::Unknown => "UNKNOWN",
            Self::Arbiter => "ARBITER",
            Self::Down => "DOWN",
            Self::Rollback => "ROLLBACK",
            Self::Removed => "REMOVED",
        })
    }
}

fn seconds(value: Option<&Bson>) -> Duration {
    value.and_then(integer).and_then(|seconds| u64::try_from(seconds).ok()).map_or(Duration::ZERO, Duration::from_secs)
}

fn malformed(field: &'static str) -> Error {
    Error::corrupt("the server's replica set status is malformed").with_context("field", field)
}

#[cfg(test)]
mod tests {
    use mongodb::bson::doc;

    use super::*;

    #[test]
    fn members_are_read_with_their_lag() {
        let at = |seconds: i64| DateTime::from_millis(1_700_000_000_000 + seconds * 1000);
        let position = |time: u32| doc! { "ts": Timestamp { time, increment: 1 }, "t": 3_i64 };
        let reply = doc! {
            "set": "rs", "term": 3_i64,
            "members": [
                { "_id": 0, "name": "a:1", "health": 1.0, "state": 1, "uptime": 50, "optime": position(20), "optimeDate": at(20), "self": true, "configVersion": 1 },
                { "_id": 1, "name": "b:1", "health": 1.0, "state": 2, "uptime": 40, "optime": position(13), "optimeDate": at(13), "pingMs": 2_i64, "syncSourceHost": "a:1", "configVersion": 1 },
                { "_id": 2, "name": "c:1", "health": 0.0, "state": 8, "uptime": 0, "optime": position(0), "optimeDate": at(-1_700_000_000), "lastHeartbeatMessage": "Connection refused", "configVersion": -1 },
            ],
        };
        let status = ReplicaSetStatus::from_reply(&reply).unwrap();
        assert_eq!(status.primary().map(|member| member.host.as_str()), Some("a:1"));
        let lags: Vec<_> = status.members.iter().map(|member| status.lag(member)).collect();
        assert_eq!(lags, [Some(Duration::ZERO), Some(Duration::from_secs(7)), None]);
        assert_eq!(status.members[1].sync_source.as_deref(), Some("a:1"));
        assert_eq!((status.members[2].state, status.members[2].is_up), (MemberState::Down, false));
        assert_eq!(status.members[2].message.as_deref(), Some("Connection refused"));
    }

    #[test]
    fn a_status_without_members_is_an_error() {
        assert!(ReplicaSetStatus::from_reply(&doc! { "set": "rs" }).is_err());
    }
}
