//! The form in which servers store a configuration.

use std::{collections::BTreeMap, time::Duration};

use mongodb::bson::{Bson, Document, doc};

use super::config::{Member, ReplicaSetConfig, ReplicaSetSettings, millis};
use crate::error::{Error, Result};

/// What servers call the delay of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Before 5.0.
    Slave,
    /// From 5.0 on (wire version 13).
    Secondary,
}

impl Dialect {
    pub(super) fn of_wire_version(version: i64) -> Self {
        if version >= 13 { Self::Secondary } else { Self::Slave }
    }

    fn delay_field(self) -> &'static str {
        match self {
            Self::Slave => "slaveDelay",
            Self::Secondary => "secondaryDelaySecs",
        }
    }
}

impl ReplicaSetConfig {
    /// The form in which servers store it. `secondaryDelaySecs` is what servers before 5.0 call `slaveDelay`.
    pub(super) fn to_document(&self, dialect: Dialect) -> Document {
        let mut document = doc! { "_id": &self.name, "version": self.version };
        let members: Vec<Document> = self.members.iter().map(|member| member.to_document(dialect)).collect();
        document.insert("members", members);
        document.insert("writeConcernMajorityJournalDefault", self.majority_writes_are_journaled);
        let settings = self.settings.to_document();
        if !settings.is_empty() {
            document.insert("settings", settings);
        }
        extend_missing(&mut document, &self.other);
        document
    }

    /// Reads what `replSetGetConfig` returns.
    pub(super) fn from_document(document: &Document) -> Result<Self> {
        let mut other = document.clone();
        let Some(Bson::String(name)) = other.remove("_id") else { return Err(malformed("_id")) };
        let version = other.remove("version").as_ref().and_then(integer).ok_or_else(|| malformed("version"))?;
        let Some(Bson::Array(members)) = other.remove("members") else { return Err(malformed("members")) };
        let members = members
            .into_iter()
            .map(|member| match member {
                Bson::Document(member) => Member::from_document(member),
                _ => Err(malformed("members")),
            })
            .collect::<Result<_>>()?;
        let settings = match other.remove("settings") {
            Some(Bson::Document(settings)) => ReplicaSetSettings::from_document(settings)?,
            _ => ReplicaSetSettings::default(),
        };
        let majority_writes_are_journaled = match other.remove("writeConcernMajorityJournalDefault") {
            Some(value) => truth(&value),
            None => true,
        };
        Ok(Self { name, version, members, settings, majority_writes_are_journaled, other })
    }
}

impl Member {
    fn to_document(&self, dialect: Dialect) -> Document {
        let tags: Document = self.tags.iter().map(|(name, value)| (name.clone(), Bson::from(value))).collect();
        let mut document = doc! {
            "_id": i32::from(self.id.unwrap_or_default()),
            "host": &self.host,
            "arbiterOnly": self.arbiter,
            "buildIndexes": self.build_indexes,
            "hidden": self.hidden,
            // Arbiters may be written with the default priority, which servers take for 0.
            "priority": if self.arbiter { 0.0 } else { self.priority },
            "tags": tags,
            "votes": i32::from(self.votes),
        };
        if self.delay > Duration::ZERO {
            let seconds = i64::try_from(self.delay.as_secs()).unwrap_or(i64::MAX);
            document.insert(dialect.delay_field(), seconds);
        }
        extend_missing(&mut document, &self.other);
        document
    }

    fn from_document(mut other: Document) -> Result<Self> {
        let mut take = |name: &str| other.remove(name);
        let id = take("_id").as_ref().and_then(integer).and_then(|id| u8::try_from(id).ok());
        let Some(Bson::String(host)) = take("host") else { return Err(malformed("members.host")) };
        let priority = take("priority").as_ref().and_then(double).unwrap_or(1.0);
        let votes = take("votes").as_ref().and_then(integer).map_or(Ok(1), u8::try_from);
        let arbiter = take("arbiterOnly").is_some_and(|value| truth(&value));
        let hidden = take("hidden").is_some_and(|value| truth(&value));
        let build_indexes = take("buildIndexes").is_none_or(|value| truth(&value));
        let delay = [take(Dialect::Secondary.delay_field()), take(Dialect::Slave.delay_field())]
            .into_iter()
            .flatten()
            .find_map(|value| u64::try_from(integer(&value)?).ok())
            .map_or(Duration::ZERO, Duration::from_secs);
        let tags = match take("tags") {
            Some(Bson::Document(tags)) => tags
                .into_iter()
                .filter_map(|(name, value)| if let Bson::String(value) = value { Some((name, value)) } else { None })
                .collect(),
            _ => BTreeMap::new(),
        };
        let votes = votes.map_err(|_| malformed("members.votes"))?;
        Ok(Self { id, host, priority, votes, arbiter, hidden, build_indexes, delay, tags, other })
    }
}

impl ReplicaSetSettings {
    fn to_document(&self) -> Document {
        let mut document = Document::new();
        if let Some(millis) = self.election_timeout.and_then(millis) {
            document.insert("electionTimeoutMillis", millis);
        }
        if let Some(millis) = self.heartbeat_interval.and_then(millis) {
            document.insert("heartbeatIntervalMillis", millis);
        }
        if let Some(time) = self.heartbeat_timeout {
            document.insert("heartbeatTimeoutSecs", i32::try_from(time.as_secs()).unwrap_or(i32::MAX));
        }
        if let Some(allowed) = self.chaining_allowed {
            document.insert("chainingAllowed", allowed);
        }
        if !self.write_concern_modes.is_empty() {
            let modes: Document = self
                .write_concern_modes
                .iter()
                .map(|(mode, demands)| {
                    let demands: Document = demands.iter().map(|(tag, values)| (tag.clone(), Bson::from(*values))).collect();
                    (mode.clone(), Bson::Document(demands))
                })
                .collect();
            document.insert("getLastErrorModes", modes);
        }
        extend_missing(&mut document, &self.other);
        document
    }

    fn from_document(mut other: Document) -> Result<Self> {
        let mut number = |name: &str| other.remove(name).as_ref().and_then(integer).and_then(|n| u64::try_from(n).ok());
        let election_timeout = number("electionTimeoutMillis").map(Duration::from_millis);
        let heartbeat_interval = number("heartbeatIntervalMillis").map(Duration::from_millis);
        let heartbeat_timeout = number("heartbeatTimeoutSecs").map(Duration::from_secs);
        let chaining_allowed = other.remove("chainingAllowed").map(|value| truth(&value));
        let mut write_concern_modes = BTreeMap::new();
        if let Some(Bson::Document(modes)) = other.remove("getLastErrorModes") {
            for (mode, demands) in modes {
                let Bson::Document(demands) = demands else { return Err(malformed("settings.getLastErrorModes")) };
                let demands = demands
                    .into_iter()
                    .map(|(tag, values)| {
                        let values = integer(&values).and_then(|values| u32::try_from(values).ok());
                        values.map(|values| (tag, values)).ok_or_else(|| malformed("settings.getLastErrorModes"))
                    })
                    .collect::<Result<_>>()?;
                write_concern_modes.insert(mode, demands);
            }
        }
        Ok(Self { election_timeout, heartbeat_interval, heartbeat_timeout, chaining_allowed, write_concern_modes, other })
    }
}

fn extend_missing(document: &mut Document, other: &Document) {
    for (name, value) in other {
        if !document.contains_key(name) {
            document.insert(name.clone(), value.clone());
        }
    }
}

/// Servers write whole numbers in any numeric type.
#[expect(clippy::cast_possible_truncation, reason = "the fraction is checked to be zero and the range is small")]
pub(super) fn integer(value: &Bson) -> Option<i64> {
    match value {
        Bson::Int32(number) => Some(i64::from(*number)),
        Bson::Int64(number) => Some(*number),
        Bson::Double(number) if number.fract() == 0.0 && number.abs() < 9e15 => Some(*number as i64),
        _ => None,
    }
}

fn double(value: &Bson) -> Option<f64> {
    match value {
        Bson::Double(number) => Some(*number),
        Bson::Int32(number) => Some(f64::from(*number)),
        _ => None,
    }
}

/// Servers accept numbers for truth values, and keep what they were given.
fn truth(value: &Bson) -> bool {
    match value {
        Bson::Boolean(truth) => *truth,
        number => integer(number).is_some_and(|number| number != 0),
    }
}

fn malformed(field: &'static str) -> Error {
    Error::corrupt("the server's replica set configuration is malformed").with_context("field", field)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn what_the_server_wrote_comes_back_whole() {
        let written = doc! {
            "_id": "rs", "version": 4, "term": 2_i64, "protocolVersion": 1_i64,
            "writeConcernMajorityJournalDefault": true,
            "members": [{
                "_id": 0, "host": "a.example:1", "arbiterOnly": false, "buildIndexes": true, "hidden": true,
                "priority": 0.0, "tags": { "dc": "north" }, "secondaryDelaySecs": 60_i64, "votes": 1,
                "horizons": { "outside": "x.example:1" },
            }],
            "settings": {
                "chainingAllowed": true, "heartbeatIntervalMillis": 2000, "heartbeatTimeoutSecs": 10,
                "electionTimeoutMillis": 10000, "catchUpTimeoutMillis": -1, "getLastErrorModes": { "m": { "dc": 1 } },
                "getLastErrorDefaults": { "w": 1, "wtimeout": 0 },
            },
        };
        let config = ReplicaSetConfig::from_document(&written).unwrap();
        assert_eq!(config.members[0].delay, Duration::from_secs(60));
        let again = config.to_document(Dialect::Secondary);
        assert_eq!(ReplicaSetConfig::from_document(&again).unwrap(), config);
        for name in ["term", "protocolVersion"] {
            assert_eq!(again.get(name), written.get(name));
        }
        let settings = again.get_document("settings").unwrap();
        assert_eq!(settings.get("catchUpTimeoutMillis"), Some(&Bson::Int32(-1)));
        let member = again.get_array("members").unwrap()[0].as_document().unwrap();
        assert!(member.contains_key("horizons") && member.contains_key("secondaryDelaySecs"));
        let old = config.to_document(Dialect::Slave);
        assert!(old.get_array("members").unwrap()[0].as_document().unwrap().contains_key("slaveDelay"));
        config.check_dialect(Dialect::Secondary).unwrap();
    }

    #[test]
    fn what_crashes_a_server_is_not_sent_to_it() {
        let mut config = ReplicaSetConfig::new("rs").with_member(Member::new("a.example"));
        config.settings.other.insert("getLastErrorDefaults", doc! { "w": "majority" });
        assert_eq!(config.check_dialect(Dialect::Secondary).map_err(|error| error.kind()), Err(ErrorKind::Unsupported));
        config.check_dialect(Dialect::Slave).unwrap();
    }
}
